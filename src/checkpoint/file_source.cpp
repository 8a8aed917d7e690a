#include <algorithm>
#include <cstring>

#include "checkpoint/sources.h"
#include "checkpoint/tensor_set.h"

namespace quantal::checkpoint {
namespace {

/// Converts `n` elements at any address.
void convert(DType from, const std::uint8_t* in, std::int64_t n, DType to, std::uint8_t* out) {
  constexpr std::int64_t kChunk = 2048;
  alignas(64) std::uint8_t aligned[kChunk * 4];
  float wide[kChunk];
  const auto in_size = static_cast<std::int64_t>(dtype_size(from));
  const auto out_size = static_cast<std::int64_t>(dtype_size(to));
  for (std::int64_t i = 0; i < n; i += kChunk) {
    const std::int64_t count = std::min(kChunk, n - i);
    std::memcpy(aligned, in + i * in_size, static_cast<std::size_t>(count * in_size));
    widen_to_f32(from, aligned, count, wide);
    narrow_from_f32(to, wide, count, aligned);
    std::memcpy(out + i * out_size, aligned, static_cast<std::size_t>(count * out_size));
  }
}

class FileSource : public ModelSource {
 public:
  explicit FileSource(const Located& where) : set_(open_tensor_set(where)) {
    for (const auto& [name, tensor] : set_.tensors) {
      if (tensor.kind != StateKind::kTensor) continue;
      infos_.push_back({name, tensor.shape, std::string(dtype_name(tensor.dtype)), tensor.bytes()});
    }
  }

  std::string config_json() const override { return set_.config_json(); }
  std::string tokenizer_json() const override { return "{}"; }
  const std::vector<Info>& tensors() const override { return infos_; }

  void read_rows(const std::string& name, std::int64_t row_begin, std::int64_t row_end, DType dtype,
                 void* out, const Executor& executor) const override {
    const ErrorSite site{.path = set_.path(), .tensor = name};
    const auto found = set_.tensors.find(name);
    if (found == set_.tensors.end()) fail(Errc::kConfig, "read_rows: no tensor of this name", site);
    const StoredTensor& stored = found->second;
    const RowShape shape = row_shape(stored.shape);
    check_row_range(shape, row_begin, row_end, dtype, site);
    if (!is_weight_dtype(stored.dtype)) {
      fail(Errc::kUnsupported,
           "read_rows: stored type is " + std::string(dtype_name(stored.dtype)) +
               ", expected f32, f16 or bf16",
           site);
    }
    const HeldTensor held = stored.read();
    const TensorView& view = held.view;
    const auto in_size = static_cast<std::int64_t>(dtype_size(view.dtype));
    const auto out_size = static_cast<std::int64_t>(dtype_size(dtype));
    const std::int64_t columns = shape.columns;
    auto* target = static_cast<std::uint8_t*>(out);
    executor.parallel_for(row_begin, row_end,
                          ceil_div(std::int64_t{1} << 16, std::max<std::int64_t>(columns, 1)),
                          [&](std::int64_t begin, std::int64_t end) {
                            const std::uint8_t* in = view.bytes.data() + begin * columns * in_size;
                            std::uint8_t* to = target + (begin - row_begin) * columns * out_size;
                            const std::int64_t n = (end - begin) * columns;
                            if (n == 0) return;
                            if (dtype == view.dtype) {
                              std::memcpy(to, in, static_cast<std::size_t>(n * in_size));
                            } else {
                              convert(view.dtype, in, n, dtype, to);
                            }
                          });
  }

 private:
  TensorSet set_;
  std::vector<Info> infos_;
};

}  // namespace

std::unique_ptr<ModelSource> open_file_source(const Located& where) {
  return std::make_unique<FileSource>(where);
}

}  // namespace quantal::checkpoint
