// Which pages of a mapped file a piece of code reads. Linux.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace quantal::testing {

/// Takes the right to read away from every mapping of `path` that this process has. A page that is
/// read nevertheless is noted, and readable from then on. One at a time, one thread.
class TouchedPages {
 public:
  explicit TouchedPages(const std::string& path) {
    page_bytes() = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      if (!line.ends_with(" " + path)) continue;
      std::istringstream fields(line);
      std::uintptr_t begin = 0, end = 0, offset = 0;
      std::string rights;
      char dash = 0;
      fields >> std::hex >> begin >> dash >> end >> rights >> offset;
      mappings().push_back({begin, end, offset, std::vector<bool>((end - begin) / page_bytes())});
    }
    if (mappings().empty()) throw std::runtime_error(path + " is not mapped");
    struct sigaction action {};
    action.sa_sigaction = &TouchedPages::note;
    action.sa_flags = SA_SIGINFO;
    ::sigaction(SIGSEGV, &action, &before_);
    protect(PROT_NONE);
  }
  ~TouchedPages() {
    protect(PROT_READ);
    ::sigaction(SIGSEGV, &before_, nullptr);
    mappings().clear();
  }
  TouchedPages(const TouchedPages&) = delete;
  TouchedPages& operator=(const TouchedPages&) = delete;

  /// Pages that hold any of the bytes [begin, end) of the file, and how many of them were read.
  struct Count {
    std::int64_t all = 0, read = 0;
  };
  Count of(std::int64_t begin, std::int64_t end) const {
    Count count;
    const auto page = static_cast<std::int64_t>(page_bytes());
    for (std::int64_t at = begin / page; begin < end && at <= (end - 1) / page; ++at) {
      ++count.all;
      for (const Mapping& m : mappings()) {
        const std::int64_t own = at - static_cast<std::int64_t>(m.offset) / page;
        if (own < 0 || own >= std::ssize(m.read)) continue;
        if (m.read[static_cast<std::size_t>(own)]) {
          ++count.read;
          break;
        }
      }
    }
    return count;
  }

 private:
  struct Mapping {
    std::uintptr_t begin, end, offset;
    std::vector<bool> read;
  };
  // Reached from a signal handler: nothing is allocated there.
  static std::vector<Mapping>& mappings() {
    static std::vector<Mapping> all;
    return all;
  }
  static std::uintptr_t& page_bytes() {
    static std::uintptr_t bytes = 4096;
    return bytes;
  }
  static void protect(int rights) {
    for (const Mapping& m : mappings()) {
      ::mprotect(reinterpret_cast<void*>(m.begin), m.end - m.begin, rights);
    }
  }
  static void note(int signal, siginfo_t* info, void* /*context*/) {
    const auto at = reinterpret_cast<std::uintptr_t>(info->si_addr);
    for (Mapping& m : mappings()) {
      if (at < m.begin || at >= m.end) continue;
      const std::uintptr_t page = (at - m.begin) / page_bytes();
      m.read[page] = true;
      ::mprotect(reinterpret_cast<void*>(m.begin + page * page_bytes()), page_bytes(), PROT_READ);
      return;
    }
    ::signal(signal, SIG_DFL);  // somebody else's: let it happen again
  }

  struct sigaction before_ {};
};

}  // namespace quantal::testing
