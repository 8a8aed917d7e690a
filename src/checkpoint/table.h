// Plain text tables.
#pragma once

#include <string>
#include <vector>

namespace quantal::checkpoint {

using Row = std::vector<std::string>;

/// Columns padded to their widest cell; those named in `right` are right-aligned. Rows may be
/// shorter than `right`.
std::string table(const std::vector<Row>& rows, const std::vector<bool>& right);

}  // namespace quantal::checkpoint
