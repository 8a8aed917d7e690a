// Where a conversion leads: open options filled in from the source, and names of forms.
#include <algorithm>
#include <numeric>

#include "formats/bnb/bnb_params.h"
#include "formats/transcode_rules.h"
#include "quantal/ggml.h"

namespace quantal::transcoding {
namespace {

constexpr std::string_view kBnb = "bnb", kMlx = "mlx", kQuanto = "quanto", kGguf = "gguf";

bool is_codebook(CodeMap map) {
  return map == CodeMap::kNf4 || map == CodeMap::kFp4 || map == CodeMap::kTable;
}

/// The narrowest width of the dialect that holds `bits`, else its widest.
int nearest_bits(const Dialect& dialect, int bits) {
  int best = 0;
  for (const int b : dialect.bits) {
    if (b >= bits && (best < bits || b < best)) best = b;
    if (b < bits && best < bits) best = std::max(best, b);
  }
  return best == 0 ? bits : best;
}

/// The method of the dialect for this width; NONE where no name implies it.
QuantizationMethod method_for(const Dialect& dialect, int bits, QuantizationMethod asked) {
  const auto fits = [&](QuantizationMethod m) { return method_bits(m).value_or(bits) == bits; };
  const auto& all = dialect.methods;
  if (std::find(all.begin(), all.end(), asked) != all.end() && fits(asked)) return asked;
  for (const QuantizationMethod m : all) {
    if (fits(m)) return m;
  }
  return QuantizationMethod::NONE;
}

/// The block type that holds the source's codes.
std::string ggml_mode(const PackedSpec& from, int bits) {
  const bool offsets = stores_offsets(from.offset);
  if (from.code_map == CodeMap::kE2M1) return "Q5_0";
  if (from.code_map == CodeMap::kIq4Nl || bits == 8) return "Q8_0";
  if (from.code_map != CodeMap::kInteger) return from.cols % 256 == 0 ? "Q4_K" : "Q4_1";
  if (bits == 6) return "Q6_K";
  if (bits == 5) return offsets ? "Q5_1" : "Q5_0";
  return offsets ? "Q4_1" : "Q4_0";
}

std::string mlx_mode(const PackedSpec& from) {
  if (from.code_map == CodeMap::kE2M1) {
    return from.scale == ScaleSource::kE4M3 ? "nvfp4" : "mxfp4";
  }
  return from.code_map == CodeMap::kE4M3 && from.scale == ScaleSource::kE8M0 ? "mxfp8" : "";
}

/// The source's group size, or the largest legal one that splits it, or the smallest above it.
std::int64_t group_for(const PackedSpec& from, const Dialect& dialect) {
  const auto& legal = dialect.group_sizes;
  if (legal.empty()) {
    const bool rows = from.group_map == GroupMap::kRowRuns && from.group_size == from.cols;
    return rows || from.group_size % dialect.group_multiple != 0 ? 0 : from.group_size;
  }
  std::int64_t best = 0;
  for (const std::int64_t g : legal) {
    if (from.group_size % g == 0) best = std::max(best, g);
  }
  if (best != 0) return best;
  for (const std::int64_t g : legal) {
    if (g > from.group_size && (best == 0 || g < best)) best = g;
  }
  return best == 0 ? *std::max_element(legal.begin(), legal.end()) : best;
}

/// Facts of the source that a writer of the same dialect needs and that no option names.
void carry_facts(const PackedSpec& from, const QuantizeOptions& asked, PackedSpec& to) {
  if (from.dialect != to.dialect) return;
  const std::string_view dialect = dialect_by_id(from.dialect).name;
  PackedSpec same = to;
  same.dialect_flags = from.dialect_flags;
  same.residue_bytes = from.residue_bytes;
  same.value_dtype = from.value_dtype;
  if (dialect == kMlx || (same == from && dialect != kBnb)) {
    to.dialect_flags = from.dialect_flags;
    to.residue_bytes = from.residue_bytes;
  } else if (dialect == kBnb && from.bits == to.bits) {
    bnb::Flags flags = bnb::Flags::from_int(from.dialect_flags);
    const bnb::Flags wanted = bnb::Flags::from_int(to.dialect_flags);
    if (!asked.mode.empty()) flags.storage = wanted.storage;
    if (flags.fp4 != wanted.fp4) {
      flags.fp4 = wanted.fp4;
      flags.pad = 0;
    } else if (from.code_map == CodeMap::kTable) {
      to.code_map = CodeMap::kTable;
    }
    to.dialect_flags = flags.to_int();
    to.residue_bytes = from.residue_bytes;  // the shape, where it has not two dimensions
  }
}

std::string dtype_word(const PackedSpec& spec) { return std::string(dtype_name(spec.value_dtype)); }

std::string group_word(const PackedSpec& spec) {
  if (spec.group_map == GroupMap::kRowRuns && spec.group_size == spec.cols) return ", by row";
  const bool columns = spec.group_map != GroupMap::kRowRuns;
  return ", group " + std::to_string(spec.group_size) + (columns ? " of columns" : "");
}

std::string bnb_name(const PackedSpec& spec) {
  if (bnb::is_int8(spec)) return "int8";
  const bnb::Flags flags = bnb::Flags::from_int(spec.dialect_flags);
  std::string name = flags.fp4 ? "fp4" : "nf4";
  if (spec.code_map == CodeMap::kTable) name += " with its own table";
  name += ", block " + std::to_string(spec.group_size);
  if (spec.scale == ScaleSource::kNestedU8) name += ", nested";
  if (flags.storage != DType::kU8) {
    name += ", stored as " + std::string(dtype_name(flags.storage));
  }
  return name + ", " + dtype_word(spec);
}

}  // namespace

QuantizeOptions target_options(const PackedSpec& from, const TranscodeTarget& to) {
  QuantizeOptions o = to.options;
  if (to.dialect == nullptr) fail(Errc::kConfig, "transcode: no target dialect is given");
  const Dialect& dialect = *to.dialect;
  const bool same = from.dialect == dialect.id;
  if (o.mode.empty() && o.bits == 0) {
    if (dialect.name == kMlx) o.mode = mlx_mode(from);
  }
  if (o.bits == 0) {
    const bool implied = std::find(dialect.methods.begin(), dialect.methods.end(), o.method) !=
                             dialect.methods.end() &&
                         o.method != QuantizationMethod::BNB_NF4;
    o.bits = implied ? method_bits(o.method).value_or(nearest_bits(dialect, from.bits))
                     : nearest_bits(dialect, from.bits);
    if (o.mode == "mxfp4" || o.mode == "nvfp4") o.bits = 4;
    if (o.mode == "mxfp8") o.bits = 8;
    if (dialect.name == kBnb && (is_codebook(from.code_map) || from.bits < 8)) o.bits = 4;
  }
  if (dialect.name == kGguf && o.mode.empty()) {
    const bool keep = same && o.bits == from.bits;
    o.mode = keep ? std::string(ggml_block(ggml_type_of(from)).name) : ggml_mode(from, o.bits);
  }
  o.method = method_for(dialect, o.bits, o.method);
  if (o.quant_type.empty()) {
    const bool fp4 =
        same ? bnb::Flags::from_int(from.dialect_flags).fp4 : from.code_map == CodeMap::kFp4;
    o.quant_type = dialect.name == kBnb && fp4 ? "fp4" : "nf4";
  }
  if (o.group_size == 0) {
    o.group_size =
        o.mode == "mxfp4" || o.mode == "nvfp4" || o.mode == "mxfp8" ? 0 : group_for(from, dialect);
  }
  return o;
}

PackedSpec target_spec(const PackedSpec& from, const TranscodeTarget& to) {
  const QuantizeOptions options = target_options(from, to);
  // Blocks stay as they are, also those that no encoder here writes.
  if (from.dialect == to.dialect->id && to.dialect->name == kGguf &&
      options.mode == ggml_block(ggml_type_of(from)).name) {
    return from;
  }
  PackedSpec spec = to.dialect->make_spec(from.rows, from.cols, options);
  carry_facts(from, to.options, spec);
  validate_spec(spec);
  return spec;
}

std::string form_name(const PackedSpec& spec) {
  const std::string dialect(dialect_by_id(spec.dialect).name);
  if (dialect == kBnb) return dialect + " " + bnb_name(spec);
  if (dialect == kGguf) {
    return dialect + " " + std::string(ggml_block(ggml_type_of(spec)).name);
  }
  std::string name = dialect + " ";
  if (dialect == kMlx && spec.code_map != CodeMap::kInteger) {
    name += mlx_mode(spec).empty() ? "float" : mlx_mode(spec);
  } else if (spec.code_map == CodeMap::kE4M3 || spec.code_map == CodeMap::kE5M2) {
    name += spec.code_map == CodeMap::kE4M3 ? "float8 e4m3" : "float8 e5m2";
  } else {
    name += std::to_string(spec.bits) + "-bit";
  }
  if (dialect == kQuanto && spec.offset == Offset::kZeroPoint) name += " zero-point";
  return name + group_word(spec) + ", " + dtype_word(spec);
}

}  // namespace quantal::transcoding
