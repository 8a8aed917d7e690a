// quantal io: containers. Bytes and names, never dialects. Readers check every size against the
// file before they believe it; writers are atomic (temporary file beside the target, fsync,
// rename).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "quantal/core.h"
#include "quantal/safetensors.h"

namespace quantal {

/// A read-only memory mapping of a whole file. Movable, not copyable; spans into it live as long.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  ///< throws Error{kIo}
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;             ///< takes the mapping over
  MappedFile& operator=(MappedFile&& other) noexcept;  ///< takes the mapping over
  std::span<const std::uint8_t> bytes() const { return {data_, size_}; }  ///< the whole file
  const std::string& path() const { return path_; }                       ///< of the file

 private:
  std::string path_;
  const std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Writes `bytes` to `path` atomically. Throws Error{kIo}; the target is untouched then.
void write_file_atomic(const std::string& path, std::span<const std::uint8_t> bytes);
/// Reads a whole (small) file as text; throws Error{kIo}, Error{kCorrupt} above `max_bytes`.
std::string read_text_file(const std::string& path, std::size_t max_bytes = 64u << 20);

/// What the first and last bytes of a file say it is; suffixes are not looked at.
enum class FileKind {
  kUnknown,
  kSafetensors,
  kGguf,
  kNpy,
  kNpz,          ///< zip whose members are all .npy
  kTorch,        ///< zip with `<folder>/data.pkl`
  kTorchScript,  ///< zip with `<folder>/data.pkl`, constants.pkl, code/; not read
  kTorchLegacy,  ///< torch.save before 1.6; not read
  kTar,          ///< torch.save before 0.1.10, or any other tar; not read
};
std::string_view file_kind_name(FileKind kind) noexcept;  ///< for messages: "a torch zip file"
/// Looks at a few bytes and, for a zip, at its directory. Throws Error{kIo}; a damaged zip is
/// kUnknown.
FileKind detect_file(const std::string& path);

/// A tensor and whatever keeps its bytes alive: a mapping where they could be used in place, a
/// buffer where they had to be unpacked or reordered.
struct HeldTensor {
  TensorView view;              ///< the tensor
  std::shared_ptr<void> owner;  ///< keeps the bytes alive
};

// ------------------------------------------------------------------ npy

/// Reads a .npy file (versions 1 to 3, either byte order, C or Fortran order) into row-major,
/// native order; opaque two-byte elements ('<V2') are bf16. Throws Error{kIo}; Error{kCorrupt};
/// Error{kUnsupported} for object, structured, string and complex types.
Tensor read_npy(const std::string& path);
/// Writes version 1.0, C order, atomically. bf16 is written as '<V2', as MLX does.
void write_npy(const std::string& path, const TensorView& tensor);

// ------------------------------------------------------------------ GGUF container

struct GgufArray;
/// A metadata value. Signed and unsigned integers are widened to 64 bits.
using GgufValue = std::variant<std::int64_t, std::uint64_t, double, bool, std::string,
                               std::shared_ptr<GgufArray>>;
/// An array among the metadata.
struct GgufArray {
  std::uint32_t element_type = 0;  ///< a GgufType
  std::vector<GgufValue> values;   ///< of that type
};

/// Types of metadata values (numbers of the file format).
enum class GgufType : std::uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

/// A metadata pair with the type that it has in a file.
struct GgufPair {
  std::string key;                    ///< dotted name
  GgufType type = GgufType::kString;  ///< of the value
  GgufValue value;                    ///< the value
};

/// One tensor of a GGUF file. `shape` is row-major (slowest first), i.e. reversed file dims.
struct GgufTensor {
  std::string name;                     ///< name in the file
  std::uint32_t type = 0;               ///< ggml_type number
  std::vector<std::int64_t> shape;      ///< slowest dimension first
  std::span<const std::uint8_t> bytes;  ///< as stored
  std::int64_t file_offset = 0;         ///< of the first byte
};

/// Size of a ggml block, supplied by the caller: io knows no formats.
struct GgufBlockSize {
  std::int64_t elements = 0;  ///< 0 = unknown type
  std::int64_t bytes = 0;     ///< of a block
};

/// A GGUF v2 or v3 file, little-endian, mapped.
class GgufFile {
 public:
  /// Throws Error{kIo}, Error{kCorrupt}, Error{kUnsupported} as docs/formats/gguf.md lists.
  GgufFile(const std::string& path, GgufBlockSize (*block_size)(std::uint32_t type));
  std::uint32_t version() const { return version_; }  ///< of the container
  /// In the order of the file.
  const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return metadata_; }
  const GgufValue* find_metadata(const std::string& key) const;  ///< null if there is none
  /// metadata() with the types of the file, as GgufWriter takes it.
  std::vector<GgufPair> pairs() const;
  const std::vector<GgufTensor>& tensors() const { return tensors_; }  ///< in the order of the file
  const GgufTensor* find(const std::string& name) const;               ///< null if there is none
  const std::string& path() const { return file_->path(); }            ///< of the file

 private:
  std::shared_ptr<MappedFile> file_;
  std::uint32_t version_ = 0;
  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::vector<GgufType> metadata_types_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, std::size_t> index_;
};

/// What a writer must know of a tensor before its bytes come. `shape` is row-major.
struct GgufTensorPlan {
  std::string name;                 ///< name in the file
  std::uint32_t type = 0;           ///< ggml_type number
  std::vector<std::int64_t> shape;  ///< slowest dimension first
  std::int64_t bytes = 0;           ///< of the stored tensor
};

/// Writes a GGUF v3 file atomically, tensor by tensor; nothing but the header is kept in memory.
/// The file appears on commit; without it nothing is left. Not thread-safe.
class GgufWriter {
 public:
  /// Alignment is the pair general.alignment (u32), 32 without one. Throws Error{kIo};
  /// Error{kConfig} naming the key or tensor for empty or repeated keys, values that do not fit
  /// their type, arrays of arrays, repeated names, names of more than 63 bytes, ranks other than 1
  /// to 4, sizes that overflow.
  GgufWriter(const std::string& path, std::span<const GgufPair> metadata,
             std::vector<GgufTensorPlan> tensors);
  ~GgufWriter();
  GgufWriter(const GgufWriter&) = delete;
  GgufWriter& operator=(const GgufWriter&) = delete;

  /// Appends to the data of the tensor whose turn it is, in the order of the plan; a full tensor is
  /// padded and the next one begins. Throws Error{kIo}; Error{kConfig} naming the tensor if
  /// `bytes` reach beyond its end.
  void write(std::span<const std::uint8_t> bytes);
  /// Throws Error{kConfig} naming the first tensor that is not complete; Error{kIo}.
  void commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Metadata alone, as the bytes of a GGUF file without tensors; throws as GgufWriter.
std::string gguf_metadata_bytes(std::span<const GgufPair> metadata);
/// Inverse: the metadata of the GGUF file `bytes`, whatever follows it. `name` stands for the path
/// in errors. Throws Error{kCorrupt}, Error{kUnsupported} as GgufFile.
std::vector<GgufPair> parse_gguf_metadata(std::string_view bytes, const std::string& name);

}  // namespace quantal
