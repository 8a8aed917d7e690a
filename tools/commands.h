// The subcommands of the tool. Each keeps its options alive as long as the returned pointer.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

namespace quantal::tools {

std::shared_ptr<void> add_inspect(CLI::App& app);
std::shared_ptr<void> add_convert(CLI::App& app);
std::shared_ptr<void> add_formats(CLI::App& app);
std::shared_ptr<void> add_plan(CLI::App& app);

/// Names of all dialects, and "dense".
std::vector<std::string> target_names();
/// One line per layout of a target: its name, and what lies on disk. `before` begins each line.
std::string layouts_text(const std::string& target, const std::string& before);

}  // namespace quantal::tools
