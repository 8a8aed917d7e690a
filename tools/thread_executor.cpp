#include "thread_executor.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <utility>

namespace quantal::tools {
namespace {

/// Set while this thread runs a body: nested loops do not wait for threads that wait for them.
thread_local bool inside_body = false;

}  // namespace

/// One loop: threads take chunks until none is left.
struct ThreadExecutor::Work {
  using Body = std::function<void(std::int64_t, std::int64_t)>;
  Work(std::int64_t first, std::int64_t last, std::int64_t size, const Body& function)
      : begin(first), end(last), chunk(size), body(function) {}

  std::int64_t begin, end, chunk;
  const Body& body;
  std::atomic<std::int64_t> next{0};
  int running = 0;  ///< workers inside, under the pool's mutex
  std::mutex error_mutex;
  std::exception_ptr error;

  void run() {
    const bool outer = std::exchange(inside_body, true);
    while (true) {
      const std::int64_t from = begin + next.fetch_add(1) * chunk;
      if (from >= end) break;
      try {
        body(from, std::min(end, from + chunk));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (error == nullptr) error = std::current_exception();
      }
    }
    inside_body = outer;
  }
};

ThreadExecutor::ThreadExecutor(int threads) {
  if (threads < 1) threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { run_worker(); });
}

ThreadExecutor::~ThreadExecutor() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadExecutor::run_worker() {
  std::shared_ptr<Work> last;  // a loop is joined once
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || (work_ != nullptr && work_ != last); });
    if (stop_) return;
    last = work_;
    ++last->running;
    lock.unlock();
    last->run();
    lock.lock();
    if (--last->running == 0) idle_.notify_all();
  }
}

void ThreadExecutor::parallel_for(
    std::int64_t begin, std::int64_t end, std::int64_t grain,
    const std::function<void(std::int64_t, std::int64_t)>& body) const {
  if (begin >= end) return;
  const std::int64_t most = ceil_div(end - begin, std::max<std::int64_t>(1, grain));
  if (most < 2 || workers_.empty() || inside_body) return body(begin, end);
  // A few chunks per thread level out bodies of different length.
  const std::int64_t chunks = std::min<std::int64_t>(most, 4 * num_threads());
  const auto work = std::make_shared<Work>(begin, end, ceil_div(end - begin, chunks), body);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    work_ = work;
  }
  wake_.notify_all();
  work->run();
  std::unique_lock<std::mutex> lock(mutex_);
  work_ = nullptr;
  idle_.wait(lock, [&] { return work->running == 0; });
  if (work->error != nullptr) std::rethrow_exception(work->error);
}

}  // namespace quantal::tools
