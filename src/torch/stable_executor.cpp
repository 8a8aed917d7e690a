#include "torch/stable_executor.h"

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>

namespace quantal {
namespace {

class StableExecutor final : public Executor {
 public:
  int num_threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }

  void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                    const std::function<void(std::int64_t, std::int64_t)>& body) const override {
    if (begin >= end) return;
    // The C boundary of the stable ABI turns exceptions into codes without their message, so the
    // first one is carried around it.
    std::mutex mutex;
    std::exception_ptr first;
    torch::stable::parallel_for(begin, end, grain < 1 ? 1 : grain,
                                [&](std::int64_t from, std::int64_t to) {
                                  try {
                                    body(from, to);
                                  } catch (...) {
                                    const std::lock_guard lock(mutex);
                                    if (!first) first = std::current_exception();
                                  }
                                });
    if (first) std::rethrow_exception(first);
  }
};

}  // namespace

const Executor& stable_executor() {
  static const StableExecutor executor;
  return executor;
}

}  // namespace quantal
