// Layout of a layer in a state dict (mlx 0.32.4), names after `<module>.`:
//
//   weight   uint32 [..., cols * bits / 32]: a row is a little-endian string of bits, element i in
//            bits [i * bits, (i + 1) * bits)
//   scales   affine: the weights' dtype; floating modes: uint8. [..., cols / group_size]
//   biases   affine only: dtype and shape of scales
//
// A weight has two dimensions, or three where experts are stacked. The bias of a linear layer is an
// ordinary tensor, `<module>.bias`.
#include "formats/mlx/mlx_checkpoint.h"

#include "formats/mlx/mlx_bits.h"
#include "formats/tensors.h"

namespace quantal::mlx {
namespace {

constexpr std::string_view kWhere = "mlx";

[[noreturn]] void refuse(Errc code, const std::string& name, const std::string& text) {
  fail(code, std::string(kWhere) + ": " + text, {.path = {}, .tensor = name});
}

std::string pair_name(int bits, std::int64_t group_size) {
  return std::to_string(bits) + " bits, group " + std::to_string(group_size);
}

/// The tensors of one layer, with dtypes and ranks that agree.
struct Parts {
  std::string weight_name, scales_name, biases_name;
  const TensorView& weight;
  const TensorView& scales;
  const TensorView* biases;  ///< null in floating modes

  Parts(const std::string& prefix, const TensorLookup& lookup)
      : weight_name(prefix + "weight"),
        scales_name(prefix + "scales"),
        biases_name(prefix + "biases"),
        weight(require_tensor(lookup, weight_name, kWhere)),
        scales(require_tensor(lookup, scales_name, kWhere)),
        biases(lookup(biases_name)) {
    constexpr std::array<DType, 1> kPacked = {DType::kU32};
    constexpr std::array<DType, 1> kBytes = {DType::kU8};
    constexpr std::array<DType, 3> kFloats = {DType::kF32, DType::kF16, DType::kBF16};
    require_dtype(weight, weight_name, kWhere, kPacked);
    if (weight.shape.size() != 2 && weight.shape.size() != 3) {
      refuse(Errc::kUnsupported, weight_name,
             "weight has shape " + shape_string(weight.shape) + ", expected 2 or 3 dimensions");
    }
    if (biases == nullptr) {
      require_dtype(scales, scales_name, kWhere, kBytes);
    } else {
      require_dtype(scales, scales_name, kWhere, kFloats);
      const std::array<DType, 1> same = {scales.dtype};
      require_dtype(*biases, biases_name, kWhere, same);
      if (biases->shape != scales.shape) {
        refuse(Errc::kShape, biases_name,
               "biases have shape " + shape_string(biases->shape) + ", expected that of scales, " +
                   shape_string(scales.shape));
      }
    }
    check_leading_dimensions();
  }

  std::int64_t packed_bits() const {
    return checked_mul(weight.shape.back(), 32, "mlx: bits of a row");
  }
  std::int64_t groups() const { return scales.shape.back(); }

 private:
  void check_leading_dimensions() const {
    std::vector<std::int64_t> expected = weight.shape;
    if (!scales.shape.empty()) expected.back() = scales.shape.back();
    if (scales.shape != expected || scales.numel() < 1 || weight.numel() < 1) {
      refuse(Errc::kShape, scales_name,
             "scales have shape " + shape_string(scales.shape) + ", expected one row per row of " +
                 shape_string(weight.shape));
    }
  }
};

/// Width and group size of a layer whose file says nothing about them: every legal pair with bits *
/// group_size = packed bits / groups, narrowed by the columns of the weight if these are known.
Settings deduce(const Parts& parts, const LayerFacts& facts) {
  const std::int64_t row_bits = parts.packed_bits(), groups = parts.groups();
  std::vector<Settings> found;
  const auto consider = [&](const ModeFacts& mode, int bits, std::int64_t group_size) {
    const std::int64_t cols = row_bits / bits;
    if (row_bits % bits != 0 || cols % group_size != 0 || cols / group_size != groups) return;
    if (!facts.weight_shape.empty() && facts.weight_shape.back() != cols) return;
    found.push_back({&mode, bits, group_size});
  };
  for (const ModeFacts& mode : kModes) {
    if ((mode.mode == Mode::kAffine) != (parts.biases != nullptr)) continue;
    if (mode.mode != Mode::kAffine) {
      consider(mode, mode.bits, mode.group_size);
      continue;
    }
    for (const int bits : kBits) {
      for (const std::int64_t size : kGroupSizes) consider(mode, bits, size);
    }
  }
  if (found.size() == 1) return found.front();
  const std::string shapes = "weight " + shape_string(parts.weight.shape) + " and scales " +
                             shape_string(parts.scales.shape);
  if (found.empty()) {
    refuse(Errc::kShape, parts.weight_name, shapes + " fit no width and group size of this format");
  }
  std::string candidates;
  for (const Settings& s : found) {
    candidates += (candidates.empty() ? "" : "; ") + pair_name(s.bits, s.group_size);
  }
  refuse(Errc::kCorrupt, parts.weight_name,
         "bits and group_size are not given (config.json \"quantization\" or mlx_config.json is "
         "missing), and " +
             shapes + " fit several: " + candidates +
             "; expected these settings or the shape of the weight");
}

/// Columns of the weight; throws unless tensors and settings agree.
std::int64_t columns(const Parts& parts, const Settings& settings) {
  const bool affine = settings.mode->mode == Mode::kAffine;
  if (affine != (parts.biases != nullptr)) {
    refuse(Errc::kCorrupt, parts.biases_name,
           std::string("biases are ") + (affine ? "missing" : "present") + " in mode " +
               std::string(settings.mode->name));
  }
  const std::int64_t row_bits = parts.packed_bits();
  const std::int64_t cols = row_bits / settings.bits;
  if (row_bits % settings.bits != 0 || cols % settings.group_size != 0 ||
      cols / settings.group_size != parts.groups()) {
    refuse(Errc::kShape, parts.scales_name,
           "weight has shape " + shape_string(parts.weight.shape) + " and scales " +
               shape_string(parts.scales.shape) + ", expected sizes of " +
               pair_name(settings.bits, settings.group_size));
  }
  return cols;
}

void check_known_shape(const Parts& parts, const PackedSpec& spec, const LayerFacts& facts) {
  if (facts.weight_shape.empty()) return;
  const std::int64_t numel = checked_numel(facts.weight_shape, "mlx: shape of the weight");
  if (facts.weight_shape.back() == spec.cols && numel == spec.rows * spec.cols) return;
  refuse(Errc::kShape, parts.weight_name,
         "weight unpacks to [" + std::to_string(spec.rows) + ", " + std::to_string(spec.cols) +
             "], expected " + shape_string(facts.weight_shape));
}

}  // namespace

std::vector<NamedTensor> export_layer(const PackedView& w, const std::string& prefix) {
  const PackedSpec& spec = w.spec;
  const PackedLayout layout = layout_of(spec);
  const std::int64_t row_bytes = spec.cols / 8 * spec.bits, experts = experts_of(spec);
  const auto shape_of = [&](std::int64_t last) -> std::vector<std::int64_t> {
    if (experts == 0) return {spec.rows, last};
    return {experts, spec.rows / experts, last};
  };
  Tensor weight = make_tensor(DType::kU32, shape_of(row_bytes / 4));
  std::vector<std::uint8_t> row(static_cast<std::size_t>(spec.cols));
  for (std::int64_t r = 0; r < spec.rows; ++r) {
    unpack_row(spec.bits, w.codes.data() + r * layout.code_bytes, spec.cols, row.data());
    pack_bits(spec.bits, row.data(), spec.cols, weight.bytes.data() + r * row_bytes);
  }
  const bool affine = mode_of(spec).mode == Mode::kAffine;
  const DType stored = affine ? spec.value_dtype : DType::kU8;
  const GatheredStats stats = gather_stats(w);
  std::vector<NamedTensor> out;
  out.push_back({prefix + "weight", std::move(weight)});
  out.push_back({prefix + "scales", tensor_of(stored, shape_of(layout.slots), stats.scales)});
  if (affine) {
    out.push_back({prefix + "biases", tensor_of(stored, shape_of(layout.slots), stats.offsets)});
  }
  return out;
}

bool recognizes(const std::function<bool(const std::string& suffix)>& has) {
  return has("weight") && has("scales");
}

StoredLayer open_layer(const std::string& prefix, const TensorLookup& lookup,
                       const LayerFacts& facts) {
  const LayerSettings given = parse_layer_settings(facts.settings);
  const Parts parts(prefix, lookup);
  if (!given.quantized) {
    refuse(Errc::kCorrupt, parts.scales_name,
           "layer has scales, but the config says that it is not quantized (false)");
  }
  const Settings settings = given.settings ? *given.settings : deduce(parts, facts);
  const std::int64_t cols = columns(parts, settings);
  const std::int64_t rows = parts.weight.numel() / parts.weight.shape.back();
  const bool affine = parts.biases != nullptr;
  PackedSpec spec = spec_of(rows, cols, settings, affine ? parts.scales.dtype : given.value_dtype);
  if (parts.weight.shape.size() == 3) spec.dialect_flags = parts.weight.shape.front();
  check_known_shape(parts, spec, facts);

  StoredLayer layer;
  layer.spec = spec;
  layer.read_codes = [spec, bytes = parts.weight.bytes](RowRange of, std::uint8_t* out) {
    const std::int64_t row_bytes = spec.cols / 8 * spec.bits;
    pack_rows(spec, of, out, [&](std::int64_t r, std::uint8_t* codes) {
      unpack_bits(spec.bits, bytes.data() + r * row_bytes, spec.cols, codes);
    });
  };
  layer.read_stats = [spec, scales = parts.scales.bytes.data(),
                      biases = affine ? parts.biases->bytes.data() : nullptr](RowRange of,
                                                                              std::uint8_t* out) {
    spread_rows(spec, {.scales = scales, .offsets = biases}, of, out);
  };
  return layer;
}

}  // namespace quantal::mlx
