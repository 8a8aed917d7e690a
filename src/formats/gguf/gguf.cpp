#include "formats/gguf/gguf.h"

#include <array>

#include "formats/gguf/gguf_codec.h"
#include "formats/gguf/gguf_params.h"

namespace quantal::gguf {
namespace {

constexpr std::array<FileLayout, 1> kLayouts = {{
    {.name = "gguf",
     .title = "one GGUF file with metadata and tokenizer",
     .container = Container::kGguf,
     .weights = "",
     .tree = StateTree::kFlat},
}};

/// Blocks lie within a row.
Reach reach(const QuantizeOptions& /*options*/) { return Reach::kRow; }

/// Nothing stands beside a GGUF file.
SideFiles side_files(const FileLayout& /*layout*/, std::span<const LayerEntry> /*layers*/,
                     std::span<const std::string> /*dense*/) {
  return {};
}

std::map<std::string, std::string> read_settings(const SideTexts& /*texts*/) { return {}; }

}  // namespace

constinit const Dialect kDialect = {
    .id = kDialectId,
    .name = "gguf",
    .title = "GGUF",
    .reads = "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL",
    .writes = "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL",
    .methods = {},
    .bits = kBits,
    .group_sizes = kGroupSizes,
    .group_multiple = 16,
    .quantizes_embeddings = true,
    .reach = reach,
    .make_spec = make_spec,
    .quantize = quantize,
    .export_layer = export_layer,
    .recognizes = recognizes,
    .open_layer = open_layer,
    .layouts = kLayouts,
    .side_files = side_files,
    .read_settings = read_settings,
};

}  // namespace quantal::gguf
