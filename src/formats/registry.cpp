// The explicit list of dialects. A new dialect is one folder, one line here and one tests folder.
#include <array>
#include <string>

#include "formats/bnb/bnb.h"
#include "formats/gguf/gguf.h"
#include "formats/hqq/hqq.h"
#include "formats/mlx/mlx.h"
#include "formats/quanto/quanto.h"
#include "quantal/formats.h"

namespace quantal {
namespace {

// In order of their ids, which are stored in files: 1 bnb, 2 hqq, 3 mlx, 4 quanto, 5 gguf.
constinit const std::array kDialects = {
    &bnb::kDialect, &hqq::kDialect, &mlx::kDialect, &quanto::kDialect, &gguf::kDialect,
};

std::string built_methods() {
  std::string names;
  for (const Dialect* dialect : kDialects) {
    for (const QuantizationMethod method : dialect->methods) {
      names += (names.empty() ? "" : ", ") + std::string(method_name(method));
    }
  }
  return names;
}

}  // namespace

std::span<const Dialect* const> dialects() { return kDialects; }

const Dialect* find_dialect(QuantizationMethod method) noexcept {
  for (const Dialect* dialect : kDialects) {
    for (const QuantizationMethod m : dialect->methods) {
      if (m == method) return dialect;
    }
  }
  return nullptr;
}

const Dialect& dialect_of(QuantizationMethod method) {
  if (const Dialect* dialect = find_dialect(method)) return *dialect;
  const std::string what =
      method == QuantizationMethod::NONE
          ? "none does not quantize"
          : std::string(method_name(method)) + " has no quantizer, it is not built in this version";
  fail(Errc::kUnsupported, "method: " + what + ", expected one of " + built_methods());
}

const Dialect& dialect_by_id(int id) {
  for (const Dialect* dialect : kDialects) {
    if (dialect->id == id) return *dialect;
  }
  std::string known;
  for (const Dialect* dialect : kDialects) {
    known += (known.empty() ? "" : ", ") + std::to_string(dialect->id) + " (" +
             std::string(dialect->name) + ")";
  }
  fail(Errc::kCorrupt, "dialect: id is " + std::to_string(id) + ", expected one of " + known);
}

const Dialect& dialect_by_name(std::string_view name) {
  std::string known;
  for (const Dialect* dialect : kDialects) {
    if (dialect->name == name) return *dialect;
    known += (known.empty() ? "" : ", ") + std::string(dialect->name);
  }
  fail(Errc::kConfig, "dialect: name is '" + std::string(name) + "', expected one of " + known);
}

PackedMatrix quantize(const TensorView& weights, const QuantizeOptions& options,
                      const Executor& executor) {
  return quantize(weights, dialect_of(options.method), options, executor);
}

PackedMatrix quantize(const TensorView& weights, const Dialect& dialect,
                      const QuantizeOptions& options, const Executor& executor) {
  if (!is_weight_dtype(weights.dtype)) {
    fail(Errc::kDtype, "quantize: weights have dtype " + std::string(dtype_name(weights.dtype)) +
                           ", expected one of f32, f16, bf16");
  }
  const std::int64_t numel = weights.numel();
  if (weights.shape.empty() || numel < 1) {
    fail(Errc::kShape, "quantize: weights have shape " + shape_string(weights.shape) +
                           ", expected at least one dimension and one element");
  }
  check_size("quantize: bytes of the weights", weights.bytes.size(),
             static_cast<std::size_t>(checked_mul(
                 numel, static_cast<std::int64_t>(dtype_size(weights.dtype)), "quantize: bytes")));
  const std::int64_t cols = weights.shape.back();
  PackedMatrix w = make_packed(dialect.make_spec(numel / cols, cols, options));
  dialect.quantize(w.spec, weights.dtype, weights.bytes.data(), w.codes.data(), w.stats.data(),
                   w.shared.data(), executor);
  return w;
}

}  // namespace quantal
