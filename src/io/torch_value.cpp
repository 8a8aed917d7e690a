#include <array>

#include "quantal/archive.h"

namespace quantal {
namespace {

using Kind = TorchValue::Kind;

template <class T>
std::shared_ptr<const T> shared(T value) {
  return std::make_shared<const T>(std::move(value));
}

[[noreturn]] void wrong_kind(Kind kind, const char* expected) {
  fail(Errc::kCorrupt,
       "torch: value is " + std::string(torch_kind_name(kind)) + ", expected " + expected);
}

}  // namespace

std::string_view torch_kind_name(TorchValue::Kind kind) noexcept {
  constexpr std::array<std::string_view, 14> kNames = {
      "None",         "a bool",  "an int",         "a float",        "a string",
      "a list",       "a tuple", "a dict",         "an OrderedDict", "a set",
      "a torch.Size", "a dtype", "a torch.device", "a tensor"};
  return kNames[static_cast<std::size_t>(kind)];
}

TorchValue TorchValue::boolean(bool value) {
  TorchValue out;
  out.kind_ = Kind::kBool;
  out.data_ = value;
  return out;
}

TorchValue TorchValue::integer(std::int64_t value) {
  TorchValue out;
  out.kind_ = Kind::kInt;
  out.data_ = value;
  return out;
}

TorchValue TorchValue::real(double value) {
  TorchValue out;
  out.kind_ = Kind::kFloat;
  out.data_ = value;
  return out;
}

TorchValue TorchValue::text(std::string value) {
  TorchValue out;
  out.kind_ = Kind::kText;
  out.data_ = shared(std::move(value));
  return out;
}

TorchValue TorchValue::list(Items items) {
  TorchValue out;
  out.kind_ = Kind::kList;
  out.data_ = shared(std::move(items));
  return out;
}

TorchValue TorchValue::tuple(Items items) {
  TorchValue out = list(std::move(items));
  out.kind_ = Kind::kTuple;
  return out;
}

TorchValue TorchValue::set(Items items) {
  TorchValue out = list(std::move(items));
  out.kind_ = Kind::kSet;
  return out;
}

TorchValue TorchValue::dict(Pairs pairs) {
  TorchValue out;
  out.kind_ = Kind::kDict;
  out.data_ = shared(std::move(pairs));
  return out;
}

TorchValue TorchValue::ordered_dict(Pairs pairs) {
  TorchValue out = dict(std::move(pairs));
  out.kind_ = Kind::kOrderedDict;
  return out;
}

TorchValue TorchValue::size(std::vector<std::int64_t> dims) {
  TorchValue out;
  out.kind_ = Kind::kSize;
  out.data_ = shared(std::move(dims));
  return out;
}

TorchValue TorchValue::dtype(DType value) {
  TorchValue out;
  out.kind_ = Kind::kDtype;
  out.data_ = value;
  return out;
}

TorchValue TorchValue::device(std::string value) {
  TorchValue out = text(std::move(value));
  out.kind_ = Kind::kDevice;
  return out;
}

TorchValue TorchValue::tensor(TorchTensor value) {
  TorchValue out;
  out.kind_ = Kind::kTensor;
  out.data_ = shared(std::move(value));
  return out;
}

bool TorchValue::as_bool() const {
  if (kind_ != Kind::kBool) wrong_kind(kind_, "a bool");
  return std::get<bool>(data_);
}

std::int64_t TorchValue::as_int() const {
  if (kind_ != Kind::kInt) wrong_kind(kind_, "an int");
  return std::get<std::int64_t>(data_);
}

double TorchValue::as_float() const {
  if (kind_ == Kind::kInt) return static_cast<double>(std::get<std::int64_t>(data_));
  if (kind_ != Kind::kFloat) wrong_kind(kind_, "a float");
  return std::get<double>(data_);
}

const std::string& TorchValue::as_text() const {
  if (kind_ != Kind::kText && kind_ != Kind::kDevice) wrong_kind(kind_, "a string");
  return *std::get<std::shared_ptr<const std::string>>(data_);
}

DType TorchValue::as_dtype() const {
  if (kind_ != Kind::kDtype) wrong_kind(kind_, "a dtype");
  return std::get<DType>(data_);
}

const TorchValue::Items& TorchValue::items() const {
  if (kind_ != Kind::kList && kind_ != Kind::kTuple && kind_ != Kind::kSet) {
    wrong_kind(kind_, "a list, tuple or set");
  }
  return *std::get<std::shared_ptr<const Items>>(data_);
}

const TorchValue::Pairs& TorchValue::pairs() const {
  if (!is_dict()) wrong_kind(kind_, "a dict");
  return *std::get<std::shared_ptr<const Pairs>>(data_);
}

const std::vector<std::int64_t>& TorchValue::as_size() const {
  if (kind_ != Kind::kSize) wrong_kind(kind_, "a torch.Size");
  return *std::get<std::shared_ptr<const std::vector<std::int64_t>>>(data_);
}

const TorchTensor& TorchValue::as_tensor() const {
  if (kind_ != Kind::kTensor) wrong_kind(kind_, "a tensor");
  return *std::get<std::shared_ptr<const TorchTensor>>(data_);
}

const TorchValue* TorchValue::find(std::string_view key) const {
  if (!is_dict()) return nullptr;
  for (const auto& [name, value] : pairs()) {
    if (name.kind_ == Kind::kText && name.as_text() == key) return &value;
  }
  return nullptr;
}

}  // namespace quantal
