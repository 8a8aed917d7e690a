// Forms of every dialect that weights are quantized to, for tests over all of them.
#pragma once

#include <cstdint>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "quantal/formats.h"

namespace quantal::testing {

/// A form that weights are quantized to, with a size at which its borders matter.
struct QuantizedForm {
  std::string name;
  std::string dialect;
  QuantizeOptions options;
  std::int64_t rows, cols;
  bool exchanges;  ///< ranks that quantize parts have to talk
};

inline std::ostream& operator<<(std::ostream& out, const QuantizedForm& form) {
  return out << form.name;
}

inline QuantizeOptions form_options(QuantizationMethod method, int bits, std::int64_t group) {
  QuantizeOptions o;
  o.method = method;
  o.bits = bits;
  o.group_size = group;
  o.value_dtype = DType::kBF16;
  return o;
}

/// Collects forms.
class FormTable {
 public:
  void add(std::string name, std::string dialect, QuantizeOptions o, std::int64_t rows,
           std::int64_t cols, bool exchanges) {
    all.push_back({std::move(name), std::move(dialect), o, rows, cols, exchanges});
  }
  std::vector<QuantizedForm> all;
};

inline void add_bnb(FormTable& out) {
  using M = QuantizationMethod;
  QuantizeOptions nf4 = form_options(M::BNB_NF4, 4, 64);
  out.add("nf4_double", "bnb", nf4, 37, 192, true);
  out.add("nf4_double_crossing", "bnb", nf4, 300, 72, true);  // groups and nested blocks cross rows
  nf4.double_quant = false;
  out.add("nf4", "bnb", nf4, 19, 128, false);
  out.add("nf4_crossing", "bnb", nf4, 19, 72, false);
  nf4.quant_type = "fp4";
  nf4.group_size = 128;
  out.add("fp4_crossing", "bnb", nf4, 23, 100, false);
  out.add("int8", "bnb", form_options(M::BNB_INT8, 8, 0), 17, 70, false);
}

inline void add_hqq(FormTable& out) {
  using M = QuantizationMethod;
  for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
    out.add("hqq" + std::to_string(bits), "hqq", form_options(M::HQQ, bits, 64), 40, 128, true);
  }
  out.add("hqq_crossing", "hqq", form_options(M::HQQ, 4, 64), 80, 72, true);
  out.add("hqq_row", "hqq", form_options(M::HQQ, 4, 0), 20, 96, true);
  QuantizeOptions hqq = form_options(M::HQQ, 4, 64);
  hqq.optimize = false;
  out.add("hqq_no_solver", "hqq", hqq, 80, 72, false);
  hqq = form_options(M::HQQ, 4, 64);
  hqq.axis = 0;
  out.add("hqq_axis0", "hqq", hqq, 192, 80, true);
  hqq.bits = 3;
  out.add("hqq3_axis0", "hqq", hqq, 128, 48, true);
  hqq.bits = 4;
  out.add("hqq_axis0_crossing", "hqq", hqq, 40, 128, false);  // every rank quantizes the whole
  hqq.optimize = false;
  out.add("hqq_axis0_no_solver", "hqq", hqq, 128, 80, true);
  hqq = form_options(M::HQQ, 4, 64);
  hqq.quant_zero = hqq.quant_scale = true;
  out.add("hqq_meta", "hqq", hqq, 64, 128, false);  // the whole
}

inline void add_mlx(FormTable& out) {
  using M = QuantizationMethod;
  out.add("mlx4", "mlx", form_options(M::MLX_INT4, 4, 64), 21, 192, false);
  out.add("mlx8", "mlx", form_options(M::MLX_INT8, 8, 32), 21, 64, false);
  for (const int bits : {2, 3, 5, 6}) {
    QuantizeOptions mlx = form_options(M::BNB_NF4, bits, 64);
    out.add("mlx" + std::to_string(bits), "mlx", mlx, 21, 128, false);
    if (bits == 3) out.add("mlx3_half_a_unit", "mlx", mlx, 21, 192, false);
  }
  for (const char* mode : {"mxfp4", "nvfp4", "mxfp8"}) {
    QuantizeOptions mx = form_options(M::BNB_NF4, 0, 0);
    mx.mode = mode;
    out.add(mode, "mlx", mx, 21, 64, false);
  }
}

inline void add_quanto(FormTable& out) {
  using M = QuantizationMethod;
  out.add("quanto2", "quanto", form_options(M::QUANTO_INT2, 2, 0), 24, 256, false);
  out.add("quanto4", "quanto", form_options(M::QUANTO_INT4, 4, 0), 24, 256, false);
  out.add("quanto8", "quanto", form_options(M::QUANTO_INT8, 8, 0), 24, 256, false);
  QuantizeOptions quanto = form_options(M::QUANTO_INT4, 4, 0);
  quanto.mode = "hqq";
  out.add("quanto4_hqq", "quanto", quanto, 24, 256, true);
  quanto.axis = -1;
  out.add("quanto4_hqq_axis_minus1", "quanto", quanto, 256, 40, true);
  quanto.mode = "max,zeropoint";
  out.add("quanto4_zeropoint_axis_minus1", "quanto", quanto, 256, 40, true);
  quanto.mode = "max";
  out.add("quanto4_axis_minus1", "quanto", quanto, 256, 40, true);  // statistics are shared by rows
}

inline void add_gguf(FormTable& out) {
  using M = QuantizationMethod;
  for (const char* mode :
       {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"}) {
    QuantizeOptions gguf = form_options(M::BNB_NF4, 0, 0);
    gguf.mode = mode;
    out.add(mode, "gguf", gguf, 9, 256, false);
    if (gguf.mode == "Q5_1") out.add("Q5_1_part_of_a_unit", "gguf", gguf, 9, 160, false);
  }
}

inline std::vector<QuantizedForm> quantized_forms() {
  FormTable out;
  add_bnb(out);
  add_hqq(out);
  add_mlx(out);
  add_quanto(out);
  add_gguf(out);
  return out.all;
}

/// Random bfloat16.
inline std::vector<std::uint16_t> form_weights(std::int64_t rows, std::int64_t cols) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0.0F, 0.02F);
  std::vector<float> wide(static_cast<std::size_t>(rows * cols));
  for (float& w : wide) w = normal(random);
  std::vector<std::uint16_t> out(wide.size());
  narrow_from_f32(DType::kBF16, wide.data(), std::ssize(wide), out.data());
  return out;
}

inline PackedMatrix quantized(const QuantizedForm& c, const std::vector<std::uint16_t>& w) {
  const Dialect& dialect = dialect_by_name(c.dialect);
  PackedMatrix out = make_packed(dialect.make_spec(c.rows, c.cols, c.options));
  dialect.quantize(out.spec, DType::kBF16, w.data(), out.codes.data(), out.stats.data(),
                   out.shared.data(), serial_executor());
  return out;
}

}  // namespace quantal::testing
