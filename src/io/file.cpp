#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "io/atomic_file.h"
#include "quantal/io.h"

namespace quantal {
namespace io {

void fail_errno(const std::string& where, const std::string& path) {
  const int code = errno;
  fail(Errc::kIo, where + ": " + std::strerror(code), {.path = path});
}

}  // namespace io

namespace {

std::string folder_of(const std::string& path) {
  const std::size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

/// Closes a descriptor when it leaves scope.
struct Descriptor {
  int fd = -1;
  explicit Descriptor(int opened) : fd(opened) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

/// Opens a regular file for reading and returns its size. O_NONBLOCK: opening a pipe must not wait.
std::size_t open_regular(const std::string& path, Descriptor& file) {
  file.fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file.fd < 0) io::fail_errno("io.open", path);
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) io::fail_errno("io.stat", path);
  if (!S_ISREG(status.st_mode)) {
    fail(Errc::kIo, "io.open: path is not a regular file, expected one", {.path = path});
  }
  return static_cast<std::size_t>(status.st_size);
}

}  // namespace

// ------------------------------------------------------------------ reading

MappedFile::MappedFile(const std::string& path) : path_(path) {
  Descriptor file(-1);
  const std::size_t size = open_regular(path, file);
  if (size == 0) return;  // an empty mapping is not allowed; an empty span says the same
  void* mapped = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (mapped == MAP_FAILED) io::fail_errno("io.mmap", path);
  data_ = static_cast<const std::uint8_t*>(mapped);
  size_ = size;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::uint8_t*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::string read_text_file(const std::string& path, std::size_t max_bytes) {
  Descriptor file(-1);
  const std::size_t size = open_regular(path, file);
  if (size > max_bytes) {
    fail(Errc::kCorrupt,
         "io.read_text: file size is " + std::to_string(size) + " bytes, expected at most " +
             std::to_string(max_bytes),
         {.path = path});
  }
  std::string text(size, '\0');
  std::size_t done = 0;
  while (done < size) {
    const ssize_t got = ::read(file.fd, text.data() + done, size - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) io::fail_errno("io.read", path);
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  text.resize(done);
  return text;
}

// ------------------------------------------------------------------ writing

namespace io {

void sync_folder(const std::string& folder) {
  const Descriptor handle(::open(folder.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECTORY));
  if (handle.fd < 0) return;
  if (::fsync(handle.fd) != 0 && errno != EINVAL && errno != ENOTSUP) {
    fail_errno("io.fsync", folder);
  }
}

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
  static std::atomic<unsigned> counter{0};
  for (int attempt = 0; attempt < 100; ++attempt) {
    temporary_ = path + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter++);
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ >= 0) return;
    if (errno != EEXIST) break;
  }
  fail_errno("io.create", std::exchange(temporary_, ""));
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::uint8_t> bytes) {
  write_at(size_, bytes);
  size_ += bytes.size();
}

void AtomicFile::write(std::string_view text) {
  write({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

void AtomicFile::write_at(std::uint64_t offset, std::span<const std::uint8_t> bytes) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t wrote = ::pwrite(descriptor_, bytes.data() + done, bytes.size() - done,
                                   static_cast<off_t>(offset + done));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) fail_errno("io.write", temporary_);
    done += static_cast<std::size_t>(wrote);
  }
}

void AtomicFile::seal() {
  if (descriptor_ < 0) return;
  if (::fsync(descriptor_) != 0) fail_errno("io.fsync", temporary_);
  if (::close(std::exchange(descriptor_, -1)) != 0) fail_errno("io.close", temporary_);
}

void AtomicFile::commit() {
  seal();
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_errno("io.rename", path_);
  temporary_.clear();
  sync_folder(folder_of(path_));
}

}  // namespace io

void write_file_atomic(const std::string& path, std::span<const std::uint8_t> bytes) {
  io::AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

}  // namespace quantal
