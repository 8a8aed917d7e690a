#include <string>

#include "quantal/core.h"

namespace quantal {
namespace {

std::string with_site(std::string message, const ErrorSite& site) {
  std::string where;
  const auto add = [&where](const std::string& part) {
    where += where.empty() ? part : ", " + part;
  };
  if (!site.path.empty()) add("file=" + site.path);
  if (!site.tensor.empty()) add("tensor=" + site.tensor);
  if (site.offset >= 0) add("offset=" + std::to_string(site.offset));
  return where.empty() ? message : message + " (" + where + ")";
}

}  // namespace

std::string_view errc_name(Errc code) noexcept {
  switch (code) {
    case Errc::kConfig:
      return "Config";
    case Errc::kShape:
      return "Shape";
    case Errc::kDtype:
      return "Dtype";
    case Errc::kUnsupported:
      return "Unsupported";
    case Errc::kCorrupt:
      return "Corrupt";
    case Errc::kIo:
      return "Io";
    case Errc::kDevice:
      return "Device";
    case Errc::kInternal:
      return "Internal";
  }
  return "Internal";
}

Error::Error(Errc code, const std::string& message, ErrorSite site)
    : std::runtime_error(with_site(message, site)), code_(code), site_(std::move(site)) {}

void fail(Errc code, const std::string& message, ErrorSite site) {
  throw Error(code, message, std::move(site));
}

void check_size(std::string_view what, std::size_t actual, std::size_t expected,
                const ErrorSite& site) {
  if (actual == expected) return;
  fail(Errc::kShape,
       std::string(what) + " is " + std::to_string(actual) + ", expected " +
           std::to_string(expected),
       site);
}

}  // namespace quantal
