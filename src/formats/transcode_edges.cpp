// The table of conversions between the common forms of all dialects.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "formats/transcode_rules.h"
#include "quantal/ggml.h"

namespace quantal {
namespace {

using namespace transcoding;  // NOLINT: the parts of this file

using M = QuantizationMethod;

constexpr std::int64_t kRows = 32;
/// Rows that hold every block; and rows for which Quanto's group rule gives 32.
constexpr std::int64_t kCols = 512, kColsOfGroup32 = 160;

/// A form by its dialect and options.
struct Form {
  std::string_view dialect;
  QuantizeOptions options;
  bool group32_rule = false;  ///< Quanto where its rule gives 32
};

QuantizeOptions options(M method, int bits, std::int64_t group, DType dtype,
                        const char* mode = "") {
  QuantizeOptions o;
  o.method = method;
  o.bits = bits;
  o.group_size = group;
  o.value_dtype = dtype;
  o.mode = mode;
  return o;
}

QuantizeOptions bnb(const char* type, std::int64_t block, bool nested, DType dtype,
                    const char* storage = "") {
  QuantizeOptions o = options(M::BNB_NF4, 4, block, dtype, storage);
  o.quant_type = type;
  o.double_quant = nested;
  return o;
}

Form gguf(const char* type) { return {"gguf", options(M::NONE, 0, 0, DType::kF32, type)}; }
Form mlx(int bits, std::int64_t group, DType dtype) {
  return {"mlx", options(M::NONE, bits, group, dtype)};
}
Form mlx(const char* mode) { return {"mlx", options(M::NONE, 0, 0, DType::kBF16, mode)}; }
Form hqq(int bits, std::int64_t group, DType dtype) {
  return {"hqq", options(M::HQQ, bits, group, dtype)};
}

/// Forms that conversions start from.
std::vector<Form> sources() {
  return {gguf("Q4_0"),
          gguf("Q4_1"),
          gguf("Q5_0"),
          gguf("Q5_1"),
          gguf("Q8_0"),
          gguf("Q2_K"),
          gguf("Q3_K"),
          gguf("Q4_K"),
          gguf("Q5_K"),
          gguf("Q6_K"),
          gguf("IQ4_NL"),
          mlx(4, 32, DType::kF32),
          mlx(4, 64, DType::kBF16),
          mlx(4, 64, DType::kF16),
          mlx(8, 64, DType::kBF16),
          mlx("mxfp4"),
          mlx("nvfp4"),
          mlx("mxfp8"),
          {"quanto", options(M::QUANTO_INT4, 4, 0, DType::kF32), true},
          {"quanto", options(M::QUANTO_INT4, 4, 0, DType::kBF16)},
          {"quanto", options(M::QUANTO_INT2, 2, 0, DType::kBF16)},
          {"quanto", options(M::QUANTO_INT8, 8, 0, DType::kF32)},
          {"quanto", options(M::QUANTO_INT8, 8, 0, DType::kBF16)},
          hqq(4, 32, DType::kF32),
          hqq(4, 64, DType::kF16),
          hqq(8, 64, DType::kF16),
          {"bnb", bnb("nf4", 64, false, DType::kBF16)},
          {"bnb", bnb("nf4", 128, true, DType::kBF16)},
          {"bnb", bnb("fp4", 64, false, DType::kBF16)},
          {"bnb", options(M::BNB_INT8, 8, 0, DType::kF32)}};
}

/// Options of targets that take bits and groups from the source.
std::vector<Form> open_targets() {
  std::vector<Form> out;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    out.push_back({"mlx", options(M::NONE, 0, 0, dtype)});
  }
  out.push_back({"quanto", options(M::NONE, 0, 0, DType::kF32)});
  out.push_back({"quanto", options(M::NONE, 0, 0, DType::kBF16)});
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    out.push_back({"hqq", options(M::HQQ, 0, 0, dtype)});
  }
  out.push_back(gguf(""));
  out.push_back({"bnb", bnb("", 0, false, DType::kF32)});
  return out;
}

/// Targets of one source beyond the open ones.
std::vector<Form> special_targets(const PackedSpec& from) {
  std::vector<Form> out;
  if (from.code_map == CodeMap::kE2M1) {
    out.push_back(mlx(5, 32, DType::kF32));
    out.push_back(hqq(8, from.group_size, DType::kBF16));
  }
  if (from.code_map == CodeMap::kIq4Nl) {
    out.push_back(mlx(8, 32, DType::kF32));
    out.push_back(hqq(8, 32, DType::kF32));
    out.push_back(gguf("Q8_0"));
  }
  if (from.code_map == CodeMap::kInteger && from.bits == 4 && from.group_size == 32) {
    out.push_back({"quanto", options(M::QUANTO_INT4, 4, 0, DType::kF32), true});
    out.push_back({"quanto", options(M::QUANTO_INT4, 4, 0, DType::kF32, "zeropoint"), true});
  }
  if (from.bits == 6) out.push_back(hqq(8, 16, DType::kF32));
  if (from.bits == 8 && from.offset == Offset::kNone) {
    out.push_back({"bnb", options(M::BNB_INT8, 8, 0, DType::kF32)});
  }
  if (from.offset == Offset::kOver127) {
    out.push_back({"quanto", options(M::QUANTO_INT8, 8, 0, DType::kF32)});
  }
  if (dialect_by_id(from.dialect).name == "bnb" && from.bits == 4) {
    const bool nested = from.scale == ScaleSource::kNestedU8;
    const bool fp4 = from.code_map == CodeMap::kFp4;
    const auto own = [&](const char* type, std::int64_t block, bool twice, const char* storage) {
      out.push_back({"bnb", bnb(type, block, twice, from.value_dtype, storage)});
    };
    own("", 0, nested, "bfloat16");
    own("", from.group_size / 2, nested, "");
    own("", from.group_size * 2, nested, "");
    own("", 0, !nested, "");
    own(fp4 ? "nf4" : "fp4", 0, nested, "");
  }
  return out;
}

PackedSpec source_spec(const Form& form, std::int64_t cols) {
  if (form.dialect == "gguf") {  // also the types that no encoder here writes
    return ggml_spec(find_ggml_block(form.options.mode)->type, kRows, cols);
  }
  return dialect_by_name(form.dialect).make_spec(kRows, cols, form.options);
}

// ------------------------------------------------------------------ measured errors

/// Uniform 32-bit numbers, xorshift64*.
class Numbers {
 public:
  std::uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<std::uint32_t>((state_ * 0x2545F4914F6CDD1DULL) >> 32);
  }
  /// About normal: the sum of twelve uniform numbers, variance 1. Exact in float32.
  float normal() {
    std::int64_t sum = 0;
    for (int i = 0; i < 12; ++i) sum += next() >> 12;
    return static_cast<float>(static_cast<double>(sum - 6 * (std::int64_t{1} << 20)) * 0x1p-20);
  }

 private:
  std::uint64_t state_ = 0x9E3779B97F4A7C15ULL;
};

/// The error of quantizing normal weights of the source's form again, as text; empty where the
/// source cannot be made here.
std::string measured_error(const transcoding::EdgeForms& forms) {
  if (!forms.encodable) return "";
  const std::int64_t cols = forms.from.cols;
  Tensor weights = make_tensor(DType::kF32, {kRows, cols});
  Numbers numbers;
  for (std::int64_t i = 0; i < kRows * cols; ++i) {
    const float value = 0.02F * numbers.normal();
    std::memcpy(weights.bytes.data() + 4 * i, &value, sizeof(value));
  }
  const PackedMatrix w =
      quantize(weights.view(), dialect_by_id(forms.from.dialect), forms.from_options);
  const Transcoded result = transcode(w.view(), forms.to, serial_executor());
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.2g", result.relative_error);
  return "; relative error " + std::string(text.data()) + " on normal weights";
}

/// nullopt for a pair without blocks of its rows, and for a form to itself.
std::optional<transcoding::EdgeForms> forms_of(const Form& from, const Form& to) {
  const std::int64_t cols = from.group32_rule || to.group32_rule ? kColsOfGroup32 : kCols;
  if (from.dialect == "gguf" && cols % find_ggml_block(from.options.mode)->elements != 0) {
    return std::nullopt;
  }
  EdgeForms forms;
  forms.from = source_spec(from, cols);
  forms.to.dialect = &dialect_by_name(to.dialect);
  forms.to.options = to.options;
  forms.encodable =
      from.dialect != "gguf" || ggml_encodable(find_ggml_block(from.options.mode)->type);
  forms.from_options = from.options;
  if (target_spec(forms.from, forms.to) == forms.from) return std::nullopt;
  return forms;
}

std::string statistics_word(const Preservation& p) {
  if (!p.codes) return "no";
  if (p.statistics) return "exact";
  std::array<char, 16> text{};
  std::snprintf(text.data(), text.size(), "%.3g ulp", p.statistics_ulp);
  return text.data();
}

}  // namespace

namespace transcoding {

std::vector<EdgeForms> edge_forms() {
  std::vector<EdgeForms> out;
  for (const Form& from : sources()) {
    std::vector<Form> targets = open_targets();
    const PackedSpec spec = source_spec(from, from.group32_rule ? kColsOfGroup32 : kCols);
    for (const Form& special : special_targets(spec)) targets.push_back(special);
    for (const Form& to : targets) {
      if (std::optional<EdgeForms> forms = forms_of(from, to)) out.push_back(std::move(*forms));
    }
  }
  return out;
}

}  // namespace transcoding

std::vector<TranscodeEdge> transcode_edges() {
  std::vector<TranscodeEdge> edges;
  for (const EdgeForms& forms : edge_forms()) {
    TranscodeEdge edge{form_name(forms.from), form_name(target_spec(forms.from, forms.to)),
                       plan_transcode(forms.from, forms.to)};
    const auto same = [&](const TranscodeEdge& e) {
      return e.from == edge.from && e.to == edge.to;
    };
    if (std::any_of(edges.begin(), edges.end(), same)) continue;
    if (!edge.kept.codes) edge.kept.note += measured_error(forms);
    edges.push_back(std::move(edge));
  }
  return edges;
}

std::string transcode_edges_markdown() {
  std::string out =
      "| from | to | codes | statistics | values equal | how |\n|---|---|---|---|---|---|\n";
  for (const TranscodeEdge& e : transcode_edges()) {
    const bool waits = e.kept.note.find("depends on the values") != std::string::npos;
    const char* codes = !e.kept.codes ? "new" : waits ? "kept if" : "kept";
    out += "| " + e.from + " | " + e.to + " | " + codes + " | " + statistics_word(e.kept) + " | " +
           (e.kept.values ? "in " + std::string(dtype_name(e.kept.values_dtype)) : "no") + " | " +
           e.kept.note + " |\n";
  }
  return out;
}

}  // namespace quantal
