#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>

#include "policy/probe.h"

namespace quantal {
namespace policy {
namespace {

constexpr std::int64_t kKibi = 1024;

std::string read_text(const char* path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

/// The number at the start of `text`; nullopt for "max" and for anything else.
std::optional<std::int64_t> leading_number(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return std::nullopt;
  text.remove_prefix(begin);
  std::int64_t value = 0;
  const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (failure != std::errc{} || value < 0) return std::nullopt;
  return value;
}

/// The number after `key` at the start of a line.
std::optional<std::int64_t> field(std::string_view text, std::string_view key) {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = text.substr(at, end - at);
    if (line.starts_with(key)) return leading_number(line.substr(key.size()));
    at = end + 1;
  }
  return std::nullopt;
}

std::optional<std::int64_t> kibi_field(std::string_view text, std::string_view key) {
  const std::optional<std::int64_t> value = field(text, key);
  if (!value || *value > INT64_MAX / kKibi) return std::nullopt;
  return *value * kKibi;
}

/// What the control group of this process leaves: page cache that can be dropped counts as free.
void apply_group_limit(const MemoryFiles& files, MemoryInfo& info) {
  const std::optional<std::int64_t> limit = leading_number(files.limit);
  if (!limit || *limit >= info.total) return;
  info.total = *limit;
  const std::optional<std::int64_t> current = leading_number(files.current);
  if (!current) return;
  const std::int64_t held = *current - field(files.stat, "inactive_file ").value_or(0);
  const std::int64_t left = std::max<std::int64_t>(0, *limit - std::max<std::int64_t>(0, held));
  info.available = std::min(info.available.value_or(left), left);
}

}  // namespace

MemoryInfo parse_host_memory(const MemoryFiles& files) {
  MemoryInfo info;
  info.total = kibi_field(files.meminfo, "MemTotal:").value_or(0);
  info.available = kibi_field(files.meminfo, "MemAvailable:");
  info.allocated = kibi_field(files.status, "VmRSS:");
  apply_group_limit(files, info);
  return info;
}

}  // namespace policy

MemoryInfo host_memory() {
  MemoryInfo info =
      policy::parse_host_memory({.meminfo = policy::read_text("/proc/meminfo"),
                                 .limit = policy::read_text("/sys/fs/cgroup/memory.max"),
                                 .current = policy::read_text("/sys/fs/cgroup/memory.current"),
                                 .stat = policy::read_text("/sys/fs/cgroup/memory.stat"),
                                 .status = policy::read_text("/proc/self/status")});
  if (info.total == 0) {  // no /proc: POSIX knows the total at least
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    if (pages > 0 && size > 0) info.total = std::int64_t{pages} * size;
  }
  return info;
}

}  // namespace quantal
