// Tensors that wait in a file until their final place is known.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "quantal/io.h"

namespace quantal::checkpoint {

/// An unnamed file beside the target: tensors are appended as they arrive and mapped once all are
/// there. Memory holds none of them (pages of a mapped file are the system's to drop).
class Spool {
 public:
  /// `beside` is a path in the folder to use. Throws Error{kIo}.
  explicit Spool(const std::string& beside);
  ~Spool();
  Spool(const Spool&) = delete;
  Spool& operator=(const Spool&) = delete;

  /// Appends; returns the number of the tensor. Throws Error{kIo}.
  std::size_t add(const TensorView& tensor);
  /// Maps the file; no add after it. Throws Error{kIo}.
  void seal();
  /// After seal; valid as long as the spool.
  TensorView view(std::size_t number) const;

 private:
  void write(const std::uint8_t* bytes, std::size_t size);

  struct Entry {
    DType dtype;
    std::vector<std::int64_t> shape;
    std::size_t offset, size;
  };
  std::string path_;
  int descriptor_ = -1;
  std::size_t end_ = 0;
  std::vector<Entry> entries_;
  const std::uint8_t* mapped_ = nullptr;
};

}  // namespace quantal::checkpoint
