#include "io/npy.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "io/atomic_file.h"
#include "io/npy_header.h"
#include "quantal/io.h"

namespace quantal {
namespace {

struct NpyDtype {
  std::string_view code;  ///< without the byte order
  DType dtype;
};

// bf16 has no code in numpy; MLX writes it as two opaque bytes.
constexpr std::array<NpyDtype, 13> kNpyDtypes = {{{"f4", DType::kF32},
                                                  {"f2", DType::kF16},
                                                  {"V2", DType::kBF16},
                                                  {"f8", DType::kF64},
                                                  {"u1", DType::kU8},
                                                  {"i1", DType::kI8},
                                                  {"u2", DType::kU16},
                                                  {"i2", DType::kI16},
                                                  {"u4", DType::kU32},
                                                  {"i4", DType::kI32},
                                                  {"u8", DType::kU64},
                                                  {"i8", DType::kI64},
                                                  {"b1", DType::kBool}}};

constexpr std::array<std::uint8_t, 6> kMagic = {0x93, 'N', 'U', 'M', 'P', 'Y'};

ErrorSite moved(ErrorSite site, std::size_t by) {
  site.offset = std::max<std::int64_t>(site.offset, 0) + static_cast<std::int64_t>(by);
  return site;
}

/// Length of the dict literal, and where it begins.
struct HeaderPlace {
  std::size_t begin = 0;
  std::size_t bytes = 0;
};

HeaderPlace find_header(std::span<const std::uint8_t> head, const ErrorSite& site) {
  if (head.size() < 10 || !std::equal(kMagic.begin(), kMagic.end(), head.begin())) {
    fail(Errc::kCorrupt, "npy: file does not begin with \\x93NUMPY, a version and a length",
         moved(site, 0));
  }
  const unsigned major = head[6];
  if (major < 1 || major > 3) {
    fail(Errc::kUnsupported, "npy: version is " + std::to_string(major) + ", expected 1, 2 or 3",
         moved(site, 6));
  }
  HeaderPlace place{.begin = major == 1 ? 10u : 12u, .bytes = 0};
  if (head.size() < place.begin) {
    fail(Errc::kCorrupt, "npy: file ends inside the header length", moved(site, 8));
  }
  for (std::size_t i = 8; i < place.begin; ++i) {
    place.bytes |= static_cast<std::size_t>(head[i]) << (8 * (i - 8));
  }
  const std::size_t most = std::min(head.size(), io::kMostNpyHeader) - place.begin;
  if (place.bytes > most) {
    fail(Errc::kCorrupt,
         "npy: header length is " + std::to_string(place.bytes) + ", expected at most " +
             std::to_string(most),
         moved(site, 8));
  }
  return place;
}

/// Element type; `swapped` tells whether the bytes of an element stand in big-endian order.
DType parse_descr(const std::string& descr, bool& swapped, const ErrorSite& site) {
  const std::string_view orders = "<>|=";
  if (descr.size() == 3 && orders.find(descr[0]) != std::string_view::npos) {
    for (const NpyDtype& known : kNpyDtypes) {
      if (known.code != descr.substr(1)) continue;
      const bool opaque = known.dtype == DType::kBF16;
      if (dtype_size(known.dtype) > 1 && descr[0] == '|' && !opaque) break;
      swapped = descr[0] == '>' && dtype_size(known.dtype) > 1;
      return known.dtype;
    }
  }
  fail(Errc::kUnsupported,
       "npy: descr is '" + descr +
           "', expected a byte order and one of f2 f4 f8 u1 u2 u4 u8 i1 i2 i4 "
           "i8 b1 V2 (bfloat16)",
       site);
}

/// Column-major to row-major: walks the source in order and counts the index up, first axis
/// fastest.
void reorder_fortran(const io::NpyLayout& layout, std::vector<std::uint8_t>& data) {
  const std::size_t rank = layout.shape.size();
  if (rank < 2 || data.empty()) return;
  const std::size_t size = dtype_size(layout.dtype);
  std::vector<std::size_t> stride(rank, size);
  for (std::size_t d = rank - 1; d > 0; --d) {
    stride[d - 1] = stride[d] * static_cast<std::size_t>(layout.shape[d]);
  }
  std::vector<std::uint8_t> out(data.size());
  std::vector<std::int64_t> index(rank, 0);
  std::size_t target = 0;
  for (std::size_t source = 0; source < out.size(); source += size) {
    std::memcpy(out.data() + target, data.data() + source, size);
    for (std::size_t d = 0; d < rank; ++d) {
      target += stride[d];
      if (++index[d] < layout.shape[d]) break;
      target -= stride[d] * static_cast<std::size_t>(layout.shape[d]);
      index[d] = 0;
    }
  }
  data = std::move(out);
}

}  // namespace

namespace io {

NpyLayout read_npy_layout(std::span<const std::uint8_t> head, std::uint64_t bytes,
                          const ErrorSite& site) {
  const HeaderPlace place = find_header(head, site);
  const std::string_view text(reinterpret_cast<const char*>(head.data()) + place.begin,
                              place.bytes);
  const ErrorSite at_header = moved(site, place.begin);
  NpyHeader header = parse_npy_header(text, at_header.offset, site.path);
  NpyLayout layout;
  layout.dtype = parse_descr(header.descr, layout.swapped, at_header);
  layout.shape = std::move(header.shape);
  layout.fortran_order = header.fortran_order;
  layout.data_begin = place.begin + place.bytes;

  std::int64_t needed = -1;
  try {
    needed = checked_mul(checked_numel(layout.shape, "npy: shape"),
                         static_cast<std::int64_t>(dtype_size(layout.dtype)), "npy: bytes");
  } catch (const Error&) {
    fail(Errc::kCorrupt, "npy: shape " + shape_string(layout.shape) + " overflows", at_header);
  }
  const std::uint64_t there = bytes - layout.data_begin;
  if (static_cast<std::uint64_t>(needed) != there) {
    fail(Errc::kCorrupt,
         "npy: data is " + std::to_string(there) + " bytes, expected " + std::to_string(needed) +
             " for '" + header.descr + "' " + shape_string(layout.shape),
         moved(site, layout.data_begin));
  }
  layout.data_bytes = static_cast<std::size_t>(needed);
  return layout;
}

void swap_elements(std::span<std::uint8_t> bytes, std::size_t size) {
  for (std::size_t i = 0; i + size <= bytes.size(); i += size) {
    std::reverse(bytes.begin() + static_cast<std::ptrdiff_t>(i),
                 bytes.begin() + static_cast<std::ptrdiff_t>(i + size));
  }
}

void normalize_npy(const NpyLayout& layout, std::vector<std::uint8_t>& data) {
  if (layout.swapped) swap_elements(data, dtype_size(layout.dtype));
  if (layout.fortran_order) reorder_fortran(layout, data);
}

std::string npy_head(const TensorView& tensor, const ErrorSite& site) {
  const std::int64_t bytes = checked_mul(
      tensor.numel(), static_cast<std::int64_t>(dtype_size(tensor.dtype)), "npy: bytes");
  check_size("npy: tensor bytes", tensor.bytes.size(), static_cast<std::size_t>(bytes), site);
  std::string code;
  for (const NpyDtype& known : kNpyDtypes) {
    if (known.dtype == tensor.dtype) code = known.code;
  }
  if (code.empty()) {
    fail(Errc::kDtype,
         "npy: dtype is " + std::string(dtype_name(tensor.dtype)) +
             ", which the format cannot express",
         site);
  }
  std::string shape;
  for (const std::int64_t dim : tensor.shape) shape += std::to_string(dim) + ", ";
  if (tensor.shape.size() > 1) shape.resize(shape.size() - 2);
  if (tensor.shape.size() == 1) shape.resize(shape.size() - 1);
  std::string text = "{'descr': '" + std::string(dtype_size(tensor.dtype) == 1 ? "|" : "<") + code +
                     "', 'fortran_order': False, 'shape': (" + shape + "), }";
  // magic 6, version 2, length 2, text and '\n' together a multiple of 64, as numpy pads
  text.append((64 - (10 + text.size() + 1) % 64) % 64, ' ');
  text += '\n';
  if (text.size() > 0xFFFF) {
    fail(Errc::kConfig,
         "npy: shape has " + std::to_string(tensor.shape.size()) +
             " dimensions, too many for a version 1.0 header",
         site);
  }
  std::string head(kMagic.begin(), kMagic.end());
  for (const std::size_t byte :
       {std::size_t{1}, std::size_t{0}, text.size() & 0xFF, text.size() >> 8}) {
    head += static_cast<char>(byte);
  }
  return head + text;
}

}  // namespace io

Tensor read_npy(const std::string& path) {
  const MappedFile mapped(path);
  const auto file = mapped.bytes();
  io::NpyLayout layout = io::read_npy_layout(file, file.size(), {.path = path});
  const auto data = file.subspan(layout.data_begin, layout.data_bytes);
  std::vector<std::uint8_t> bytes(data.begin(), data.end());
  io::normalize_npy(layout, bytes);
  return {layout.dtype, std::move(layout.shape), std::move(bytes)};
}

void write_npy(const std::string& path, const TensorView& tensor) {
  const std::string head = io::npy_head(tensor, {.path = path});
  io::AtomicFile file(path);
  file.write(head);
  file.write(tensor.bytes);
  file.commit();
}

}  // namespace quantal
