#include "kernels/cuda_machine.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/half.h"
#include "kernels/cuda/start.h"
#include "quantal/core.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace quantal::testing {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

/// The stack of thread number `index`, kept for the next kernel.
unsigned char* stack_of(std::size_t index) {
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= index) {
    stacks.push_back(std::make_unique_for_overwrite<unsigned char[]>(kStackBytes));
  }
  return stacks[index].get();
}

/// Where a thread stands.
enum class At { kRunning, kWarp, kBlock, kDone };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  ucontext_t context{};
  unsigned char* stack = nullptr;
  At at = At::kRunning;
  const char* operation = nullptr;  // of the warp
  std::vector<Copy> open;           // copies not yet committed
  std::deque<std::vector<Copy>> groups;
  void* fake_stack = nullptr;
};

/// What the lanes of a warp show each other: two sets, so that one barrier per operation is enough.
struct Warp {
  std::array<std::array<std::array<std::uint64_t, 8>, cuda::kWarp>, 2> words{};
  std::array<unsigned, cuda::kWarp> count{};  // operations of each lane
};

class Machine {
 public:
  Machine(const cuda::Geometry& geometry, ThreadOrder order, const std::function<void()>& body)
      : geometry_(geometry), order_(order), body_(body) {
    threads_.resize(static_cast<std::size_t>(geometry.threads));
    for (std::size_t i = 0; i < threads_.size(); ++i) threads_[i].stack = stack_of(i);
    shared_.resize(static_cast<std::size_t>(geometry.shared_bytes / 16 + 1));
  }

  void run_block(std::int64_t x, std::int64_t y) {
    block_x = x;
    block_y = y;
    std::memset(static_cast<void*>(shared_.data()), 0xCB, shared_.size() * sizeof(shared_[0]));
    warps_.assign((threads_.size() + cuda::kWarp - 1) / cuda::kWarp, {});
    for (Thread& t : threads_) start(t);
    while (!all(At::kDone)) {
      // A warp runs to its next barrier of the block before another one does anything.
      for (std::size_t i = 0; i < warps_.size(); ++i) {
        const std::size_t w = order_ == ThreadOrder::kAscending ? i : warps_.size() - 1 - i;
        while (run_warp(w)) {
        }
      }
      release_block();
    }
  }

  Thread& thread() { return threads_[current_]; }
  int index() const { return static_cast<int>(current_); }
  Warp& warp() { return warps_[current_ / cuda::kWarp]; }
  unsigned char* shared() { return reinterpret_cast<unsigned char*>(shared_.data()); }
  void wait(At at, const char* operation) {
    thread().at = at;
    thread().operation = operation;
    switch_context(thread().context, scheduler_, &thread().fake_stack, scheduler_stack_);
  }

  std::int64_t block_x = 0, block_y = 0;

 private:
  static void entry();

  void start(Thread& t) {
    t.at = At::kRunning;
    t.open.clear();
    t.groups.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStackBytes;
    t.context.uc_link = nullptr;
    makecontext(&t.context, &Machine::entry, 0);
  }
  void resume(std::size_t k) {
    current_ = k;
    switch_context(scheduler_, threads_[k].context, &scheduler_fake_,
                   {threads_[k].stack, kStackBytes});
  }
  struct Stack {
    const void* bottom = nullptr;
    std::size_t bytes = 0;
  };
  void switch_context(ucontext_t& from, ucontext_t& to, [[maybe_unused]] void** fake,
                      [[maybe_unused]] Stack stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, stack.bottom, stack.bytes);
#endif
    swapcontext(&from, &to);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#endif
  }
  bool all(At at) const {
    for (const Thread& t : threads_) {
      if (t.at != at) return false;
    }
    return true;
  }
  /// Runs the threads of a warp to their next wait; true if the warp can go on then.
  bool run_warp(std::size_t w) {
    const std::size_t begin = w * cuda::kWarp;
    const std::size_t count = std::min<std::size_t>(cuda::kWarp, threads_.size() - begin);
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t k = begin + (order_ == ThreadOrder::kAscending ? i : count - 1 - i);
      if (threads_[k].at == At::kRunning) resume(k);
      if (failure_) std::rethrow_exception(failure_);
    }
    const char* operation = threads_[begin].operation;
    for (std::size_t k = begin; k < begin + count; ++k) {
      if (threads_[k].at != At::kWarp || threads_[k].operation != operation) return false;
    }
    for (std::size_t k = begin; k < begin + count; ++k) threads_[k].at = At::kRunning;
    return true;
  }
  void release_block() {
    for (Thread& t : threads_) {
      if (t.at == At::kWarp) {
        throw std::logic_error(std::string("not all threads of a warp reach ") + t.operation);
      }
      if (t.at == At::kBlock) t.at = At::kRunning;
    }
  }

  const cuda::Geometry& geometry_;
  ThreadOrder order_;
  const std::function<void()>& body_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<cuda::Words4> shared_;
  ucontext_t scheduler_{};
  void* scheduler_fake_ = nullptr;
  Stack scheduler_stack_;
  std::size_t current_ = 0;
  std::exception_ptr failure_;
};

Machine* g_machine = nullptr;
ThreadOrder g_order = ThreadOrder::kAscending;
int g_started = 0;
std::string g_failure;

void Machine::entry() {
  Machine& m = *g_machine;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack_.bottom, &m.scheduler_stack_.bytes);
#endif
  try {
    m.body_();
  } catch (...) {
    m.failure_ = std::current_exception();
  }
  m.wait(At::kDone, "end");
}

/// Shows `mine` to the warp and returns what every lane showed.
template <class T>
std::array<T, cuda::kWarp> exchange(const T& mine, const char* operation) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t) * 8);
  Machine& m = *g_machine;
  const auto lane = static_cast<std::size_t>(m.index() % cuda::kWarp);
  auto& set = m.warp().words[m.warp().count[lane]++ % 2];
  std::memcpy(set[lane].data(), &mine, sizeof(T));
  m.wait(At::kWarp, operation);
  std::array<T, cuda::kWarp> all;
  for (std::size_t l = 0; l < all.size(); ++l) std::memcpy(&all[l], set[l].data(), sizeof(T));
  return all;
}

std::size_t lane() { return static_cast<std::size_t>(g_machine->index() % cuda::kWarp); }

template <class T>
T shuffled(T v, int mask, const char* operation) {
  return exchange(v, operation)[lane() ^ static_cast<std::size_t>(mask)];
}

/// Element (row, col) of four 8 x 8 matrices side by side in the way of mma operands.
struct Operands {
  std::uint32_t a[4], b[2];
};

/// The words of a fragment that hold a's row `row` from position `k` (in words of the row) on.
std::uint32_t word_of_a(const std::array<Operands, cuda::kWarp>& all, std::size_t row,
                        std::size_t word) {
  return all[row % 8 * 4 + word % 4].a[row / 8 + word / 4 * 2];
}
std::uint32_t word_of_b(const std::array<Operands, cuda::kWarp>& all, std::size_t col,
                        std::size_t word) {
  return all[col * 4 + word % 4].b[word / 4];
}

template <class D, class Dot>
void multiply(D d[4], const std::uint32_t a[4], const std::uint32_t b[2], const char* operation,
              Dot dot) {
  const auto all = exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, operation);
  const std::size_t g = lane() / 4, t = lane() % 4;
  for (std::size_t i = 0; i < 4; ++i) {
    const std::size_t row = g + i / 2 * 8, col = 2 * t + i % 2;
    for (std::size_t word = 0; word < 8; ++word) {
      d[i] = dot(d[i], word_of_a(all, row, word), word_of_b(all, col, word));
    }
  }
}

void load_fragments(std::uint32_t out[4], const void* row, bool transposed) {
  const auto rows =
      exchange(static_cast<const std::uint16_t*>(row), transposed ? "ldmatrix.trans" : "ldmatrix");
  const std::size_t g = lane() / 4, t = lane() % 4;
  for (std::size_t i = 0; i < 4; ++i) {
    const auto at = [&](std::size_t r, std::size_t c) -> std::uint32_t {
      return rows[8 * i + r][c];
    };
    out[i] =
        transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
  }
}

}  // namespace

void set_thread_order(ThreadOrder order) { g_order = order; }
int kernels_started() { return std::exchange(g_started, 0); }
void fail_next_launch(std::string text) { g_failure = std::move(text); }

}  // namespace quantal::testing

namespace quantal::cuda {

using testing::g_machine;

void run_kernel(const Geometry& geometry, const std::function<void()>& body) {
  testing::Machine machine(geometry, testing::g_order, body);
  g_machine = &machine;
  ++testing::g_started;
  for (std::int64_t y = 0; y < geometry.blocks_y; ++y) {
    for (std::int64_t x = 0; x < geometry.blocks_x; ++x) machine.run_block(x, y);
  }
  g_machine = nullptr;
}

void check_device(int device) {
  if (device == 0) return;
  fail(Errc::kDevice, "cuda: device is " + std::to_string(device) + ", expected one of 1");
}
OnDevice::OnDevice(const char* name, Stream stream) : name_(name), stream_(stream) {
  check_device(stream.device);
  if (!testing::g_failure.empty()) {
    throw CudaFailure{std::string(name) + ": " + std::exchange(testing::g_failure, {})};
  }
}
OnDevice::~OnDevice() = default;
void OnDevice::finish() {}

int thread_index() { return g_machine->index(); }
std::int64_t block_x() { return g_machine->block_x; }
std::int64_t block_y() { return g_machine->block_y; }
unsigned char* shared_memory() { return g_machine->shared(); }
void block_sync() { g_machine->wait(testing::At::kBlock, "block"); }
void warp_sync() { testing::exchange(0, "warp"); }

float shuffle_xor(float v, int mask) { return testing::shuffled(v, mask, "shuffle float"); }
std::uint32_t shuffle_xor(std::uint32_t v, int mask) {
  return testing::shuffled(v, mask, "shuffle u32");
}
std::int32_t shuffle_xor(std::int32_t v, int mask) {
  return testing::shuffled(v, mask, "shuffle i32");
}
double shuffle_xor(double v, int mask) { return testing::shuffled(v, mask, "shuffle double"); }

void async_copy16(void* shared, const void* global, bool valid) {
  g_machine->thread().open.push_back({shared, global, valid});
}
void async_commit() {
  auto& t = g_machine->thread();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
void async_wait_all_but(int groups) {
  auto& t = g_machine->thread();
  while (t.groups.size() > static_cast<std::size_t>(groups)) {
    for (const auto& copy : t.groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    t.groups.pop_front();
  }
}

void prefetch(const void* global) { static_cast<void>(global); }

void load_matrices(std::uint32_t out[4], const void* row) {
  testing::load_fragments(out, row, false);
}
void load_matrices_transposed(std::uint32_t out[4], const void* row) {
  testing::load_fragments(out, row, true);
}

void multiply_f16(float d[4], const std::uint32_t a[4], const std::uint32_t b[2]) {
  testing::multiply(d, a, b, "mma f16", [](float d, std::uint32_t x, std::uint32_t y) {
    const auto low = [](std::uint32_t v) { return f16_to_f32(static_cast<std::uint16_t>(v)); };
    return d + low(x) * low(y) + low(x >> 16) * low(y >> 16);
  });
}
void multiply_bf16(float d[4], const std::uint32_t a[4], const std::uint32_t b[2]) {
  testing::multiply(d, a, b, "mma bf16", [](float d, std::uint32_t x, std::uint32_t y) {
    const auto low = [](std::uint32_t v) { return std::bit_cast<float>(v << 16); };
    const auto high = [](std::uint32_t v) { return std::bit_cast<float>(v & 0xFFFF0000U); };
    return d + low(x) * low(y) + high(x) * high(y);
  });
}
void multiply_s8(std::int32_t d[4], const std::uint32_t a[4], const std::uint32_t b[2]) {
  testing::multiply(d, a, b, "mma s8", [](std::int32_t d, std::uint32_t x, std::uint32_t y) {
    for (unsigned i = 0; i < 32; i += 8) {
      d += static_cast<std::int8_t>(x >> i & 255U) * static_cast<std::int8_t>(y >> i & 255U);
    }
    return d;
  });
}

}  // namespace quantal::cuda
