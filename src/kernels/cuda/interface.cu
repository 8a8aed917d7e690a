// The C interface: arguments are checked here, and exceptions become codes.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <optional>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/refusals.h"
#include "quantal/kernels.h"

namespace quantal::cuda {
namespace {

constexpr std::uintptr_t kAlignment = 16;

int code_of(Errc code) {
  switch (code) {
    case Errc::kConfig:
    case Errc::kCorrupt:
      return QUANTAL_CUDA_CONFIG;
    case Errc::kShape:
      return QUANTAL_CUDA_SHAPE;
    case Errc::kDtype:
      return QUANTAL_CUDA_DTYPE;
    case Errc::kUnsupported:
      return QUANTAL_CUDA_UNSUPPORTED;
    case Errc::kDevice:
      return QUANTAL_CUDA_DEVICE;
    default:
      return QUANTAL_CUDA_INTERNAL;
  }
}

int report(quantal_cuda_status* status, int code, const char* text) noexcept {
  if (status != nullptr) {
    status->code = code;
    std::snprintf(status->text, sizeof(status->text), "%s", text);
  }
  return code;
}

/// Runs `body` and turns what it throws into a code.
template <class Body>
int guarded(quantal_cuda_status* status, Body body) noexcept {
  try {
    body();
    return report(status, QUANTAL_CUDA_OK, "");
  } catch (const CudaFailure& failure) {
    return report(status, QUANTAL_CUDA_FAILED, failure.text.c_str());
  } catch (const Error& error) {
    return report(status, code_of(error.code()), error.what());
  } catch (const std::exception& error) {
    return report(status, QUANTAL_CUDA_INTERNAL, error.what());
  }
}

[[noreturn]] void refuse(const char* where, const std::string& why) {
  fail(Errc::kUnsupported, std::string("cuda ") + where + ": " + why);
}

FloatKind kind_of(const char* where, const char* what, quantal_cuda_dtype dtype) {
  if (dtype >= 0 && dtype <= static_cast<int>(FloatKind::kBF16)) {
    return static_cast<FloatKind>(dtype);
  }
  fail(Errc::kDtype, std::string("cuda ") + where + ": " + what + " is number " +
                         std::to_string(dtype) + ", expected 0 (f32), 1 (f16) or 2 (bf16)");
}

void check_pointer(const char* where, const char* what, const void* p, std::uintptr_t alignment) {
  if (p != nullptr && reinterpret_cast<std::uintptr_t>(p) % alignment == 0) return;
  if (p == nullptr) {
    fail(Errc::kConfig, std::string("cuda ") + where + ": " + what + " is null, expected memory");
  }
  refuse(where, std::string(what) + " begins " +
                    std::to_string(reinterpret_cast<std::uintptr_t>(p) % alignment) +
                    " bytes behind a multiple of " + std::to_string(alignment) +
                    ", expected a multiple");
}

std::uintptr_t element_bytes(FloatKind kind) { return kind == FloatKind::kF32 ? 4 : 2; }

void check_count(const char* where, const char* what, std::int64_t n) {
  if (n >= 0) return;
  fail(Errc::kShape,
       std::string("cuda ") + where + ": " + what + " is " + std::to_string(n) + ", expected >= 0");
}

PackedView view_of(const quantal_cuda_matrix& w) {
  const auto bytes = [](const void* p, std::int64_t n) {
    if (n < 0) {
      fail(Errc::kShape, "cuda: bytes are " + std::to_string(n) + ", expected >= 0");
    }
    return std::span(static_cast<const std::uint8_t*>(p), static_cast<std::size_t>(n));
  };
  if (w.spec == nullptr) fail(Errc::kConfig, "cuda: spec is null, expected integers");
  return {spec_from_ints({w.spec, kSpecInts}), bytes(w.codes, w.codes_bytes),
          bytes(w.stats, w.stats_bytes), bytes(w.shared, w.shared_bytes)};
}

// ------------------------------------------------------------------ arguments

DequantizeArgs checked(const quantal_cuda_panel& p) {
  const char* where = "dequantize";
  DequantizeArgs a{};
  a.w = matrix_of(view_of(p.w));
  a.row = p.row;
  a.rows = p.rows;
  a.col = p.col;
  a.cols = p.cols;
  a.out_kind = kind_of(where, "dtype", p.dtype);
  a.out = p.out;
  a.ld = p.ld;
  const bool inside = p.row >= 0 && p.rows >= 0 && p.rows <= a.w.rows - p.row && p.col >= 0 &&
                      p.cols >= 0 && p.cols <= a.w.cols - p.col;
  if (!inside || p.col % kColumnUnit != 0 || p.ld < p.cols) {
    fail(Errc::kShape, "cuda dequantize: panel is " + std::to_string(p.rows) + " x " +
                           std::to_string(p.cols) + " from (" + std::to_string(p.row) + ", " +
                           std::to_string(p.col) + ") with ld " + std::to_string(p.ld) +
                           ", expected a part of " + std::to_string(a.w.rows) + " x " +
                           std::to_string(a.w.cols) + " from a multiple of " +
                           std::to_string(kColumnUnit) + " columns");
  }
  const std::uintptr_t element = element_bytes(a.out_kind);
  if (p.rows > 0 && p.cols > 0) check_pointer(where, "out", p.out, element);
  a.aligned = reinterpret_cast<std::uintptr_t>(p.out) % kAlignment == 0 &&
              static_cast<std::uintptr_t>(p.ld) * element % kAlignment == 0;
  return a;
}

/// What small_matmul and tile_matmul share.
template <class Args>
Args checked_product(const char* where, const quantal_cuda_product& p, std::int64_t rows) {
  Args a{};
  a.w = matrix_of(view_of(p.w));
  a.x = static_cast<const std::uint16_t*>(p.x);
  a.inputs = static_cast<decltype(a.inputs)>(p.inputs);
  a.bias_kind = kind_of(where, "bias_dtype", p.bias == nullptr ? 0 : p.bias_dtype);
  a.bias = p.bias;
  a.y = static_cast<std::uint16_t*>(p.y);
  if (p.inputs > 0 && rows > 0) {
    check_pointer(where, "x", p.x, kAlignment);
    check_pointer(where, "y", p.y, kAlignment);
    if (p.bias != nullptr) check_pointer(where, "bias", p.bias, element_bytes(a.bias_kind));
  }
  return a;
}

SmallArgs checked_small(const quantal_cuda_product& p) {
  const char* where = "small_matmul";
  check_count(where, "inputs", p.inputs);
  const PackedSpec spec = view_of(p.w).spec;
  const auto dtype = static_cast<DType>(kind_of(where, "dtype", p.dtype));
  if (const auto why = small_refusal(spec, dtype, p.inputs); !why.empty()) refuse(where, why);
  return checked_product<SmallArgs>(where, p, spec.rows);
}

TileArgs checked_tile(const quantal_cuda_product& p, bool transposed) {
  const char* where = transposed ? "tile_matmul_transposed" : "tile_matmul";
  check_count(where, "inputs", p.inputs);
  const PackedSpec spec = view_of(p.w).spec;
  const auto dtype = static_cast<DType>(kind_of(where, "dtype", p.dtype));
  if (const auto why = tile_refusal(spec, dtype, transposed); !why.empty()) refuse(where, why);
  if (transposed && p.bias != nullptr) refuse(where, "a bias is given, expected none");
  return checked_product<TileArgs>(where, p, spec.rows);
}

Int8Args checked_int8(const quantal_cuda_int8_product& p) {
  const char* where = "int8_matmul";
  check_count(where, "inputs", p.product.inputs);
  const PackedSpec spec = view_of(p.product.w).spec;
  if (const auto why = int8_refusal(spec, p.threshold); !why.empty()) refuse(where, why);
  Int8Args a{};
  a.w = matrix_of(view_of(p.product.w));
  a.kind = kind_of(where, "dtype", p.product.dtype);
  a.x = p.product.x;
  a.inputs = p.product.inputs;
  a.threshold = p.threshold;
  a.bias_kind = kind_of(where, "bias_dtype", p.product.bias == nullptr ? 0 : p.product.bias_dtype);
  a.bias = p.product.bias;
  a.y = p.product.y;
  a.ld = ceil_div(spec.cols, 16) * 16;
  const std::int64_t bytes = int8_workspace(a.inputs, spec.cols);
  if (p.workspace_bytes < bytes) {
    fail(Errc::kShape, "cuda int8_matmul: workspace has " + std::to_string(p.workspace_bytes) +
                           " bytes, expected at least " + std::to_string(bytes));
  }
  if (a.inputs > 0 && spec.rows > 0) {
    check_pointer(where, "x", a.x, element_bytes(a.kind));
    check_pointer(where, "y", a.y, element_bytes(a.kind));
    check_pointer(where, "workspace", p.workspace, kAlignment);
    if (a.bias != nullptr) check_pointer(where, "bias", a.bias, element_bytes(a.bias_kind));
    a.scratch = int8_scratch(p.workspace, a.inputs, spec.cols);
  }
  return a;
}

NormArgs checked(const quantal_cuda_norms& p) {
  NormArgs a{matrix_of(view_of(p.w)), p.out};
  if (a.w.rows > 0) check_pointer("row_square_sums", "out", p.out, 8);
  return a;
}

Quantizer quantizer_of(const quantal_cuda_quantizer& q) {
  Quantizer how;
  how.encoder = static_cast<Encoder>(q.encoder);
  std::copy(std::begin(q.thresholds), std::end(q.thresholds), how.thresholds);
  std::copy(std::begin(q.codes), std::end(q.codes), how.codes);
  std::copy(std::begin(q.values), std::end(q.values), how.values);
  how.least = q.least;
  how.not_a_number = q.not_a_number;
  how.tiny_range = q.tiny_range;
  how.largest_scale = q.largest_scale;
  how.round_zero = q.round_zero != 0;
  how.rounds = q.rounds;
  how.max_code = q.max_code;
  how.power = q.power;
  std::copy(std::begin(q.inverse_beta), std::end(q.inverse_beta), how.inverse_beta);
  std::copy(std::begin(q.no_shrink), std::end(q.no_shrink), how.no_shrink);
  std::copy(std::begin(q.nested_map), std::end(q.nested_map), how.nested_map);
  return how;
}

/// The members of QuantizeArgs that follow from the spec.
QuantizeArgs quantize_form(const PackedSpec& spec) {
  const PackedLayout layout = layout_of(spec);
  QuantizeArgs a{};
  a.rows = spec.rows;
  a.cols = spec.cols;
  a.group_size = spec.group_size;
  a.groups = ceil_div(spec.rows * spec.cols, spec.group_size);
  a.code_bytes = layout.code_bytes;
  a.stat_bytes = layout.stat_bytes;
  a.slots = layout.slots;
  a.nested_slots = layout.nested_slots;
  a.nested_group_size = spec.nested_group_size;
  a.bits = spec.bits;
  a.top = static_cast<float>((1 << spec.bits) - 1);
  a.centre = static_cast<float>(spec.centre);
  a.group_map = static_cast<GroupKind>(spec.group_map);
  a.scale_kind = static_cast<ScaleKind>(spec.scale);
  a.value_kind = static_cast<FloatKind>(spec.value_dtype);
  a.has_header = layout.has_header;
  a.has_offsets = stores_offsets(spec.offset);
  return a;
}

QuantizeArgs checked(const quantal_cuda_quantization& p) {
  const char* where = "quantize";
  const PackedView view = view_of(p.w);
  const Matrix m = matrix_of(view);  // sizes and alignment
  if (p.how == nullptr) fail(Errc::kConfig, "cuda quantize: how is null, expected a quantizer");
  QuantizeArgs a = quantize_form(view.spec);
  a.how = quantizer_of(*p.how);
  if (const auto why = quantize_refusal(view.spec, a.how); !why.empty()) refuse(where, why);
  if (a.how.max_code > 0) a.top = a.how.max_code;
  a.kind = kind_of(where, "dtype", p.dtype);
  a.converts = a.kind != a.value_kind && a.value_kind != FloatKind::kF32;
  a.converts = a.converts && rounds_weights(a.how.encoder);
  a.weight = p.weight;
  a.codes = const_cast<std::uint8_t*>(m.codes);
  a.stats = const_cast<std::uint8_t*>(m.stats);
  a.shared = static_cast<std::uint8_t*>(const_cast<void*>(p.w.shared));
  a.refused = p.refused;
  const std::int64_t bytes = quantize_workspace(view.spec);
  if (p.workspace_bytes < bytes) {
    fail(Errc::kShape, "cuda quantize: workspace has " + std::to_string(p.workspace_bytes) +
                           " bytes, expected at least " + std::to_string(bytes));
  }
  check_pointer(where, "refused", p.refused, 4);
  check_pointer(where, "workspace", p.workspace, kAlignment);
  if (a.rows > 0) check_pointer(where, "weight", p.weight, element_bytes(a.kind));
  a.scratch = quantize_scratch(p.workspace, view.spec);
  return a;
}

// ------------------------------------------------------------------ entries

int probe(std::int32_t device, quantal_cuda_status* status) {
  return guarded(status, [&] { check_device(device); });
}

/// Enqueues by body(Stream) on the device of the stream.
template <class Body>
int launch(const char* name, quantal_cuda_stream stream, quantal_cuda_status* status, Body body) {
  return guarded(status, [&] {
    const Stream on{stream.device, stream.handle};
    body(on, [&](auto enqueue) {
      OnDevice device(name, on);
      enqueue();
      device.finish();
    });
  });
}

int supports_dequantize(const quantal_cuda_panel* p, quantal_cuda_status* status) {
  return guarded(status, [&] { checked(*p); });
}
int dequantize_entry(const quantal_cuda_panel* p, quantal_cuda_stream stream,
                     quantal_cuda_status* status) {
  return launch("dequantize", stream, status, [&](Stream on, auto enqueue) {
    const DequantizeArgs args = checked(*p);
    enqueue([&] { dequantize(args, on); });
  });
}

int supports_small(const quantal_cuda_product* p, quantal_cuda_status* status) {
  return guarded(status, [&] { checked_small(*p); });
}
int small_entry(const quantal_cuda_product* p, quantal_cuda_stream stream,
                quantal_cuda_status* status) {
  return launch("small_matmul", stream, status, [&](Stream on, auto enqueue) {
    const SmallArgs args = checked_small(*p);
    enqueue([&] {
      p->dtype == static_cast<int>(FloatKind::kF16) ? small_matmul_f16(args, on)
                                                    : small_matmul_bf16(args, on);
    });
  });
}

int supports_tile(const quantal_cuda_product* p, quantal_cuda_status* status) {
  return guarded(status, [&] { checked_tile(*p, false); });
}
int supports_transposed(const quantal_cuda_product* p, quantal_cuda_status* status) {
  return guarded(status, [&] { checked_tile(*p, true); });
}
int tile_launch(const quantal_cuda_product* p, bool transposed, quantal_cuda_stream stream,
                quantal_cuda_status* status) {
  return launch("tile_matmul", stream, status, [&](Stream on, auto enqueue) {
    const TileArgs args = checked_tile(*p, transposed);
    enqueue([&] { tile_matmul(args, static_cast<FloatKind>(p->dtype), transposed, on); });
  });
}
int tile_entry(const quantal_cuda_product* p, quantal_cuda_stream stream,
               quantal_cuda_status* status) {
  return tile_launch(p, false, stream, status);
}
int transposed_entry(const quantal_cuda_product* p, quantal_cuda_stream stream,
                     quantal_cuda_status* status) {
  return tile_launch(p, true, stream, status);
}

int64_t int8_workspace_entry(int64_t inputs, int64_t cols) {
  std::int64_t bytes = -1;
  guarded(nullptr, [&] { bytes = int8_workspace(inputs, cols); });
  return bytes;
}
int supports_int8(const quantal_cuda_int8_product* p, quantal_cuda_status* status) {
  return guarded(status, [&] { checked_int8(*p); });
}
int int8_entry(const quantal_cuda_int8_product* p, quantal_cuda_stream stream,
               quantal_cuda_status* status) {
  return launch("int8_matmul", stream, status, [&](Stream on, auto enqueue) {
    const Int8Args args = checked_int8(*p);
    enqueue([&] { int8_matmul(args, on); });
  });
}

int supports_norms(const quantal_cuda_norms* p, quantal_cuda_status* status) {
  return guarded(status, [&] { checked(*p); });
}
int norms_entry(const quantal_cuda_norms* p, quantal_cuda_stream stream,
                quantal_cuda_status* status) {
  return launch("row_square_sums", stream, status, [&](Stream on, auto enqueue) {
    const NormArgs args = checked(*p);
    enqueue([&] { row_square_sums(args, on); });
  });
}

int64_t quantize_workspace_entry(const int64_t* spec) {
  std::int64_t bytes = -1;
  guarded(nullptr, [&] { bytes = quantize_workspace(spec_from_ints({spec, kSpecInts})); });
  return bytes;
}
int supports_quantization(const quantal_cuda_quantization* p, quantal_cuda_status* status) {
  return guarded(status, [&] { checked(*p); });
}
int quantize_entry(const quantal_cuda_quantization* p, quantal_cuda_stream stream,
                   quantal_cuda_status* status) {
  return launch("quantize", stream, status, [&](Stream on, auto enqueue) {
    const QuantizeArgs args = checked(*p);
    enqueue([&] { quantize(args, on); });
  });
}

constexpr quantal_cuda_interface kInterface = {
    .version = QUANTAL_CUDA_VERSION,
    .probe = probe,
    .supports_dequantize = supports_dequantize,
    .dequantize = dequantize_entry,
    .supports_small_matmul = supports_small,
    .small_matmul = small_entry,
    .supports_tile_matmul = supports_tile,
    .tile_matmul = tile_entry,
    .supports_tile_matmul_transposed = supports_transposed,
    .tile_matmul_transposed = transposed_entry,
    .int8_workspace = int8_workspace_entry,
    .supports_int8_matmul = supports_int8,
    .int8_matmul = int8_entry,
    .supports_row_square_sums = supports_norms,
    .row_square_sums = norms_entry,
    .quantize_workspace = quantize_workspace_entry,
    .supports_quantize = supports_quantization,
    .quantize = quantize_entry};

}  // namespace
}  // namespace quantal::cuda

extern "C" __attribute__((visibility("default"))) const quantal_cuda_interface* quantal_cuda(
    int32_t version) {
  return version == QUANTAL_CUDA_VERSION ? &quantal::cuda::kInterface : nullptr;
}
