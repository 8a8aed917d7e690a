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

/// Length of the dict literal, and where it begins.
struct HeaderPlace {
  std::size_t begin = 0;
  std::size_t bytes = 0;
};

HeaderPlace find_header(std::span<const std::uint8_t> file, const std::string& path) {
  if (file.size() < 10 || !std::equal(kMagic.begin(), kMagic.end(), file.begin())) {
    fail(Errc::kCorrupt, "npy: file does not begin with \\x93NUMPY, a version and a length",
         {.path = path, .offset = 0});
  }
  const unsigned major = file[6];
  if (major < 1 || major > 3) {
    fail(Errc::kUnsupported, "npy: version is " + std::to_string(major) + ", expected 1, 2 or 3",
         {.path = path, .offset = 6});
  }
  HeaderPlace place{.begin = major == 1 ? 10u : 12u, .bytes = 0};
  if (file.size() < place.begin) {
    fail(Errc::kCorrupt, "npy: file ends inside the header length", {.path = path, .offset = 8});
  }
  for (std::size_t i = 8; i < place.begin; ++i) {
    place.bytes |= static_cast<std::size_t>(file[i]) << (8 * (i - 8));
  }
  if (place.bytes > file.size() - place.begin) {
    fail(Errc::kCorrupt,
         "npy: header length is " + std::to_string(place.bytes) + ", expected at most " +
             std::to_string(file.size() - place.begin),
         {.path = path, .offset = 8});
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

void swap_elements(std::vector<std::uint8_t>& bytes, std::size_t size) {
  for (std::size_t i = 0; i < bytes.size(); i += size) {
    std::reverse(bytes.begin() + static_cast<std::ptrdiff_t>(i),
                 bytes.begin() + static_cast<std::ptrdiff_t>(i + size));
  }
}

/// Column-major to row-major: walks the source in order and counts the index up, first axis
/// fastest.
void reorder_fortran(Tensor& tensor) {
  const std::size_t rank = tensor.shape.size();
  if (rank < 2 || tensor.bytes.empty()) return;
  const std::size_t size = dtype_size(tensor.dtype);
  std::vector<std::size_t> stride(rank, size);
  for (std::size_t d = rank - 1; d > 0; --d) {
    stride[d - 1] = stride[d] * static_cast<std::size_t>(tensor.shape[d]);
  }
  std::vector<std::uint8_t> out(tensor.bytes.size());
  std::vector<std::int64_t> index(rank, 0);
  std::size_t target = 0;
  for (std::size_t source = 0; source < out.size(); source += size) {
    std::memcpy(out.data() + target, tensor.bytes.data() + source, size);
    for (std::size_t d = 0; d < rank; ++d) {
      target += stride[d];
      if (++index[d] < tensor.shape[d]) break;
      target -= stride[d] * static_cast<std::size_t>(tensor.shape[d]);
      index[d] = 0;
    }
  }
  tensor.bytes = std::move(out);
}

}  // namespace

Tensor read_npy(const std::string& path) {
  const MappedFile mapped(path);
  const auto file = mapped.bytes();
  const HeaderPlace place = find_header(file, path);
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + place.begin,
                              place.bytes);
  io::NpyHeader header = io::parse_npy_header(text, static_cast<std::int64_t>(place.begin), path);
  bool swapped = false;
  const ErrorSite at_header{.path = path, .offset = static_cast<std::int64_t>(place.begin)};
  const DType dtype = parse_descr(header.descr, swapped, at_header);

  const auto data = file.subspan(place.begin + place.bytes);
  std::int64_t needed = -1;
  try {
    needed = checked_mul(checked_numel(header.shape, "npy: shape"),
                         static_cast<std::int64_t>(dtype_size(dtype)), "npy: bytes");
  } catch (const Error&) {
    fail(Errc::kCorrupt, "npy: shape " + shape_string(header.shape) + " overflows", at_header);
  }
  if (needed != static_cast<std::int64_t>(data.size())) {
    fail(Errc::kCorrupt,
         "npy: data is " + std::to_string(data.size()) + " bytes, expected " +
             std::to_string(needed) + " for '" + header.descr + "' " + shape_string(header.shape),
         {.path = path, .offset = at_header.offset + static_cast<std::int64_t>(place.bytes)});
  }
  Tensor tensor{dtype, std::move(header.shape), {data.begin(), data.end()}};
  if (swapped) swap_elements(tensor.bytes, dtype_size(dtype));
  if (header.fortran_order) reorder_fortran(tensor);
  return tensor;
}

void write_npy(const std::string& path, const TensorView& tensor) {
  const std::int64_t bytes = checked_mul(
      tensor.numel(), static_cast<std::int64_t>(dtype_size(tensor.dtype)), "npy: bytes");
  check_size("npy: tensor bytes", tensor.bytes.size(), static_cast<std::size_t>(bytes),
             {.path = path});
  std::string code;
  for (const NpyDtype& known : kNpyDtypes) {
    if (known.dtype == tensor.dtype) code = known.code;
  }
  if (code.empty()) {
    fail(Errc::kDtype,
         "npy: dtype is " + std::string(dtype_name(tensor.dtype)) +
             ", which the format cannot express",
         {.path = path});
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
         {.path = path});
  }
  const std::uint8_t version_and_length[4] = {1, 0, static_cast<std::uint8_t>(text.size() & 0xFF),
                                              static_cast<std::uint8_t>(text.size() >> 8)};
  io::AtomicFile file(path);
  file.write(kMagic);
  file.write(version_and_length);
  file.write(text);
  file.write(tensor.bytes);
  file.commit();
}

}  // namespace quantal
