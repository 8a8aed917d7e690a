// Parts of a matrix, quantized by ranks that only hear of each other through the exchange, have the
// bytes of the whole, for cuts at every row; and no rank reads more than rows_to_read says.
#include "quantal/shards.h"

#include <gtest/gtest.h>

#include <cmath>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>

#include "formats/quantized_forms.h"
#include "quantal/formats.h"

namespace quantal {
namespace {

using testing::form_options;
using testing::QuantizedForm;

/// The exchange of threads: the sum of what all of them bring.
class Ranks {
 public:
  explicit Ranks(int size) : size_(size) {}

  void exchange(std::span<std::uint8_t> bytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return !leaving_; });  // the exchange before is over
    sum_.resize(bytes.size());
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      sum_[i] = static_cast<std::uint8_t>(sum_[i] + bytes[i]);
    }
    ++calls_;
    if (++inside_ == size_) leaving_ = true;
    wake_.notify_all();
    wake_.wait(lock, [&] { return leaving_; });
    EXPECT_EQ(sum_.size(), bytes.size()) << "ranks brought different sizes";
    std::copy(sum_.begin(), sum_.end(), bytes.begin());
    if (--inside_ == 0) {
      leaving_ = false;
      sum_.clear();
    }
    wake_.notify_all();
  }
  int calls() const { return calls_ / size_; }

 private:
  int size_, inside_ = 0, calls_ = 0;
  bool leaving_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::uint8_t> sum_;
};

struct Sharded {
  PackedMatrix matrix;
  int calls = 0;
};

/// Quantizes with one thread per part; a rank that reads a row that it should not need sees NaN.
Sharded quantize_parts(const QuantizedForm& c, const PackedSpec& spec,
                       const std::vector<std::uint16_t>& w, const std::vector<std::int64_t>& cuts) {
  const int size = static_cast<int>(cuts.size()) - 1;
  Ranks ranks(size);
  std::vector<PackedRows> parts(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      const auto r = static_cast<std::size_t>(rank);
      const RowRange part{cuts[r], cuts[r + 1]};
      std::vector<std::uint16_t> seen(w.size(), 0x7FC0);  // NaN
      for (const RowRange& rows : rows_to_read(spec, part)) {
        std::copy(w.begin() + rows.begin * c.cols, w.begin() + rows.end * c.cols,
                  seen.begin() + rows.begin * c.cols);
      }
      const RowSource source{DType::kBF16, [&](RowRange rows, void* out) {
                               std::memcpy(out, seen.data() + rows.begin * c.cols,
                                           static_cast<std::size_t>(rows.size() * c.cols * 2));
                             }};
      parts[r] = quantize_rows(spec, part, source,
                               [&](std::span<std::uint8_t> bytes) { ranks.exchange(bytes); });
    });
  }
  for (std::thread& thread : threads) thread.join();
  Sharded out{{spec, {}, {}, {}}, ranks.calls()};
  for (const PackedRows& part : parts) {
    out.matrix.codes.insert(out.matrix.codes.end(), part.codes.begin(), part.codes.end());
    if (spec.group_map == GroupMap::kRowRuns) {
      out.matrix.stats.insert(out.matrix.stats.end(), part.stats.begin(), part.stats.end());
    } else {
      EXPECT_EQ(part.stats, parts.front().stats);
      out.matrix.stats = part.stats;
    }
    EXPECT_EQ(part.shared, parts.front().shared);
    out.matrix.shared = part.shared;
  }
  return out;
}

class Shards : public ::testing::TestWithParam<QuantizedForm> {};

TEST_P(Shards, PartsHaveTheBytesOfTheWhole) {
  const QuantizedForm& c = GetParam();
  const std::vector<std::uint16_t> w = testing::form_weights(c.rows, c.cols);
  const PackedMatrix whole = testing::quantized(c, w);
  std::vector<std::vector<std::int64_t>> cuts;
  for (std::int64_t at = 0; at <= c.rows; at += c.rows > 64 ? 7 : 1)
    cuts.push_back({0, at, c.rows});
  for (const std::int64_t ranks : {1, 3, 4}) {
    std::vector<std::int64_t> even;
    for (std::int64_t r = 0; r < ranks; ++r) even.push_back(rank_rows(c.rows, r, ranks).begin);
    even.push_back(c.rows);
    cuts.push_back(even);
  }
  for (const auto& cut : cuts) {
    const Sharded parts = quantize_parts(c, whole.spec, w, cut);
    const std::string where = "cut at " + std::to_string(cut[1]) + " of " + std::to_string(c.rows);
    ASSERT_EQ(parts.matrix.codes, whole.codes) << where;
    ASSERT_EQ(parts.matrix.stats, whole.stats) << where;
    ASSERT_EQ(parts.matrix.shared, whole.shared) << where;
    EXPECT_EQ(parts.calls > 0, c.exchanges) << where;
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, Shards, ::testing::ValuesIn(testing::quantized_forms()),
                         [](const auto& info) { return info.param.name; });

TEST(RankRows, AreThoseOfFsdp) {
  EXPECT_EQ(rank_rows(10, 0, 4), (RowRange{0, 3}));
  EXPECT_EQ(rank_rows(10, 3, 4), (RowRange{9, 10}));
  EXPECT_EQ(rank_rows(3, 3, 4), (RowRange{3, 3}));
  EXPECT_EQ(rank_rows(5, 3, 4), (RowRange{5, 5}));  // ceil(5 / 4) = 2: the last rank has none
}

TEST(RowsToRead, FollowTheReachOfTheForm) {
  using M = QuantizationMethod;
  const auto spec = [](const char* dialect, const QuantizeOptions& o, std::int64_t rows,
                       std::int64_t cols) {
    return dialect_by_name(dialect).make_spec(rows, cols, o);
  };
  const RowRange part{5, 9};
  EXPECT_EQ(rows_to_read(spec("mlx", form_options(M::MLX_INT4, 4, 64), 64, 64), part),
            (std::vector<RowRange>{{5, 9}}));
  // 16384 codes share an absmax of the second level: 4 rows of 4096.
  EXPECT_EQ(rows_to_read(spec("bnb", form_options(M::BNB_NF4, 4, 64), 64, 4096), part),
            (std::vector<RowRange>{{4, 12}}));
  QuantizeOptions axis0 = form_options(M::HQQ, 4, 8);
  axis0.axis = 0;
  const std::vector<RowRange> strided = rows_to_read(spec("hqq", axis0, 32, 64), {8, 16});
  ASSERT_EQ(strided.size(), 8U);
  EXPECT_EQ(strided[1], (RowRange{5, 6}));
  EXPECT_THROW(rows_to_read(spec("mlx", form_options(M::MLX_INT4, 4, 64), 64, 64), {5, 65}), Error);
}

TEST(Shards, AWeightThatIsNotFiniteNamesItsRow) {
  const PackedSpec spec =
      dialect_by_name("mlx").make_spec(8, 64, form_options(QuantizationMethod::MLX_INT4, 4, 64));
  const RowSource source{DType::kF32, [](RowRange rows, void* out) {
                           auto* w = static_cast<float*>(out);
                           std::fill(w, w + rows.size() * 64, 0.5F);
                           w[64 + 3] = std::numeric_limits<float>::quiet_NaN();
                         }};
  try {
    quantize_rows(spec, {4, 8}, source, {});
    FAIL() << "expected an error";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Errc::kUnsupported);
    EXPECT_NE(std::string(e.what()).find("row 1, column 3"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("counted from row 4"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace quantal
