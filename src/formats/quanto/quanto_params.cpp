#include "formats/quanto/quanto_params.h"

namespace quantal::quanto {
namespace {

constexpr std::array<std::string_view, 7> kNames = {
    "none", "qint2", "qint4", "qint8", "qfloat8_e4m3fn", "qfloat8_e5m2", "qfloat8_e4m3fnuz"};

}  // namespace

std::string_view qtype_name(QType type) noexcept {
  return kNames[static_cast<std::size_t>(type) % kNames.size()];
}

std::optional<QType> find_qtype(std::string_view name) noexcept {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    const bool same = name == kNames[i];
    const bool without_q = i > 0 && i < 4 && name == kNames[i].substr(1);
    if (same || without_q) return static_cast<QType>(i);
  }
  if (name == "qfloat8" || name == "float8") return QType::kFloat8E4M3;
  return std::nullopt;
}

QType qtype_of(const PackedSpec& spec) noexcept {
  if (spec.bits == 2) return QType::kInt2;
  if (spec.bits == 4) return QType::kInt4;
  if (spec.code_map == CodeMap::kE4M3) return QType::kFloat8E4M3;
  if (spec.code_map == CodeMap::kE5M2) return QType::kFloat8E5M2;
  return QType::kInt8;
}

int bits_of(QType type) noexcept {
  if (type == QType::kNone) return 0;
  if (type == QType::kInt2) return 2;
  return type == QType::kInt4 ? 4 : 8;
}

std::int64_t upstream_group_size(std::int64_t length) noexcept {
  constexpr std::int64_t kLargest = 128, kStep = 32;
  if (length <= kLargest) return 0;
  for (std::int64_t size = kLargest; size > 0; size -= kStep) {
    if (length % size == 0) return size;
  }
  return 0;
}

Grouped grouped_of(const PackedSpec& spec) {
  Grouped g;
  const std::int64_t numel = spec.rows * spec.cols;
  const bool single = spec.rows == 1 && spec.group_size == 1;
  g.columns = spec.group_map == GroupMap::kColumnBlocks || single;
  g.rows = g.columns ? spec.group_size : numel / spec.group_size;
  g.cols = numel / g.rows;
  g.blocks = g.columns ? spec.rows / spec.group_size : 1;
  g.packed_rows = ceil_div(g.rows * spec.bits, 8);
  return g;
}

}  // namespace quantal::quanto
