#include <cstdio>
#include <string>

#include "commands.h"
#include "quantal/checkpoint.h"

namespace quantal::tools {

std::vector<std::string> target_names() {
  std::vector<std::string> names;
  for (const Dialect* dialect : dialects()) names.emplace_back(dialect->name);
  names.emplace_back("dense");
  return names;
}

const Dialect* target_dialect(const std::string& name) {
  return name == "dense" ? nullptr : &dialect_by_name(name);
}

std::string layouts_text(const std::string& target, const std::string& before) {
  constexpr std::size_t kWidth = 20;
  std::string text;
  for (const FileLayout& layout : file_layouts(target_dialect(target))) {
    const std::string name(layout.name);
    text += before + name + std::string(name.size() < kWidth ? kWidth - name.size() : 1, ' ') +
            std::string(layout.title) + "\n";
  }
  return text;
}

namespace {

std::string formats_text() {
  std::string text;
  for (const std::string& name : target_names()) {
    const Dialect* dialect = target_dialect(name);
    const std::string title(dialect == nullptr ? "unquantized" : dialect->title);
    const std::string reads(dialect == nullptr ? "float32, float16, bfloat16" : dialect->reads);
    const std::string writes(dialect == nullptr ? reads : dialect->writes);
    text += name + ": " + title + "\n  reads   " + reads + "\n  makes   " +
            (reads == writes ? "the same" : writes) + "\n  files\n" + layouts_text(name, "    ") +
            "\n";
  }
  return text +
         "The first of the files is the default of 'quantal convert --layout'; all are recognized\n"
         "by content. 'quantal convert --plan' says what a conversion preserves.\n";
}

}  // namespace

std::shared_ptr<void> add_formats(CLI::App& app) {
  auto markdown = std::make_shared<bool>(false);
  CLI::App* formats = app.add_subcommand("formats", "List what is read, written and converted");
  formats->add_flag("--markdown", *markdown, "a table, as in the README");
  formats->callback([markdown] {
    std::fputs((*markdown ? formats_markdown() : formats_text()).c_str(), stdout);
  });
  return markdown;
}

}  // namespace quantal::tools
