// quantal archives: containers inside a zip file, numpy's .npz and torch's .pt/.pth/.bin. A torch
// file holds a pickle; it is read as data by a machine that knows tensors and plain containers
// and refuses, by name, everything that would run code. docs/formats/{npy,torch}.md.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "quantal/core.h"
#include "quantal/io.h"

namespace quantal {

// ------------------------------------------------------------------ npz

/// A .npz file, mapped; members stored or deflated. Arrays are unpacked when they are read.
class NpzFile {
 public:
  /// Reads the directory and the header of every array. Throws Error{kIo}; Error{kCorrupt};
  /// Error{kUnsupported} for encrypted, multi-disk and otherwise compressed members and for element
  /// types that read_npy does not take.
  explicit NpzFile(const std::string& path);
  /// In the order of the directory; names without ".npy".
  const std::vector<TensorInfo>& tensors() const;
  const TensorInfo* find(const std::string& name) const;  ///< nullptr if absent
  /// Row-major, native byte order. A view of the mapping where the member is stored, in C order and
  /// aligned, else a copy. Checks the CRC-32. Throws Error{kCorrupt}; Error{kConfig} for a name
  /// that is not there. Thread-safe.
  HeldTensor read(const std::string& name) const;
  const std::string& path() const;  ///< of the file that was opened
  /// The comment of the archive, which numpy ignores: any bytes, at most 65535.
  const std::string& comment() const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

/// Writes a .npz file (members stored, as numpy.savez) whose arrays arrive one at a time.
class NpzWriter {
 public:
  explicit NpzWriter(const std::string& path);  ///< throws Error{kIo}
  ~NpzWriter();                                 ///< without finish(): `path` stays as it was
  NpzWriter(NpzWriter&&) noexcept;  ///< takes the file over; `other` can only be destroyed then
  NpzWriter& operator=(NpzWriter&&) noexcept;  ///< as above
  /// Appends "<name>.npy". Throws Error{kConfig} for a duplicate or illegal name; Error{kDtype} for
  /// types that npy cannot express.
  void put(const std::string& name, const TensorView& tensor);
  static constexpr std::size_t kMostComment = 65535;  ///< bytes
  /// Writes the directory and puts the file in place; nothing is there before. `comment` is
  /// NpzFile::comment. Throws Error{kConfig} for a longer one; Error{kIo}.
  void finish(std::string_view comment = {});

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// ------------------------------------------------------------------ torch

/// A tensor inside a torch file: a strided view of one of its storages. Offset and strides count
/// elements. Tensors with the same `storage` share memory, as tied weights do.
struct TorchTensor {
  DType dtype = DType::kF32;          ///< of the elements
  std::vector<std::int64_t> shape;    ///< sizes
  std::vector<std::int64_t> strides;  ///< in elements
  std::int64_t offset = 0;            ///< of the first element in the storage, in elements
  std::string storage;                ///< key, the file name under data/
  bool parameter = false;             ///< torch.nn.Parameter
  bool requires_grad = false;         ///< as torch stores it
};

/// A value of a torch file: Python's plain data, tensors and torch's small types. Immutable;
/// copies share what they hold.
class TorchValue {
 public:
  /// What Python objects a file may hold.
  enum class Kind : std::uint8_t {
    kNone,
    kBool,
    kInt,
    kFloat,
    kText,
    kList,
    kTuple,
    kDict,
    kOrderedDict,
    kSet,
    kSize,    ///< torch.Size
    kDtype,   ///< torch.float16 ...
    kDevice,  ///< torch.device, e.g. "cuda:0"
    kTensor,
  };
  using Items = std::vector<TorchValue>;                         ///< members of a sequence
  using Pairs = std::vector<std::pair<TorchValue, TorchValue>>;  ///< keys and values in order

  TorchValue() = default;                                  ///< None
  static TorchValue boolean(bool value);                   ///< true or false
  static TorchValue integer(std::int64_t value);           ///< an integer
  static TorchValue real(double value);                    ///< a floating-point number
  static TorchValue text(std::string value);               ///< a string
  static TorchValue list(Items items);                     ///< a list
  static TorchValue tuple(Items items);                    ///< a tuple
  static TorchValue set(Items items);                      ///< a set
  static TorchValue dict(Pairs pairs);                     ///< a dict, in the order given
  static TorchValue ordered_dict(Pairs pairs);             ///< collections.OrderedDict
  static TorchValue size(std::vector<std::int64_t> dims);  ///< torch.Size
  static TorchValue dtype(DType value);                    ///< a torch.dtype
  static TorchValue device(std::string value);             ///< a torch.device, "cpu" or "cuda:0"
  static TorchValue tensor(TorchTensor value);             ///< a tensor

  Kind kind() const { return kind_; }                    ///< which of the kinds it is
  bool is_none() const { return kind_ == Kind::kNone; }  ///< None
  /// Dict or OrderedDict.
  bool is_dict() const { return kind_ == Kind::kDict || kind_ == Kind::kOrderedDict; }
  bool is_tensor() const { return kind_ == Kind::kTensor; }  ///< a tensor

  // Each throws Error{kCorrupt} "torch: value is a list, expected an int" for another kind.
  bool as_bool() const;                              ///< throws Error{kCorrupt} for another kind
  std::int64_t as_int() const;                       ///< as as_bool
  double as_float() const;                           ///< an int counts as a float
  const std::string& as_text() const;                ///< text or device
  DType as_dtype() const;                            ///< torch.float16 ...
  const Items& items() const;                        ///< list, tuple, set
  const Pairs& pairs() const;                        ///< dict, OrderedDict, in order
  const std::vector<std::int64_t>& as_size() const;  ///< torch.Size
  const TorchTensor& as_tensor() const;              ///< as as_bool

  /// Value of a text key of a dict; nullptr if absent or not a dict.
  const TorchValue* find(std::string_view key) const;

 private:
  using Data =
      std::variant<std::monostate, bool, std::int64_t, double, DType,
                   std::shared_ptr<const std::string>, std::shared_ptr<const Items>,
                   std::shared_ptr<const Pairs>, std::shared_ptr<const std::vector<std::int64_t>>,
                   std::shared_ptr<const TorchTensor>>;
  TorchValue(Kind kind, Data data) : kind_(kind), data_(std::move(data)) {}

  Kind kind_ = Kind::kNone;
  Data data_;
};
/// "None", "an int", "a list" ...
std::string_view torch_kind_name(TorchValue::Kind kind) noexcept;

/// A torch zip file, mapped. Opening reads the tree of values and checks every tensor against its
/// storage; the bytes of tensors are read when they are asked for.
class TorchFile {
 public:
  /// Throws Error{kIo}; Error{kCorrupt}; Error{kUnsupported} naming what was refused: a global
  /// ("posix.system"), an opcode, a call, a legacy, tar or TorchScript file.
  explicit TorchFile(const std::string& path);
  const TorchValue& root() const;  ///< the object that was saved
  /// Row-major, native byte order: a view of the mapping where the tensor is contiguous and aligned
  /// to its elements, else a copy. `tensor` is one of this file's. The CRC-32 of a storage is
  /// checked once, except in files that were written without (every CRC zero). Throws
  /// Error{kCorrupt}. Thread-safe.
  HeldTensor read(const TorchTensor& tensor) const;
  const std::string& path() const;  ///< of the file that was opened

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

/// Writes a torch zip file that torch.load(weights_only=True), also with mmap=True, reads. Tensors
/// are written as they are added and not kept; the tree of values comes last.
///   TorchWriter writer(path);
///   pairs.emplace_back(TorchValue::text("w"), TorchValue::tensor(writer.add(view)));
///   writer.finish(TorchValue::ordered_dict(pairs));
class TorchWriter {
 public:
  explicit TorchWriter(const std::string& path);  ///< throws Error{kIo}
  ~TorchWriter();                                 ///< without finish(): `path` stays as it was
  TorchWriter(TorchWriter&&) noexcept;  ///< takes the file over; `other` can only be destroyed then
  TorchWriter& operator=(TorchWriter&&) noexcept;  ///< as above
  /// Writes a storage, aligned to 64 bytes, and returns the contiguous tensor over it. The result
  /// may stand in the tree more than once, also with another shape, offset or strides: the storage
  /// is kept once. Set `parameter` in it for a torch.nn.Parameter.
  TorchTensor add(const TensorView& tensor);
  /// Writes the tree and puts the file in place. Throws Error{kConfig} for a tensor that is not of
  /// this writer or leaves its storage, for nesting deeper than 100, and for strings that are not
  /// UTF-8.
  void finish(const TorchValue& root);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace quantal
