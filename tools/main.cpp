// quantal: the command-line tool. Exit codes: 0 done, 1 the work failed, 2 wrong usage.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <string>

#include "quantal/checkpoint.h"

namespace {

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;

struct InspectOptions {
  std::string path;
  bool json = false;
  bool tensors = false;
};

void add_inspect(CLI::App& app, InspectOptions& options) {
  CLI::App* inspect =
      app.add_subcommand("inspect", "Describe a model file or folder without loading its weights");
  inspect
      ->add_option("path", options.path,
                   "a .gguf or .safetensors file, or a folder with config.json")
      ->required();
  inspect->add_flag("--json", options.json, "print JSON (always with all tensors)");
  inspect->add_flag("--tensors", options.tensors, "list every tensor instead of a summary");
  inspect->footer(
      "Examples:\n"
      "  quantal inspect model.gguf\n"
      "  quantal inspect --tensors quantized-folder\n"
      "  quantal inspect --json model.safetensors | jq .totals\n");
  inspect->callback([&options] {
    const std::string text = options.json ? quantal::inspect_json(options.path) + "\n"
                                          : quantal::inspect_text(options.path, options.tensors);
    std::fputs(text.c_str(), stdout);
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("quantal: one interface over every weight-quantization dialect", "quantal");
  app.set_version_flag("--version", "quantal " QUANTAL_VERSION);
  app.require_subcommand(1);
  app.footer("Run 'quantal COMMAND --help' for the options and examples of a command.");
  InspectOptions options;
  add_inspect(app, options);
  try {
    app.parse(argc, argv);
    if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return 0;
    std::perror("quantal: error: cannot write to standard output");
    return kFailed;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kWrongUsage;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "quantal: error: %s\n", error.what());
    return kFailed;
  }
}
