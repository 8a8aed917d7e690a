#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "commands.h"
#include "interrupt.h"
#include "quantal/checkpoint.h"
#include "thread_executor.h"

namespace quantal::tools {
namespace {

struct ConvertArguments {
  std::string from, to_path, to, value_dtype, dense_dtype;
  ConvertOptions options;
  std::uint64_t max_shard_bytes = 0;
  int threads = 0;
  bool plan = false, quiet = false, single_quant = false;
};

CLI::IsMember is_float_dtype() { return CLI::IsMember({"float32", "float16", "bfloat16"}); }

void add_form_options(CLI::App& convert, ConvertArguments& a) {
  QuantizeOptions& q = a.options.quantize;
  const char* group = "Form of the layers (what is left out follows the source)";
  convert.add_option("--bits", q.bits, "bits of a code")->group(group);
  convert.add_option("--group-size", q.group_size, "codes per scale")->group(group);
  convert
      .add_option("--mode", q.mode,
                  "gguf: block type (Q4_K); mlx: affine, mxfp4 ...; quanto: max, hqq ...")
      ->group(group);
  convert.add_option("--quant-type", q.quant_type, "bnb: nf4 or fp4")->group(group);
  convert.add_flag("--no-double-quant", a.single_quant, "bnb: absmax as float32")->group(group);
  convert.add_option("--axis", q.axis, "hqq: 0 or 1")->group(group)->capture_default_str();
  convert
      .add_option("--dtype", a.value_dtype,
                  "of decoded values, and of scales where a format stores them so")
      ->group(group)
      ->check(is_float_dtype());
  convert.add_option("--dense-dtype", a.dense_dtype, "of --to dense and of decoded embeddings")
      ->group(group)
      ->check(is_float_dtype());
  convert
      .add_option("--skip", a.options.skip_modules,
                  "patterns: linear layers of a dense model that stay dense")
      ->group(group)
      ->delimiter(',')
      ->capture_default_str();
}

void add_file_options(CLI::App& convert, ConvertArguments& a) {
  const char* group = "Files";
  convert.add_option("--layout", a.options.save.layout, "which files, see the list below")
      ->group(group);
  convert
      .add_option("--max-shard-size", a.max_shard_bytes,
                  "cut weights into files of at most this size: 2GB, 500MiB")
      ->transform(CLI::AsSizeValue(true))
      ->group(group);
  convert
      .add_flag("--overwrite", a.options.save.overwrite,
                "replace a file, or a folder that quantal did not write")
      ->group(group);
  convert.add_flag("--plan", a.plan, "only say what would be preserved")->group(group);
  convert
      .add_flag("--lossless-only", a.options.lossless_only,
                "stop before writing if any layer would lose something")
      ->group(group);
  convert.add_option("--threads", a.threads, "0: as many as the machine has")
      ->group(group)
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  convert.add_flag("-q,--quiet", a.quiet, "print nothing but errors")->group(group);
}

/// One line that is rewritten on a terminal, nothing elsewhere.
void show_progress(std::int64_t done, std::int64_t total, const std::string& name) {
  if (::isatty(STDERR_FILENO) == 0) return;
  if (done == total) {
    std::fprintf(stderr, "\r\033[K");
  } else {
    std::fprintf(stderr, "\r\033[K%lld/%lld %.100s", static_cast<long long>(done),
                 static_cast<long long>(total), name.c_str());
  }
  std::fflush(stderr);
}

void run(ConvertArguments& a) {
  note_interrupts();
  const ThreadExecutor executor(a.threads);
  ConvertOptions& options = a.options;
  options.to = a.to;
  options.executor = &executor;
  if (!a.dense_dtype.empty()) options.dense_dtype = parse_dtype(a.dense_dtype);
  options.quantize.double_quant = !a.single_quant;
  constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max();
  options.save.max_shard_bytes = static_cast<std::int64_t>(std::min(a.max_shard_bytes, kMost));
  if (!a.value_dtype.empty()) options.value_dtype = parse_dtype(a.value_dtype);
  if (a.plan || !a.quiet) {
    std::fputs(plan_convert(a.from, options, a.to_path).text().c_str(), stdout);
    std::fflush(stdout);
  }
  if (a.plan) return;
  options.progress = [&a](std::int64_t done, std::int64_t total, const std::string& name) {
    if (!a.quiet) show_progress(done, total, name);
    stop_if_interrupted();
  };
  const ConvertReport report = convert(a.from, a.to_path, options);
  if (a.quiet) return;
  // Where nothing was lost the plan has said everything.
  const std::string text = report.lossless() ? ": nothing is lost\n" : "\n" + report.text();
  std::fputs(("\nwritten to " + a.to_path + text).c_str(), stdout);
}

}  // namespace

std::shared_ptr<void> add_convert(CLI::App& app) {
  auto arguments = std::make_shared<ConvertArguments>();
  ConvertArguments& a = *arguments;
  CLI::App* convert = app.add_subcommand(
      "convert", "Turn a model into another dialect, layout or container, layer by layer");
  convert->add_option("from", a.from, "a folder, or a .gguf, .safetensors, torch or .npz file")
      ->required();
  CLI::Option* target = convert->add_option("target", a.to_path, "the folder or file to write");
  convert->add_option("--to", a.to, "what to convert to")
      ->required()
      ->check(CLI::IsMember(target_names()));
  add_form_options(*convert, a);
  add_file_options(*convert, a);
  std::string layouts = "Files (--layout; the first of each target is the default):\n";
  for (const std::string& name : target_names()) {
    layouts += "  " + name + "\n" + layouts_text(name, "    ");
  }
  convert->footer(layouts +
                  "\nExamples:\n"
                  "  quantal convert model-Q4_1.gguf model-mlx --to mlx --lossless-only\n"
                  "  quantal convert hqq-folder model.gguf --to gguf --mode Q4_K\n"
                  "  quantal convert llama-folder llama-nf4 --to bnb --max-shard-size 2GB\n"
                  "  quantal convert quantized-folder --to hqq --plan\n");
  convert->callback([arguments, target] {
    if (target->count() == 0 && !arguments->plan) throw CLI::RequiredError("target");
    run(*arguments);
  });
  return arguments;
}

}  // namespace quantal::tools
