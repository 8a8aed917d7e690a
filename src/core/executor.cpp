#include "quantal/core.h"

namespace quantal {
namespace {

class SerialExecutor final : public Executor {
 public:
  int num_threads() const override { return 1; }
  void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t /*grain*/,
                    const std::function<void(std::int64_t, std::int64_t)>& body) const override {
    if (begin < end) body(begin, end);
  }
};

}  // namespace

const Executor& serial_executor() {
  static const SerialExecutor executor;
  return executor;
}

}  // namespace quantal
