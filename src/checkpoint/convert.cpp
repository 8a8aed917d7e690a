#include <algorithm>
#include <cmath>
#include <filesystem>
#include <utility>

#include "checkpoint/companions.h"
#include "checkpoint/convert_plan.h"
#include "checkpoint/json.h"
#include "checkpoint/layouts.h"
#include "checkpoint/model_writer.h"
#include "checkpoint/reader.h"

namespace quantal {
namespace {

using checkpoint::Action;
using checkpoint::ModelReader;
using checkpoint::ModelWriter;
using checkpoint::Step;

/// Elements that an error measurement holds at a time.
constexpr std::int64_t kPanelElements = 1 << 18;

/// ||w - v||_F / ||v||_F of decoded rows against rows that `reference` provides.
template <class Reference>
double relative_error(const PackedView& w, const Reference& reference, const Executor& executor) {
  const std::int64_t cols = w.spec.cols;
  const std::int64_t step =
      std::max<std::int64_t>(1, kPanelElements / std::max<std::int64_t>(cols, 1));
  std::vector<float> decoded(static_cast<std::size_t>(step * cols)), expected(decoded.size());
  double difference = 0, norm = 0;
  for (std::int64_t row = 0; row < w.spec.rows; row += step) {
    const std::int64_t end = std::min(w.spec.rows, row + step);
    dequantize(w, {row, end, 0, cols}, DType::kF32, decoded.data(), cols, executor);
    reference(row, end, expected.data());
    for (std::int64_t i = 0; i < (end - row) * cols; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const double delta = static_cast<double>(decoded[at]) - static_cast<double>(expected[at]);
      difference += delta * delta;
      norm += static_cast<double>(expected[at]) * static_cast<double>(expected[at]);
    }
  }
  return norm == 0 ? (difference == 0 ? 0 : HUGE_VAL) : std::sqrt(difference / norm);
}

/// Carries out the steps of one conversion.
class Conversion {
 public:
  Conversion(const ModelReader& reader, ModelWriter& writer, const ConvertOptions& options)
      : reader_(reader),
        writer_(writer),
        options_(options),
        executor_(options.executor != nullptr ? *options.executor : serial_executor()) {}

  void run(Step& step) {
    try {
      switch (step.action) {
        case Action::kCopy:
          return copy(step);
        case Action::kKeep:
          return writer_.add_layer(step.module, reader_.read_layer(step.name));
        case Action::kTranscode:
          return transcode_layer(step);
        case Action::kQuantize:
          return quantize_weight(step);
        case Action::kDecode:
          return decode(step);
      }
    } catch (const Error& e) {
      if (!e.site().tensor.empty()) throw;
      throw checkpoint::with_context("convert: \"" + step.name + "\": ", e);
    }
  }

 private:
  void copy(const Step& step) {
    // Mapped bytes stay until the end; a copy would have to be kept, so it goes to disk.
    writer_.add_tensor(step.name, reader_.lend_tensor(step.name).view, false);
  }

  void transcode_layer(Step& step) {
    Transcoded made = [&] {
      const PackedMatrix source = reader_.read_layer(step.name);
      return transcode(source.view(), step.target, executor_);
    }();
    step.report.kept = std::move(made.kept);
    step.report.relative_error = made.relative_error;
    step.report.to = describe_form(made.matrix.spec);
    writer_.add_layer(step.module, std::move(made.matrix));
  }

  void quantize_weight(Step& step) {
    const HeldTensor weight = reader_.lend_tensor(step.name);
    PackedMatrix made = quantize(weight.view, *step.target.dialect, step.target.options, executor_);
    const auto cols = static_cast<std::size_t>(made.spec.cols);
    const std::size_t size = dtype_size(weight.view.dtype);
    step.report.relative_error = relative_error(
        made.view(),
        [&](std::int64_t begin, std::int64_t end, float* out) {
          widen_to_f32(weight.view.dtype,
                       weight.view.bytes.data() + static_cast<std::size_t>(begin) * cols * size,
                       (end - begin) * made.spec.cols, out);
        },
        executor_);
    writer_.add_layer(step.module, std::move(made));
  }

  void decode(Step& step) {
    const PackedMatrix layer = reader_.read_layer(step.name);
    const PackedSpec& spec = layer.spec;
    Tensor values = make_tensor(step.dense_dtype, {spec.rows, spec.cols});
    dequantize(layer.view(), {0, spec.rows, 0, spec.cols}, values.dtype, values.bytes.data(),
               spec.cols, executor_);
    if (!step.report.kept.values) {
      const auto row = static_cast<std::size_t>(spec.cols) * dtype_size(values.dtype);
      step.report.relative_error = relative_error(
          layer.view(),
          [&](std::int64_t begin, std::int64_t end, float* out) {
            widen_to_f32(values.dtype, values.bytes.data() + static_cast<std::size_t>(begin) * row,
                         (end - begin) * spec.cols, out);
          },
          executor_);
      step.report.kept.values = step.report.relative_error == 0;
    }
    writer_.add_tensor(step.name.empty() ? "weight" : step.name + ".weight", values.view(), false);
  }

  const ModelReader& reader_;
  ModelWriter& writer_;
  const ConvertOptions& options_;
  const Executor& executor_;
};

ConvertReport report_of(const std::vector<Step>& steps, const std::string& layout, bool measured) {
  ConvertReport report;
  report.layout = layout;
  report.measured = measured;
  for (const Step& step : steps) {
    if (step.action == Action::kCopy) {
      ++report.copied;
    } else {
      report.layers.push_back(step.report);
    }
  }
  return report;
}

std::unique_ptr<ModelReader> open_source(const std::string& path, const ConvertOptions& options) {
  LoadOptions load;
  load.executor = options.executor;
  auto reader = checkpoint::open_model(path, load);
  if (!reader->unread().empty()) fail(Errc::kUnsupported, reader->unread(), {.path = path});
  return reader;
}

/// The config of the source; a dense model's says what it was decoded to.
std::string config_of(const ModelReader& reader, const Dialect* target,
                      const ConvertOptions& options) {
  if (target != nullptr || !options.dense_dtype) return reader.config_json();
  auto config = checkpoint::parse_json_object(reader.config_json(), reader.folder());
  const char* key = config.contains("dtype") ? "dtype" : "torch_dtype";
  config[key] = dtype_torch_name(*options.dense_dtype);
  return checkpoint::dump_json(config);
}

/// A target inside or equal to the source would read what it writes.
void refuse_same(const std::string& from, const std::string& to) {
  std::error_code error;
  if (std::filesystem::equivalent(from, to, error) && !error) {
    fail(Errc::kConfig, "convert: target is the source itself, expected another path",
         {.path = to});
  }
}

/// The dialect that the written layers have; dense where none is quantized.
const Dialect* written_dialect(const std::vector<Step>& steps, const Dialect* target) {
  const bool any = std::any_of(steps.begin(), steps.end(), [](const Step& step) {
    return step.action != Action::kCopy && step.action != Action::kDecode;
  });
  return any ? target : nullptr;
}

}  // namespace

ConvertReport plan_convert(const std::string& from, const ConvertOptions& options,
                           const std::string& to_path) {
  const Dialect* target = checkpoint::convert_target(options.to);
  const auto reader = open_source(from, options);
  const std::vector<Step> steps = checkpoint::plan_steps(*reader, target, options);
  const Dialect* written = written_dialect(steps, target);
  const FileLayout& layout = checkpoint::choose_layout(written, options.save.layout, to_path);
  return report_of(steps, checkpoint::full_name(written, layout), false);
}

ConvertReport convert(const std::string& from, const std::string& to_path,
                      const ConvertOptions& options) {
  refuse_same(from, to_path);
  const Dialect* target = checkpoint::convert_target(options.to);
  const auto reader = open_source(from, options);
  std::vector<Step> steps = checkpoint::plan_steps(*reader, target, options);
  ModelWriter writer(to_path, written_dialect(steps, target), options.save);
  Conversion conversion(*reader, writer, options);
  const std::int64_t total = std::ssize(steps);
  for (std::int64_t done = 0; done < total; ++done) {
    Step& step = steps[static_cast<std::size_t>(done)];
    if (options.progress) options.progress(done, total, step.name);
    conversion.run(step);
  }
  if (options.progress) options.progress(total, total, "");
  SideTexts texts = reader->texts();
  if (!reader->folder().empty()) {
    checkpoint::add_tokenizer_texts(reader->folder(), texts);
    for (const auto& [path, name] : checkpoint::companions_of(reader->folder())) {
      writer.add_companion(path, name);
    }
  }
  writer.commit(config_of(*reader, target, options), {}, texts);
  return report_of(steps, checkpoint::full_name(written_dialect(steps, target), writer.layout()),
                   true);
}

}  // namespace quantal
