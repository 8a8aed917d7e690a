// Plain text tables.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace quantal::checkpoint {

using Row = std::vector<std::string>;

/// Columns padded to their widest cell; those named in `right` are right-aligned. Rows may be
/// shorter than `right`.
std::string table(const std::vector<Row>& rows, const std::vector<bool>& right);

/// File names and metadata may hold anything: control characters must not reach a terminal. Cut to
/// about `most` bytes, between characters of UTF-8.
std::string printable(const std::string& text, std::size_t most);

}  // namespace quantal::checkpoint
