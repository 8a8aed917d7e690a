#include "checkpoint/folder.h"

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <utility>

#include "checkpoint/companions.h"
#include "checkpoint/locate.h"
#include "io/atomic_file.h"
#include "quantal/core.h"

namespace quantal::checkpoint {
namespace {

namespace fs = std::filesystem;

std::string without_trailing_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

std::string unique_beside(const std::string& target, const char* word) {
  static std::atomic<unsigned> counter{0};
  return target + word + std::to_string(::getpid()) + "-" + std::to_string(counter++);
}

void move(const std::string& from, const std::string& to) {
  std::error_code error;
  fs::rename(from, to, error);
  if (error)
    fail(Errc::kIo, "checkpoint: rename to " + to + ": " + error.message(), {.path = from});
}

/// Moves what `fresh` lacks out of `old`.
void keep_companions(const std::string& old, const std::string& fresh) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(old, error)) {
    const std::string name = entry.path().filename().string();
    if (is_weights_name(name) || is_quantization_file(name) || fs::exists(fresh + "/" + name))
      continue;
    move(entry.path().string(), fresh + "/" + name);
  }
}

}  // namespace

AtomicFolder::AtomicFolder(const std::string& target, bool overwrite)
    : target_(without_trailing_slash(target)) {
  std::error_code error;
  const fs::file_status status = fs::status(target_, error);
  if (fs::exists(status) && !fs::is_directory(status)) {
    fail(Errc::kIo, "checkpoint: target is a file, expected a folder or nothing",
         {.path = target_});
  }
  const bool foreign = fs::is_directory(status) && !fs::is_empty(target_, error) &&
                       !fs::exists(target_ + "/" + kMarker, error);
  if (foreign && !overwrite) {
    fail(Errc::kConfig,
         "checkpoint: folder exists and was not written by quantal; pass overwrite to replace its "
         "weights and config",
         {.path = target_});
  }
  const fs::path parent = fs::path(target_).parent_path();
  if (!parent.empty()) fs::create_directories(parent, error);  // creating the next reports failures
  temporary_ = unique_beside(target_, ".tmp-");
  if (!fs::create_directory(temporary_, error)) {
    const std::string why = error ? error.message() : "it exists already";
    const std::string failed = std::exchange(temporary_, {});
    fail(Errc::kIo, "checkpoint: cannot create folder: " + why, {.path = failed});
  }
}

AtomicFolder::~AtomicFolder() {
  std::error_code ignored;
  if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
}

void AtomicFolder::commit() {
  io::sync_folder(temporary_);
  std::error_code error;
  if (!fs::exists(target_, error)) {
    move(temporary_, target_);
    temporary_.clear();
  } else {
    const std::string old = unique_beside(target_, ".old-");
    move(target_, old);
    try {
      move(temporary_, target_);
    } catch (const Error&) {
      fs::rename(old, target_, error);  // back to how it was
      throw;
    }
    temporary_.clear();
    keep_companions(old, target_);
    fs::remove_all(old, error);
  }
  const std::string parent = fs::path(target_).parent_path().string();
  io::sync_folder(parent.empty() ? "." : parent);
}

}  // namespace quantal::checkpoint
