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

TorchValue TorchValue::boolean(bool value) { return {Kind::kBool, value}; }

TorchValue TorchValue::integer(std::int64_t value) { return {Kind::kInt, value}; }

TorchValue TorchValue::real(double value) { return {Kind::kFloat, value}; }

TorchValue TorchValue::text(std::string value) { return {Kind::kText, shared(std::move(value))}; }

TorchValue TorchValue::list(Items items) { return {Kind::kList, shared(std::move(items))}; }

TorchValue TorchValue::tuple(Items items) { return {Kind::kTuple, shared(std::move(items))}; }

TorchValue TorchValue::set(Items items) { return {Kind::kSet, shared(std::move(items))}; }

TorchValue TorchValue::dict(Pairs pairs) { return {Kind::kDict, shared(std::move(pairs))}; }

TorchValue TorchValue::ordered_dict(Pairs pairs) {
  return {Kind::kOrderedDict, shared(std::move(pairs))};
}

TorchValue TorchValue::size(std::vector<std::int64_t> dims) {
  return {Kind::kSize, shared(std::move(dims))};
}

TorchValue TorchValue::dtype(DType value) { return {Kind::kDtype, value}; }

TorchValue TorchValue::device(std::string value) {
  return {Kind::kDevice, shared(std::move(value))};
}

TorchValue TorchValue::tensor(TorchTensor value) {
  return {Kind::kTensor, shared(std::move(value))};
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
