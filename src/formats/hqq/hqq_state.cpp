#include "formats/hqq/hqq_state.h"

#include <array>
#include <cmath>
#include <cstring>

#include "formats/tensors.h"

namespace quantal::hqq {
namespace {

template <class T>
T read_element(const TensorView& t, std::size_t i) {
  T value;
  std::memcpy(&value, t.bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

template <class T>
Tensor scalar(DType dtype, T value) {
  return tensor_of(dtype, {}, {reinterpret_cast<const std::uint8_t*>(&value), sizeof(value)});
}

std::int64_t integer_at(const TensorView& t, std::size_t i) {
  if (t.dtype == DType::kI64) return read_element<std::int64_t>(t, i);
  if (t.dtype == DType::kI32) return read_element<std::int32_t>(t, i);
  return t.bytes[i];
}

}  // namespace

std::string Fields::name(std::string_view field) const {
  std::string flat = prefix_ + std::string(field);
  if (lookup_(flat) != nullptr) return flat;
  std::string below_meta = prefix_ + "meta." + std::string(field);
  return lookup_(below_meta) != nullptr ? below_meta : flat;
}

bool Fields::given(std::string_view field) const {
  const TensorView* t = find(field);
  return t != nullptr && t->numel() > 0;
}

const TensorView& Fields::tensor(std::string_view field) const {
  return require_tensor(lookup_, name(field), kWhere);
}

Fields Fields::nested(std::string_view dictionary) const {
  const std::string at = std::string(dictionary) + ".";
  for (const std::string& prefix : {prefix_ + at, prefix_ + "meta." + at}) {
    if (lookup_(prefix + "nbits") != nullptr) return {prefix, lookup_};
  }
  return {prefix_ + at, lookup_};
}

double Fields::number(std::string_view field) const {
  constexpr std::array<DType, 6> kNumbers = {DType::kI32,  DType::kI64, DType::kU8,
                                             DType::kBool, DType::kF32, DType::kF64};
  const TensorView& t = tensor(field);
  require_dtype(t, name(field), kWhere, kNumbers);
  require_numel(t, name(field), kWhere, 1);
  if (t.dtype == DType::kF32) return static_cast<double>(read_element<float>(t, 0));
  if (t.dtype == DType::kF64) return read_element<double>(t, 0);
  return static_cast<double>(integer_at(t, 0));
}

std::int64_t Fields::integer(std::string_view field) const {
  const double value = number(field);
  constexpr double kLargest = 9007199254740992.0;  // 2^53: every integer below is exact
  if (value != std::floor(value) || std::fabs(value) > kLargest) {
    refuse(Errc::kUnsupported, field, python_repr(value), "an integer");
  }
  return static_cast<std::int64_t>(value);
}

bool Fields::flag(std::string_view field, bool fallback) const {
  return has(field) ? number(field) != 0 : fallback;
}

std::string Fields::text(std::string_view field) const {
  constexpr std::array<DType, 1> kBytes = {DType::kU8};
  require_dtype(tensor(field), name(field), kWhere, kBytes);
  return text_of(tensor(field));
}

DType Fields::dtype(std::string_view field) const {
  const std::string spelled = text(field);
  const DType dtype = parse_dtype(spelled);
  if (!is_weight_dtype(dtype)) {
    refuse(Errc::kCorrupt, field, "'" + spelled + "'",
           "torch.float32, torch.float16 or torch.bfloat16");
  }
  return dtype;
}

std::vector<std::int64_t> Fields::sizes(std::string_view field) const {
  constexpr std::array<DType, 2> kIntegers = {DType::kI64, DType::kI32};
  constexpr std::int64_t kMostDims = 8;
  const TensorView& t = tensor(field);
  require_dtype(t, name(field), kWhere, kIntegers);
  if (t.numel() > kMostDims) {
    refuse(Errc::kUnsupported, field, std::to_string(t.numel()) + " dimensions",
           "at most " + std::to_string(kMostDims));
  }
  std::vector<std::int64_t> out;
  for (std::size_t i = 0; i < static_cast<std::size_t>(t.numel()); ++i) {
    out.push_back(integer_at(t, i));
  }
  return out;
}

void Fields::refuse(Errc code, std::string_view field, const std::string& actual,
                    const std::string& expected) const {
  fail(code,
       std::string(kWhere) + ": " + std::string(field) + " is " + actual + ", expected " + expected,
       {.path = {}, .tensor = name(field)});
}

// ------------------------------------------------------------------ values

NamedTensor named_bool(std::string name, bool value) {
  return {std::move(name), scalar(DType::kU8, static_cast<std::uint8_t>(value)), StateKind::kBool};
}

NamedTensor named_int(std::string name, std::int64_t value) {
  return {std::move(name), scalar(DType::kI32, static_cast<std::int32_t>(value)), StateKind::kInt};
}

NamedTensor named_float(std::string name, float value) {
  return {std::move(name), scalar(DType::kF32, value), StateKind::kFloat};
}

NamedTensor named_text(std::string name, std::string_view value) {
  return {std::move(name), tensor_of_text(value), StateKind::kText};
}

NamedTensor named_dtype(std::string name, DType value) {
  return {std::move(name), tensor_of_text("torch." + std::string(dtype_torch_name(value))),
          StateKind::kDtype};
}

NamedTensor named_size(std::string name, std::span<const std::int64_t> dims) {
  return {std::move(name),
          tensor_of(DType::kI64, {static_cast<std::int64_t>(dims.size())},
                    {reinterpret_cast<const std::uint8_t*>(dims.data()), dims.size_bytes()}),
          StateKind::kSize};
}

NamedTensor named_none(std::string name) {
  return {std::move(name), Tensor{DType::kU8, {0}, {}}, StateKind::kNone};
}

// ------------------------------------------------------------------ residue

namespace {

/// Takes bytes from the front; throws when there are too few.
class Cursor {
 public:
  explicit Cursor(std::span<const std::uint8_t> bytes) : left_(bytes) {}
  std::span<const std::uint8_t> take(std::size_t n) {
    if (n > left_.size()) {
      fail(Errc::kCorrupt, "hqq: residue ends " + std::to_string(n - left_.size()) +
                               " bytes early, expected whole fields");
    }
    const auto front = left_.first(n);
    left_ = left_.subspan(n);
    return front;
  }
  template <class T>
  T take_value() {
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }
  std::size_t left() const { return left_.size(); }

 private:
  std::span<const std::uint8_t> left_;
};

void append_bytes(std::vector<std::uint8_t>& out, const void* bytes, std::size_t size) {
  if (size == 0) return;
  const std::size_t at = out.size();
  out.resize(at + size);
  std::memcpy(out.data() + at, bytes, size);
}

template <class T>
void append(std::vector<std::uint8_t>& out, T value) {
  append_bytes(out, &value, sizeof(value));
}

NamedTensor take_field(Cursor& in) {
  NamedTensor field;
  const auto name = in.take(in.take_value<std::uint8_t>());
  field.name.assign(name.begin(), name.end());
  const auto kind = in.take_value<std::uint8_t>();
  const auto dtype = in.take_value<std::uint8_t>();
  if (kind > static_cast<std::uint8_t>(StateKind::kPlainOnly) ||
      dtype > static_cast<std::uint8_t>(DType::kF8E8M0)) {
    fail(Errc::kCorrupt, "hqq: residue has kind " + std::to_string(kind) + ", dtype " +
                             std::to_string(dtype) + ", expected known ones");
  }
  field.kind = static_cast<StateKind>(kind);
  field.tensor.dtype = static_cast<DType>(dtype);
  const auto dims = in.take_value<std::uint8_t>();
  for (int i = 0; i < dims; ++i) field.tensor.shape.push_back(in.take_value<std::int64_t>());
  const std::int64_t bytes =
      checked_mul(checked_numel(field.tensor.shape, "hqq: residue"),
                  static_cast<std::int64_t>(dtype_size(field.tensor.dtype)), "hqq: residue");
  const auto data = in.take(static_cast<std::size_t>(bytes));
  field.tensor.bytes.assign(data.begin(), data.end());
  return field;
}

}  // namespace

std::vector<std::uint8_t> encode_residue(std::span<const NamedTensor> fields) {
  std::vector<std::uint8_t> out;
  if (fields.empty()) return out;
  append(out, static_cast<std::uint32_t>(fields.size()));
  for (const NamedTensor& field : fields) {
    append(out, static_cast<std::uint8_t>(field.name.size()));
    append_bytes(out, field.name.data(), field.name.size());
    append(out, static_cast<std::uint8_t>(field.kind));
    append(out, static_cast<std::uint8_t>(field.tensor.dtype));
    append(out, static_cast<std::uint8_t>(field.tensor.shape.size()));
    for (const std::int64_t dim : field.tensor.shape) append(out, dim);
    append_bytes(out, field.tensor.bytes.data(), field.tensor.bytes.size());
  }
  return out;
}

std::vector<NamedTensor> decode_residue(std::span<const std::uint8_t> bytes) {
  std::vector<NamedTensor> fields;
  if (bytes.empty()) return fields;
  Cursor in(bytes);
  const auto count = in.take_value<std::uint32_t>();
  for (std::uint32_t i = 0; i < count; ++i) fields.push_back(take_field(in));
  if (in.left() != 0) {
    fail(Errc::kCorrupt,
         "hqq: residue has " + std::to_string(in.left()) + " bytes left, expected none");
  }
  return fields;
}

}  // namespace quantal::hqq
