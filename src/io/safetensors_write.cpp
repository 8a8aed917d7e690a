#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>

#include "io/atomic_file.h"
#include "io/safetensors_dtypes.h"
#include "quantal/io.h"

namespace quantal {
namespace {

using NamedView = std::pair<std::string, TensorView>;

const io::SafetensorsDtype& dtype_entry(const NamedView& tensor) {
  for (const auto& known : io::kSafetensorsDtypes) {
    if (known.dtype == tensor.second.dtype) return known;
  }
  fail(Errc::kInternal, "safetensors: dtype has no name", {.tensor = tensor.first});
}

/// A JSON string literal. Throws Error{kConfig} for text that is not UTF-8.
std::string quoted(const std::string& text, const std::string& path) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    fail(Errc::kConfig, "safetensors: a name or metadata string is not valid UTF-8",
         {.path = path});
  }
}

std::vector<std::size_t> writing_order(std::span<const NamedView> tensors) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const int left = dtype_entry(tensors[a]).rank;
    const int right = dtype_entry(tensors[b]).rank;
    return left != right ? left > right : tensors[a].first < tensors[b].first;
  });
  return order;
}

void check_tensors(std::span<const NamedView> tensors, const std::string& path) {
  std::set<std::string_view> names;
  for (const auto& [name, view] : tensors) {
    const ErrorSite site{.path = path, .tensor = name};
    if (name == "__metadata__") {
      fail(Errc::kConfig, "safetensors: tensor name is __metadata__, which is reserved", site);
    }
    if (!names.insert(name).second) {
      fail(Errc::kConfig, "safetensors: tensor name is given twice, expected once", site);
    }
    const std::int64_t bytes = checked_mul(
        view.numel(), static_cast<std::int64_t>(dtype_size(view.dtype)), "safetensors: bytes");
    check_size("safetensors: tensor bytes", view.bytes.size(), static_cast<std::size_t>(bytes),
               site);
  }
}

std::string header_json(std::span<const NamedView> tensors, std::span<const std::size_t> order,
                        const std::map<std::string, std::string>& metadata,
                        const std::string& path) {
  std::string text = "{";
  const auto separate = [&text] {
    if (text.size() > 1) text += ',';
  };
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    for (auto it = metadata.begin(); it != metadata.end(); ++it) {
      if (it != metadata.begin()) text += ',';
      text += quoted(it->first, path) + ":" + quoted(it->second, path);
    }
    text += '}';
  }
  std::size_t offset = 0;
  for (const std::size_t i : order) {
    const auto& [name, view] = tensors[i];
    separate();
    text += quoted(name, path) + ":{\"dtype\":\"" + std::string(dtype_entry(tensors[i]).name) +
            "\",\"shape\":[";
    for (std::size_t d = 0; d < view.shape.size(); ++d) {
      text += (d == 0 ? "" : ",") + std::to_string(view.shape[d]);
    }
    text += "],\"data_offsets\":[" + std::to_string(offset) + ",";
    offset += view.bytes.size();
    text += std::to_string(offset) + "]}";
  }
  text += '}';
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

}  // namespace

void write_safetensors(const std::string& path, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata) {
  check_tensors(tensors, path);
  const std::vector<std::size_t> order = writing_order(tensors);
  const std::string header = header_json(tensors, order, metadata, path);
  std::uint8_t length[8];
  for (std::size_t i = 0; i < 8; ++i) {
    length[i] = static_cast<std::uint8_t>(static_cast<std::uint64_t>(header.size()) >> (8 * i));
  }
  io::AtomicFile file(path);
  file.write(length);
  file.write(header);
  for (const std::size_t i : order) file.write(tensors[i].second.bytes);
  file.commit();
}

}  // namespace quantal
