// Converting one matrix. Where groups do not cross rows the work goes by slices of rows, so that
// beside source and result only a slice is held.
#include "quantal/transcode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats/tensors.h"
#include "formats/transcode_rules.h"

namespace quantal {
namespace {

using namespace transcoding;  // NOLINT: the parts of this file

/// Elements of a slice of rows.
constexpr std::int64_t kSliceElements = std::int64_t{1} << 20;

bool rows_stand_alone(const PackedSpec& spec) {
  return spec.group_map == GroupMap::kRowRuns && spec.cols % spec.group_size == 0 &&
         spec.scale != ScaleSource::kNestedU8;
}

std::int64_t slice_rows(const PackedSpec& a, const PackedSpec& b, const Executor& executor) {
  if (!rows_stand_alone(a) || !rows_stand_alone(b)) return std::max<std::int64_t>(a.rows, 1);
  const std::int64_t elements = kSliceElements * std::max(1, executor.num_threads());
  return std::clamp<std::int64_t>(elements / std::max<std::int64_t>(1, a.cols), 1,
                                  std::max<std::int64_t>(a.rows, 1));
}

PackedView rows_of(const PackedView& w, std::int64_t begin, std::int64_t end) {
  if (begin == 0 && end == w.spec.rows) return w;
  const PackedLayout layout = layout_of(w.spec);
  const auto part = [&](std::span<const std::uint8_t> bytes, std::int64_t stride) {
    return bytes.subspan(static_cast<std::size_t>(begin * stride),
                         static_cast<std::size_t>((end - begin) * stride));
  };
  PackedView out{w.spec, part(w.codes, layout.code_bytes), part(w.stats, layout.stat_bytes),
                 w.shared};
  out.spec.rows = end - begin;
  return out;
}

/// Puts the codes and statistics of a slice into the whole.
void put_rows(const PackedMatrix& slice, std::int64_t begin, PackedMatrix& whole) {
  const PackedLayout layout = layout_of(whole.spec);
  std::memcpy(whole.codes.data() + begin * layout.code_bytes, slice.codes.data(),
              slice.codes.size());
  std::memcpy(whole.stats.data() + begin * layout.stat_bytes, slice.stats.data(),
              slice.stats.size());
}

void move_codes(const PackedView& from, const CodeMove& move, PackedMatrix& to,
                const Executor& executor) {
  if (move.identity && from.spec.bits == to.spec.bits) {
    std::memcpy(to.codes.data(), from.codes.data(), from.codes.size());
    return;
  }
  const std::int64_t in = layout_of(from.spec).code_bytes, out = layout_of(to.spec).code_bytes;
  const std::int64_t cols = from.spec.cols;
  executor.parallel_for(
      0, from.spec.rows, rows_per_task(cols), [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::uint8_t> row(static_cast<std::size_t>(cols));
        for (std::int64_t r = begin; r < end; ++r) {
          unpack_row(from.spec.bits, from.codes.data() + r * in, cols, row.data());
          for (std::uint8_t& q : row) q = move.map[q];
          pack_row(to.spec.bits, row.data(), cols, to.codes.data() + r * out);
        }
      });
}

/// `shared` of the result: the table and the nested map go over, the residue where it stays.
void move_shared(const PackedView& from, PackedMatrix& to) {
  const std::size_t kept = std::min(to.shared.size(), from.shared.size());
  std::ranges::copy(from.shared.first(kept), to.shared.begin());
}

bool same_arithmetic(PackedSpec a, const PackedSpec& b) {
  a.dialect = b.dialect;
  a.dialect_flags = b.dialect_flags;
  a.residue_bytes = b.residue_bytes;
  a.value_dtype = b.value_dtype;
  return a == b;
}

/// Copies codes and rewrites statistics; nullopt if this matrix cannot be expressed. `ulp` receives
/// the largest rounding of a statistic.
std::optional<PackedMatrix> copy_codes(const PackedView& from, const PackedSpec& spec,
                                       const Executor& executor, double& ulp) {
  PackedMatrix out = make_packed(spec);
  move_shared(from, out);
  ulp = 0;
  if (same_arithmetic(from.spec, spec)) {
    std::copy(from.codes.begin(), from.codes.end(), out.codes.begin());
    std::copy(from.stats.begin(), from.stats.end(), out.stats.begin());
    return out;
  }
  const CodeMove move = code_move(from.spec, spec);
  const std::int64_t step = slice_rows(from.spec, spec, executor);
  for (std::int64_t r = 0; r < spec.rows; r += step) {
    const std::int64_t end = std::min(spec.rows, r + step);
    const PackedView view = rows_of(from, r, end);
    const bool whole = view.spec.rows == spec.rows;
    PackedMatrix slice;
    if (!whole) {
      PackedSpec part = spec;
      part.rows = view.spec.rows;
      slice = make_packed(part);
    }
    PackedMatrix& into = whole ? out : slice;
    move_codes(view, move, into, executor);
    const std::optional<double> rounding = convert_statistics(view, move, into, executor);
    if (!rounding) return std::nullopt;
    ulp = std::max(ulp, *rounding);
    if (!whole) put_rows(slice, r, out);
  }
  return out;
}

// ------------------------------------------------------------------ quantizing again

/// Rows [begin, end) as dense weights.
std::vector<std::uint8_t> dense_rows(const PackedView& from, std::int64_t begin, std::int64_t end,
                                     DType dtype, const Executor& executor) {
  const std::int64_t cols = from.spec.cols;
  const std::int64_t bytes =
      checked_mul(checked_mul(end - begin, cols, "transcode: elements"),
                  static_cast<std::int64_t>(dtype_size(dtype)), "transcode: bytes");
  std::vector<std::uint8_t> out(static_cast<std::size_t>(bytes));
  dequantize(from, {begin, end, 0, cols}, dtype, out.data(), cols, executor);
  return out;
}

/// The quantizer's input: its value dtype where upstream takes over the weight's, else float32 or
/// the source's own dtype, which holds its values exactly.
DType input_dtype(const Dialect& dialect, const PackedSpec& from, const PackedSpec& to) {
  return dialect.keeps_weight_dtype ? to.value_dtype : from.value_dtype;
}

PackedMatrix quantize_again(const PackedView& from, const TranscodeTarget& to,
                            const PackedSpec& spec, const Executor& executor) {
  const Dialect& dialect = *to.dialect;
  const DType dtype = input_dtype(dialect, from.spec, spec);
  PackedMatrix out = make_packed(spec);
  const Reach reach = dialect.reach(target_options(from.spec, to));
  const bool whole_rows = spec.group_map == GroupMap::kRowRuns && spec.cols % spec.group_size == 0;
  const bool by_rows = reach == Reach::kRow || (reach == Reach::kNeighbourRows && whole_rows);
  const std::int64_t step =
      by_rows ? slice_rows(spec, spec, executor) : std::max<std::int64_t>(1, spec.rows);
  for (std::int64_t r = 0; r < spec.rows; r += step) {
    const std::int64_t end = std::min(spec.rows, r + step);
    const std::vector<std::uint8_t> weights = dense_rows(from, r, end, dtype, executor);
    if (end - r == spec.rows) {
      dialect.quantize(spec, dtype, weights.data(), out.codes.data(), out.stats.data(),
                       out.shared.data(), executor);
      break;
    }
    PackedSpec part = spec;
    part.rows = end - r;
    PackedMatrix slice = make_packed(part);
    dialect.quantize(part, dtype, weights.data(), slice.codes.data(), slice.stats.data(),
                     slice.shared.data(), executor);
    put_rows(slice, r, out);
    if (r == 0) out.shared = slice.shared;
  }
  return out;
}

/// The spec that the target's quantizer fills: without what was carried over from the source.
PackedSpec quantizer_spec(const PackedSpec& from, const TranscodeTarget& to) {
  return to.dialect->make_spec(from.rows, from.cols, target_options(from, to));
}

// ------------------------------------------------------------------ measuring

struct Difference {
  double error = 0, norm = 0;  ///< sums of squares
  bool equal_f32 = true, equal_f16 = true, equal_bf16 = true;
};

bool equal_in(DType dtype, float a, float b) {
  return round_once(dtype, static_cast<double>(a)) == round_once(dtype, static_cast<double>(b));
}

void add_difference(const float* a, const float* b, std::int64_t n, Difference& d) {
  for (std::int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(a[i]);
    d.norm += x * x;
    if (a[i] == b[i]) continue;
    const double e = static_cast<double>(b[i]) - x;
    d.error += e * e;
    d.equal_f32 = false;
    if (d.equal_f16) d.equal_f16 = equal_in(DType::kF16, a[i], b[i]);
    if (d.equal_bf16) d.equal_bf16 = equal_in(DType::kBF16, a[i], b[i]);
  }
}

Difference compare(const PackedView& a, const PackedView& b, const Executor& executor) {
  Difference d;
  const std::int64_t cols = a.spec.cols;
  const std::int64_t step = std::clamp<std::int64_t>(
      kSliceElements / std::max<std::int64_t>(1, cols), 1, std::max<std::int64_t>(1, a.spec.rows));
  std::vector<float> x(static_cast<std::size_t>(step * cols)), y(x.size());
  for (std::int64_t r = 0; r < a.spec.rows; r += step) {
    const std::int64_t end = std::min(a.spec.rows, r + step);
    dequantize(a, {r, end, 0, cols}, DType::kF32, x.data(), cols, executor);
    dequantize(b, {r, end, 0, cols}, DType::kF32, y.data(), cols, executor);
    add_difference(x.data(), y.data(), (end - r) * cols, d);
  }
  return d;
}

double relative(const Difference& d) {
  return d.norm > 0 ? std::sqrt(d.error / d.norm) : std::sqrt(d.error);
}

/// What was found on this matrix, in place of what was foretold.
void state_values(const Difference& d, const PackedSpec& from, const PackedSpec& to,
                  Preservation& kept) {
  const DType narrow = from.value_dtype == DType::kF32 ? to.value_dtype : from.value_dtype;
  kept.values = d.equal_f32;
  kept.values_dtype = DType::kF32;
  if (d.equal_f32 || narrow == DType::kF32) return;
  kept.values = narrow == DType::kF16 ? d.equal_f16 : d.equal_bf16;
  kept.values_dtype = narrow;
}

Preservation lossy_statement(const std::string& why) {
  Preservation p;
  p.note = "quantized again" + (why.empty() ? why : ": " + why);
  return p;
}

/// Why codes cannot be copied.
std::string reason(const PackedSpec& from, const PackedSpec& to) {
  const CodeMove move = code_move(from, to);
  if (!move.possible) return "codes mean other numbers";
  return "statistics of two levels are searched for";
}

[[noreturn]] void refuse_loss(const PackedSpec& from, const PackedSpec& to,
                              const Preservation& kept) {
  fail(Errc::kUnsupported, "transcode: " + form_name(from) + " to " + form_name(to) +
                               " is not lossless (" + kept.note +
                               "), expected a conversion that keeps every value");
}

}  // namespace

Preservation plan_transcode(const PackedSpec& from, const TranscodeTarget& to) {
  const PackedSpec spec = target_spec(from, to);
  if (same_arithmetic(from, spec) && from.value_dtype == spec.value_dtype) {
    return {true, true, 0, true, DType::kF32, "the same bytes of codes and statistics"};
  }
  if (const auto copied = copy_statement(from, spec)) return *copied;
  return lossy_statement(reason(from, spec));
}

Transcoded transcode(const PackedView& from, const TranscodeTarget& to, const Executor& executor) {
  check_packed(from);
  const PackedSpec spec = target_spec(from.spec, to);
  Preservation plan = plan_transcode(from.spec, to);
  const bool waits = plan.note.find("depends on the values") != std::string::npos;
  if (to.lossless_only && !plan.lossless()) refuse_loss(from.spec, spec, plan);
  Transcoded out;
  if (plan.codes) {
    double ulp = 0;
    if (auto copied = copy_codes(from, spec, executor, ulp)) {
      out.matrix = std::move(*copied);
      out.kept = std::move(plan);
      out.kept.statistics = ulp == 0;
      out.kept.statistics_ulp = ulp;
      const Difference d = compare(from, out.matrix.view(), executor);
      state_values(d, from.spec, spec, out.kept);
      out.relative_error = out.kept.values ? 0 : relative(d);
      if (to.lossless_only && !out.kept.lossless()) refuse_loss(from.spec, spec, out.kept);
      return out;
    }
    plan = lossy_statement(waits ? "this matrix does not meet the condition of copying codes"
                                 : "a statistic leaves the range of its new storage");
    if (to.lossless_only) refuse_loss(from.spec, spec, plan);
  }
  out.matrix = quantize_again(from, to, quantizer_spec(from.spec, to), executor);
  out.kept = std::move(plan);
  const Difference d = compare(from, out.matrix.view(), executor);
  out.relative_error = relative(d);
  return out;
}

}  // namespace quantal
