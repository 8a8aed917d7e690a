#include <cstdio>
#include <string>

#include "commands.h"
#include "quantal/checkpoint.h"

namespace quantal::tools {
namespace {

struct InspectOptions {
  std::string path;
  bool json = false;
  bool tensors = false;
};

}  // namespace

std::shared_ptr<void> add_inspect(CLI::App& app) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* inspect =
      app.add_subcommand("inspect", "Describe a model file or folder without loading its weights");
  inspect
      ->add_option("path", options->path,
                   "a folder with weights, or a .gguf, .safetensors, torch, .npz or .npy file")
      ->required();
  inspect->add_flag("--json", options->json, "print JSON (always with all tensors)");
  inspect->add_flag("--tensors", options->tensors, "list every tensor instead of a summary");
  inspect->footer(
      "Examples:\n"
      "  quantal inspect model.gguf\n"
      "  quantal inspect --tensors quantized-folder\n"
      "  quantal inspect --json model.safetensors | jq .totals\n");
  inspect->callback([options] {
    const std::string text = options->json ? inspect_json(options->path) + "\n"
                                           : inspect_text(options->path, options->tensors);
    std::fputs(text.c_str(), stdout);
  });
  return options;
}

}  // namespace quantal::tools
