// What transcoding is made of: the target's packed form, the move of codes, the statement about
// statistics and values that follows from both forms, and the rewriting of statistics.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "quantal/transcode.h"

namespace quantal::transcoding {

/// The packed form that `to` asks for, its open options filled in from the source. Throws what
/// Dialect::make_spec throws.
PackedSpec target_spec(const PackedSpec& from, const TranscodeTarget& to);
/// The options that were used, as Dialect::make_spec took them.
QuantizeOptions target_options(const PackedSpec& from, const TranscodeTarget& to);
/// "gguf Q4_1", "mlx affine 4-bit, group 32, f32", "bnb nf4, block 64, nested, bf16".
std::string form_name(const PackedSpec& spec);

/// One-to-one renaming of codes. Integer maps: target code = n + zero_code, where the source's
/// mapped code is n * unit for an integer n. Other maps move only to themselves.
struct CodeMove {
  bool possible = false;
  bool identity = true;
  std::array<std::uint8_t, 256> map{};
  bool integers = false;
  int zero_code = 0;    ///< target code of n = 0
  double unit = 1;      ///< a power of two
  int source_bits = 0;  ///< significant bits that an n needs at most
  int target_bits = 0;  ///< the same of target code - target centre
};
CodeMove code_move(const PackedSpec& from, const PackedSpec& to);

/// How the target's groups lie in the source's.
enum class Alignment : std::uint8_t {
  kSame,       ///< the same groups
  kSplit,      ///< every group lies inside one group of the source
  kIrregular,  ///< a group touches several: exact where their statistics are equal
};
Alignment alignment_of(const PackedSpec& from, const PackedSpec& to);

/// Statement about copying codes, from the forms alone; nullopt if codes cannot be copied. `note`
/// says "depends on the values" where it does.
std::optional<Preservation> copy_statement(const PackedSpec& from, const PackedSpec& to);

/// True if zero points are whole numbers 0 .. 2^bits - 1 in the dialect's files (Quanto's
/// zero-point form).
bool has_whole_zeros(const PackedSpec& spec);

/// Number of statistics (groups) of a matrix, in the order of FlatStats or, for column maps, of
/// the rows of `stats`.
std::int64_t num_groups(const PackedSpec& spec);
/// Group of element (row, col).
std::int64_t group_of(const PackedSpec& spec, std::int64_t row, std::int64_t col);

/// Scale and offset of every group in float32, as kernels read them (two-level ones multiplied
/// out). `offsets` is empty unless the form stores them.
struct Statistics {
  std::vector<float> scales, offsets;
};
Statistics read_statistics(const PackedView& w);

/// Rewrites statistics. Returns the largest rounding in units in the last place of the target's
/// storage (0: the same numbers), or nullopt if the target cannot express them: groups that would
/// merge differ, an offset does not vanish, a number leaves the storage's range.
std::optional<double> convert_statistics(const PackedView& from, const CodeMove& move,
                                         PackedMatrix& to, const Executor& executor);

/// The pairs of forms behind transcode_edges(), some more than once.
struct EdgeForms {
  PackedSpec from;
  TranscodeTarget to;
  bool encodable = true;         ///< a quantizer of this build writes `from` ...
  QuantizeOptions from_options;  ///< ... with these options
};
std::vector<EdgeForms> edge_forms();

/// Significant bits of the numbers that a scale source yields, and of a float type.
int scale_precision(ScaleSource source) noexcept;
int float_precision(DType dtype) noexcept;

/// `value` rounded once to a float type, half to even.
float round_once(DType dtype, double value);

}  // namespace quantal::transcoding
