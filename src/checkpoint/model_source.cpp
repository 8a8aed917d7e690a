#include "checkpoint/sources.h"

namespace quantal {
namespace checkpoint {

RowShape row_shape(std::span<const std::int64_t> shape) {
  if (shape.empty()) return {};
  return {checked_numel(shape.first(shape.size() - 1), "rows"), shape.back()};
}

void check_row_range(const RowShape& shape, std::int64_t row_begin, std::int64_t row_end,
                     DType dtype, const ErrorSite& site) {
  if (row_begin < 0 || row_end < row_begin || row_end > shape.rows) {
    fail(Errc::kShape,
         "read_rows: range is [" + std::to_string(row_begin) + ", " + std::to_string(row_end) +
             "), expected one inside [0, " + std::to_string(shape.rows) + ")",
         site);
  }
  if (!is_weight_dtype(dtype)) {
    fail(Errc::kDtype,
         "read_rows: dtype is " + std::string(dtype_name(dtype)) + ", expected f32, f16 or bf16",
         site);
  }
}

}  // namespace checkpoint

std::unique_ptr<ModelSource> ModelSource::open(const std::string& path) {
  const checkpoint::Located where = checkpoint::locate(path);
  return where.container == Container::kGguf ? checkpoint::open_gguf_source(where.files.front())
                                             : checkpoint::open_file_source(where);
}

}  // namespace quantal
