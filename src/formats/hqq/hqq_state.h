// HQQ: the fields of a layer as tensors, read and written; and the fields that a packed matrix
// keeps as they were read (its residue).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/formats.h"

namespace quantal::hqq {

inline constexpr std::string_view kWhere = "hqq";

/// Typed access to the fields of one layer: `<prefix><field>`, or `<prefix>meta.<field>` as torch
/// files with a nested dictionary have it.
class Fields {
 public:
  Fields(std::string prefix, const TensorLookup& lookup)
      : prefix_(std::move(prefix)), lookup_(lookup) {}

  /// Full name under which the field is stored; `<prefix><field>` if it is not.
  std::string name(std::string_view field) const;
  /// Nullptr if absent.
  const TensorView* find(std::string_view field) const { return lookup_(name(field)); }
  bool has(std::string_view field) const { return find(field) != nullptr; }
  /// True if the field is there and not None (an empty tensor counts as None).
  bool given(std::string_view field) const;
  /// Throws Error{kCorrupt} naming a missing field.
  const TensorView& tensor(std::string_view field) const;
  /// Fields of a nested dictionary ("meta_zero").
  Fields nested(std::string_view dictionary) const;

  /// One number. Throws Error{kDtype}, Error{kShape}; Error{kUnsupported} for a fraction.
  std::int64_t integer(std::string_view field) const;
  double number(std::string_view field) const;
  bool flag(std::string_view field, bool fallback) const;
  std::string text(std::string_view field) const;
  /// "torch.float16". Throws Error{kCorrupt} for a type that weights cannot have, Error{kDtype} for
  /// anything else: the text is never evaluated.
  DType dtype(std::string_view field) const;
  /// torch.Size: int64 of one dimension.
  std::vector<std::int64_t> sizes(std::string_view field) const;

  /// Throws Error{code} "hqq: <field> is <actual>, expected <expected>".
  [[noreturn]] void refuse(Errc code, std::string_view field, const std::string& actual,
                           const std::string& expected) const;

 private:
  std::string prefix_;
  const TensorLookup& lookup_;
};

/// A Python value as the encoding of upstream's safetensors files has it.
NamedTensor named_bool(std::string name, bool value);
NamedTensor named_int(std::string name, std::int64_t value);
NamedTensor named_float(std::string name, float value);
NamedTensor named_text(std::string name, std::string_view value);
NamedTensor named_dtype(std::string name, DType value);
NamedTensor named_size(std::string name, std::span<const std::int64_t> dims);
NamedTensor named_none(std::string name);

/// Fields as bytes at the end of `shared`:
///   u32 count, then for each: u8 length of name, name, u8 kind, u8 dtype, u8 dimensions,
///   i64 each dimension, bytes of the tensor.
std::vector<std::uint8_t> encode_residue(std::span<const NamedTensor> fields);
/// Inverse; nothing for no bytes. Throws Error{kCorrupt}.
std::vector<NamedTensor> decode_residue(std::span<const std::uint8_t> bytes);

}  // namespace quantal::hqq
