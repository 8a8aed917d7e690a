#include "torch/cuda_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <optional>
#include <utility>

#include "quantal/core.h"

namespace quantal {
namespace {

constexpr const char* kFile = "libquantal_cuda.so";
constexpr const char* kTorch = "libtorch_cuda.so";

std::string last_dl_error() {
  const char* text = dlerror();
  return text != nullptr ? text : "no reason given";
}

/// The function of torch that gives its current stream, null without CUDA. Looked up by name: a
/// reference would bind this library to one build of torch.
using StreamFunction = int (*)(std::int32_t device, void** stream);
StreamFunction stream_function() {
  static const StreamFunction function = [] {
    void* torch = dlopen(kTorch, RTLD_LAZY | RTLD_NOLOAD);
    return torch == nullptr ? nullptr
                            : reinterpret_cast<StreamFunction>(
                                  dlsym(torch, "aoti_torch_get_current_cuda_stream"));
  }();
  return function;
}

/// Paths to try, in order.
std::string library_path() {
  const char* named = std::getenv("QUANTAL_CUDA_LIBRARY");
  if (named != nullptr && *named != '\0') return named;
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&last_dl_error), &info) != 0 && info.dli_fname) {
    const auto beside = std::filesystem::path(info.dli_fname).parent_path() / kFile;
    std::error_code error;
    if (std::filesystem::exists(beside, error)) return beside.string();
  }
  return kFile;
}

CudaLibrary opened() {
  const std::string path = library_path();
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return {nullptr, last_dl_error() + " (it is built with QUANTAL_BUILD_CUDA=ON)"};
  }
  using Entry = const quantal_cuda_interface* (*)(std::int32_t);
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "quantal_cuda"));
  const quantal_cuda_interface* functions =
      entry == nullptr ? nullptr : entry(QUANTAL_CUDA_VERSION);
  if (functions == nullptr) {
    return {nullptr, path + " has another interface, expected version " +
                         std::to_string(QUANTAL_CUDA_VERSION)};
  }
  quantal_cuda_status status{};
  if (functions->probe(0, &status) != QUANTAL_CUDA_OK) return {nullptr, status.text};
  return {functions, path};
}

CudaLibrary found() {
  const char* asked = std::getenv("QUANTAL_CUDA");
  const std::string value = asked != nullptr ? asked : "";
  if (value.empty() || value == "0") {
    return {nullptr, "off: QUANTAL_CUDA=1 turns them on, no GPU has run them yet (docs/cuda.md)"};
  }
  if (value != "1") return {nullptr, "QUANTAL_CUDA is '" + value + "', expected 0 or 1"};
  if (stream_function() == nullptr) return {nullptr, "torch is a build without CUDA"};
  return opened();
}

std::optional<CudaLibrary>& replaced() {
  static std::optional<CudaLibrary> library;
  return library;
}

}  // namespace

const CudaLibrary& cuda_library() {
  if (replaced()) return *replaced();
  static const CudaLibrary library = found();
  return library;
}

void use_cuda_library(CudaLibrary library) { replaced() = std::move(library); }

quantal_cuda_stream current_cuda_stream(int device) {
  if (replaced()) return {device, nullptr};
  void* stream = nullptr;
  const StreamFunction function = stream_function();
  if (function == nullptr || function(device, &stream) != 0) {
    fail(Errc::kDevice, "quantal: torch gave no stream of device " + std::to_string(device) +
                            ", expected its current one");
  }
  return {device, stream};
}

void check_cuda(int code, const quantal_cuda_status& status) {
  switch (code) {
    case QUANTAL_CUDA_OK:
      return;
    case QUANTAL_CUDA_SHAPE:
      fail(Errc::kShape, status.text);
    case QUANTAL_CUDA_CONFIG:
      fail(Errc::kConfig, status.text);
    case QUANTAL_CUDA_DTYPE:
      fail(Errc::kDtype, status.text);
    case QUANTAL_CUDA_UNSUPPORTED:
      fail(Errc::kUnsupported, status.text);
    case QUANTAL_CUDA_DEVICE:
    case QUANTAL_CUDA_FAILED:
      fail(Errc::kDevice, status.text);
    default:
      fail(Errc::kInternal, status.text);
  }
}

}  // namespace quantal
