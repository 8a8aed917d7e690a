// quantal core: the vocabulary that every other room speaks.
//
// Errors, element types, views of tensor bytes, checked sizes and the executor. No torch, no files,
// no formats. Everything here is immutable or thread-compatible.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

/// Everything of quantal.
namespace quantal {

// ------------------------------------------------------------------ errors

/// Kind of a failure; Python maps each kind to an exception class of the same meaning.
enum class Errc {
  kConfig,       ///< a setting is out of its legal range or contradicts another one
  kShape,        ///< a size or shape does not match what an operation needs
  kDtype,        ///< an element type is not accepted here
  kUnsupported,  ///< valid input that quantal does not handle
  kCorrupt,      ///< bytes from outside contradict their own format
  kIo,           ///< the operating system refused to read or write
  kDevice,       ///< a device or instruction set is missing
  kInternal,     ///< a defect of quantal itself
};

/// Name of a kind without the `k`, e.g. "Corrupt".
std::string_view errc_name(Errc code) noexcept;

/// Where in a file a failure was found; empty or negative members are unknown.
struct ErrorSite {
  std::string path{};        ///< file that was being read or written
  std::string tensor{};      ///< tensor or metadata key inside it
  std::int64_t offset = -1;  ///< byte offset in the file
};

/// The one exception type of quantal. `what()` is the whole message:
/// `where: what is <actual>, expected <allowed> (file=..., tensor=..., offset=...)`.
class Error : public std::runtime_error {
 public:
  Error(Errc code, const std::string& message, ErrorSite site = {});  ///< see fail()
  Errc code() const noexcept { return code_; }                        ///< the kind of failure
  const ErrorSite& site() const noexcept { return site_; }            ///< where it was

 private:
  Errc code_;
  ErrorSite site_;
};

/// Throws Error{code}; the site, where given, is appended to the message.
[[noreturn]] void fail(Errc code, const std::string& message, ErrorSite site = {});

/// Throws Error{kShape} "<what> is <actual>, expected <expected>" unless the two are equal.
void check_size(std::string_view what, std::size_t actual, std::size_t expected,
                const ErrorSite& site = {});

// ------------------------------------------------------------------ sizes

/// a * b; throws Error{kShape} naming `what` on overflow of std::int64_t or a negative factor.
std::int64_t checked_mul(std::int64_t a, std::int64_t b, std::string_view what);
/// a + b under the same rules.
std::int64_t checked_add(std::int64_t a, std::int64_t b, std::string_view what);
/// Product of all dimensions (1 for a scalar) under the same rules.
std::int64_t checked_numel(std::span<const std::int64_t> shape, std::string_view what);
/// ceil(a / b) for a >= 0, b > 0.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// ------------------------------------------------------------------ element types

/// Element types of tensors in memory and in files. Numbers are part of the stored packed spec:
/// append, never renumber.
enum class DType : std::uint8_t {
  kF32 = 0,
  kF16 = 1,
  kBF16 = 2,
  kF64 = 3,
  kU8 = 4,
  kI8 = 5,
  kU16 = 6,
  kI16 = 7,
  kU32 = 8,
  kI32 = 9,
  kU64 = 10,
  kI64 = 11,
  kBool = 12,
  kF8E4M3 = 13,
  kF8E5M2 = 14,
  kF8E8M0 = 15,
};

/// Bytes of one element.
std::size_t dtype_size(DType dtype) noexcept;
/// Short name: "f32", "bf16", "u8" ...
std::string_view dtype_name(DType dtype) noexcept;
/// Name in torch and in JSON settings: "float32", "bfloat16", "uint8" ...
std::string_view dtype_torch_name(DType dtype) noexcept;
/// Accepts "f32", "float32" and "torch.float32" spellings; throws Error{kDtype} listing the legal
/// names for anything else.
DType parse_dtype(std::string_view name);
/// True for kF32, kF16 and kBF16, the types that weights and activations may have.
constexpr bool is_weight_dtype(DType d) {
  return d == DType::kF32 || d == DType::kF16 || d == DType::kBF16;
}

/// `out[i] = float(in[i])` for the weight types (exact). Throws Error{kDtype} for others.
void widen_to_f32(DType dtype, const void* in, std::int64_t n, float* out);
/// `out[i] = dtype(in[i])`, round half to even, overflow to infinity, NaN kept quiet.
/// Throws Error{kDtype} for types other than kF32, kF16, kBF16.
void narrow_from_f32(DType dtype, const float* in, std::int64_t n, void* out);

// ------------------------------------------------------------------ tensors

/// A borrowed row-major tensor. The owner of `bytes` must outlive the view.
struct TensorView {
  DType dtype = DType::kF32;            ///< of the elements
  std::vector<std::int64_t> shape;      ///< sizes, slowest dimension first
  std::span<const std::uint8_t> bytes;  ///< numel() elements, row-major

  std::int64_t numel() const;  ///< product of shape; throws as checked_numel
  /// The bytes as elements of T, which the caller knows to be right.
  template <class T>
  const T* data() const {
    return reinterpret_cast<const T*>(bytes.data());
  }
};

/// A row-major tensor that owns its bytes.
struct Tensor {
  DType dtype = DType::kF32;        ///< of the elements
  std::vector<std::int64_t> shape;  ///< sizes, slowest dimension first
  std::vector<std::uint8_t> bytes;  ///< elements, row-major

  /// Borrowed: valid while this tensor is unchanged.
  TensorView view() const { return {dtype, shape, bytes}; }
};

/// Zero-filled tensor; checks the size before it allocates.
Tensor make_tensor(DType dtype, std::vector<std::int64_t> shape);

/// "[4096, 64]"
std::string shape_string(std::span<const std::int64_t> shape);

// ------------------------------------------------------------------ executor

/// Splits a range over threads. Results of quantal never depend on how it is split.
/// Implementations must call `body(begin, end)` on disjoint subranges that cover [begin, end),
/// each at least `grain` long where possible, and rethrow the first exception of a body.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual int num_threads() const = 0;  ///< at most this many run at once
  /// See above; returns when all of the range is done.
  virtual void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                            const std::function<void(std::int64_t, std::int64_t)>& body) const = 0;
};

/// Runs everything on the calling thread.
const Executor& serial_executor();

// ------------------------------------------------------------------ memory

/// Asks the system to back memory that nobody wrote to yet with large pages: decoding into fresh
/// pages of 4 KiB takes several times as long as decoding. Only a hint; below 4 MiB, and where the
/// system knows no such hint, nothing happens.
void prefer_large_pages(void* data, std::size_t bytes) noexcept;

}  // namespace quantal
