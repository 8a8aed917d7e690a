// A device for tests: tensors of torch's PrivateUse1 on two pretended devices. Their memory is
// pages that nobody may touch but the copies of this file, so whatever reads a device's memory as
// if it were the host's ends the program. Views are torch's own; every other operator is the CPU's,
// on copies, as backends do that lack a kernel.
//
// A library of its own that tests load: it must not be part of programs that test something else,
// since torch asks an accelerator that is there for many things.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;

// ------------------------------------------------------------------ what tests ask

struct Counts {
  std::mutex mutex;
  std::map<void*, std::size_t> pages;  // of every allocation
  std::size_t bytes = 0, peak = 0, limit = std::size_t{1} << 40;
  std::int64_t transfers = 0;       // between host and device, but for those of the fallback
  std::set<std::string> operators;  // that were called and are no views
};
Counts& counts() {
  static Counts all;
  return all;
}
thread_local int inside_fallback = 0;
thread_local c10::DeviceIndex current = 0;

// ------------------------------------------------------------------ memory

std::size_t whole_pages(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

void release(void* memory) {
  Counts& c = counts();
  const std::lock_guard lock(c.mutex);
  const auto found = c.pages.find(memory);
  munmap(memory, whole_pages(found->second));
  c.bytes -= found->second;
  c.pages.erase(found);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device place(kDevice, current);
    if (bytes == 0) return {nullptr, nullptr, &release, place};
    Counts& c = counts();
    const std::lock_guard lock(c.mutex);
    TORCH_CHECK_WITH(OutOfMemoryError, c.bytes + bytes <= c.limit,
                     "test device out of memory: tried to allocate ", bytes, " bytes");
    void* memory = mmap(nullptr, whole_pages(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "test device: no memory");
    c.pages[memory] = bytes;
    c.bytes += bytes;
    c.peak = std::max(c.peak, c.bytes);
    return {memory, memory, &release, place};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override;
};
Memory memory;
REGISTER_ALLOCATOR(kDevice, &memory);

/// Makes the memory behind a tensor of the device the host's for a while.
class Opened {
 public:
  explicit Opened(const void* begin, std::size_t bytes)
      : begin_(const_cast<void*>(begin)), bytes_(whole_pages(bytes)) {
    if (bytes_ != 0) mprotect(begin_, bytes_, PROT_READ | PROT_WRITE);
  }
  explicit Opened(const at::Tensor& t)
      : Opened(t.is_cpu() ? nullptr : t.storage().data(), t.is_cpu() ? 0 : t.storage().nbytes()) {}
  ~Opened() {
    if (bytes_ != 0) mprotect(begin_, bytes_, PROT_NONE);
  }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

 private:
  void* begin_;
  std::size_t bytes_;
};

void Memory::copy_data(void* to, const void* from, std::size_t bytes) const {
  const Opened source(from, bytes), target(to, bytes);
  default_copy_data(to, from, bytes);
}

/// The host's view of memory that is open.
at::Tensor on_host(const at::Tensor& t) {
  if (t.is_cpu()) return t;
  return at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(),
                       at::TensorOptions().dtype(t.dtype()));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool /*non_blocking*/) {
  if (from.is_cpu() != to.is_cpu() && inside_fallback == 0) ++counts().transfers;
  if (from.numel() == 0) return to;
  const Opened source(from), target(to);
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

// Sizes are SymInts where torch's schemas say so: a caller's boxes hold nothing else.
using Sizes = c10::SymIntArrayRef;
at::IntArrayRef numbers(Sizes sizes) { return C10_AS_INTARRAYREF_SLOW(sizes); }
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(Sizes sizes, std::optional<at::ScalarType> type,
                 std::optional<at::Layout> /*layout*/, std::optional<at::Device> device,
                 std::optional<bool> /*pinned*/, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(at::Device(kDevice, current)));
  return at::detail::empty_generic(numbers(sizes), &memory, kKeys, at::dtype_or_default(type),
                                   format);
}

at::Tensor empty_strided(Sizes sizes, Sizes strides, std::optional<at::ScalarType> type,
                         std::optional<at::Layout> /*layout*/, std::optional<at::Device> device,
                         std::optional<bool> /*pinned*/) {
  const c10::DeviceGuard guard(device.value_or(at::Device(kDevice, current)));
  return at::detail::empty_strided_generic(numbers(sizes), numbers(strides), &memory, kKeys,
                                           at::dtype_or_default(type));
}

const at::Tensor& resize(const at::Tensor& t, Sizes sizes,
                         std::optional<at::MemoryFormat> /*format*/) {
  const auto bytes =
      static_cast<std::size_t>(c10::multiply_integers(numbers(sizes))) * t.element_size();
  if (bytes > t.storage().nbytes()) {
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(t.storage(), bytes);
  }
  t.unsafeGetTensorImpl()->set_sizes_contiguous(numbers(sizes));
  return t;
}

at::Tensor as_strided(const at::Tensor& t, Sizes sizes, Sizes strides,
                      std::optional<c10::SymInt> offset) {
  const auto at = offset ? std::optional(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(t, numbers(sizes), numbers(strides), at);
}
at::Tensor view(const at::Tensor& t, Sizes sizes) { return at::native::view(t, numbers(sizes)); }
at::Tensor reshape_alias(const at::Tensor& t, Sizes sizes, Sizes strides) {
  return at::native::_reshape_alias(t, numbers(sizes), numbers(strides));
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  {
    Counts& c = counts();
    const std::lock_guard lock(c.mutex);
    const auto& name = op.operator_name();
    c.operators.insert(name.overload_name.empty() ? name.name
                                                  : name.name + "." + name.overload_name);
  }
  ++inside_fallback;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    --inside_fallback;
    throw;
  }
  --inside_fallback;
}

// ------------------------------------------------------------------ what torch asks of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device d) const override {
    const c10::Device before = getDevice();
    setDevice(d);
    return before;
  }
  c10::Device getDevice() const override { return {kDevice, current}; }
  void setDevice(c10::Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  c10::Stream getStream(c10::Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex /*device*/) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex /*device*/) const override {
    return at::detail::getDefaultCPUGenerator();  // the fallback draws there
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, std::size_t bytes) const override {
    at::DataPtr fresh = memory.allocate(bytes);
    const std::size_t kept = std::min(bytes, storage.nbytes());
    if (kept != 0) memory.copy_data(fresh.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::register_privateuse1_backend("pretended");
  return true;
}();

// ------------------------------------------------------------------ the tests' questions

std::int64_t transfers() { return std::exchange(counts().transfers, 0); }

/// Bytes beyond those that are held now that were held at once since the last question.
std::int64_t peak_bytes() {
  Counts& c = counts();
  const std::lock_guard lock(c.mutex);
  const auto beyond = static_cast<std::int64_t>(c.peak - c.bytes);
  c.peak = c.bytes;
  return beyond;
}

/// Lets so many bytes be held beyond those that are, whose number it returns.
std::int64_t limit(std::int64_t bytes) {
  Counts& c = counts();
  const std::lock_guard lock(c.mutex);
  c.limit = c.bytes + static_cast<std::size_t>(bytes);
  return static_cast<std::int64_t>(c.bytes);
}

std::vector<std::string> operators() {
  Counts& c = counts();
  const std::lock_guard lock(c.mutex);
  std::vector<std::string> names(c.operators.begin(), c.operators.end());
  c.operators.clear();
  return names;
}

}  // namespace

TORCH_LIBRARY(quantal_test_device, m) {
  m.def("transfers() -> int", transfers);
  m.def("peak_bytes() -> int", peak_bytes);
  m.def("limit(int bytes) -> int", limit);
  m.def("operators() -> str[]", operators);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m){
    KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
        KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp) KERNEL_PRIVATEUSEONE(mm,
                                                                              lower_precision_fp)
            KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)} TORCH_LIBRARY_IMPL(_,
                                                                                AutocastPrivateUse1,
                                                                                m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
