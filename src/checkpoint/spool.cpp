#include "checkpoint/spool.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "io/atomic_file.h"

namespace quantal::checkpoint {
namespace {

constexpr std::size_t kAlignment = 64;

}  // namespace

Spool::Spool(const std::string& beside) : path_(beside + ".spool-XXXXXX") {
  descriptor_ = ::mkostemp(path_.data(), O_CLOEXEC);
  if (descriptor_ < 0) io::fail_errno("checkpoint: temporary file", path_);
  ::unlink(path_.c_str());  // gone with the descriptor, whatever happens
}

Spool::~Spool() {
  if (mapped_ != nullptr) ::munmap(const_cast<std::uint8_t*>(mapped_), end_);
  if (descriptor_ >= 0) ::close(descriptor_);
}

void Spool::write(const std::uint8_t* bytes, std::size_t size) {
  while (size > 0) {
    const ssize_t done = ::write(descriptor_, bytes, size);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) io::fail_errno("checkpoint: temporary file", path_);
    bytes += done;
    size -= static_cast<std::size_t>(done);
    end_ += static_cast<std::size_t>(done);
  }
}

std::size_t Spool::add(const TensorView& tensor) {
  static constexpr std::uint8_t kZeros[kAlignment] = {};
  write(kZeros, (kAlignment - end_ % kAlignment) % kAlignment);
  const std::size_t offset = end_;
  write(tensor.bytes.data(), tensor.bytes.size());
  entries_.push_back({tensor.dtype, tensor.shape, offset, tensor.bytes.size()});
  return entries_.size() - 1;
}

void Spool::seal() {
  if (end_ == 0 || mapped_ != nullptr) return;
  void* mapped = ::mmap(nullptr, end_, PROT_READ, MAP_SHARED, descriptor_, 0);
  if (mapped == MAP_FAILED) io::fail_errno("checkpoint: temporary file", path_);
  mapped_ = static_cast<const std::uint8_t*>(mapped);
}

TensorView Spool::view(std::size_t number) const {
  const Entry& entry = entries_.at(number);
  if (entry.size == 0) return {entry.dtype, entry.shape, {}};
  return {entry.dtype, entry.shape, {mapped_ + entry.offset, entry.size}};
}

}  // namespace quantal::checkpoint
