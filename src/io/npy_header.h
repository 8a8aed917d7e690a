// The header of a .npy file: a Python dict literal with descr, fortran_order and shape.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "quantal/core.h"

namespace quantal::io {

struct NpyHeader {
  std::string descr;
  bool fortran_order = false;
  std::vector<std::int64_t> shape;
};

/// Parses the dict literal. `offset` is its place in the file. Throws Error{kCorrupt} with path and
/// offset; Error{kUnsupported} for a structured descr.
NpyHeader parse_npy_header(std::string_view text, std::int64_t offset, const std::string& path);

}  // namespace quantal::io
