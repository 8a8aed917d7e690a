#include <gtest/gtest.h>

#include <limits>

#include "quantal/policy.h"

namespace quantal {
namespace {

using M = QuantizationMethod;

struct Case {
  Backend backend;
  double billions, gigabytes;
  M method;
  int bits;
};

TEST(Recommend, Table) {
  const Case cases[] = {
      {Backend::CUDA, 7, 10.4, M::BNB_NF4, 4},  {Backend::CUDA, 7, 10.5, M::BNB_INT8, 8},
      {Backend::CUDA, 7, 16.7, M::BNB_INT8, 8}, {Backend::CUDA, 7, 16.8, M::NONE, 4},
      {Backend::MPS, 7, 16, M::MLX_INT4, 4},    {Backend::MLX, 7, 16, M::MLX_INT4, 4},
      {Backend::MPS, 7, 17, M::MLX_INT8, 8},    {Backend::MPS, 7, 22, M::NONE, 4},
      {Backend::MPS, 7, 21, M::MLX_INT8, 8},    {Backend::CPU, 7, 13.9, M::HQQ, 8},
      {Backend::CPU, 7, 14, M::NONE, 4},        {Backend::CUDA, 70, 8, M::BNB_NF4, 4},
  };
  for (const Case& c : cases) {
    const QuantizationConfig config = get_recommended_config(c.backend, c.billions, c.gigabytes);
    EXPECT_EQ(config.method, c.method) << backend_name(c.backend) << " " << c.gigabytes;
    EXPECT_EQ(config.bits, c.bits) << backend_name(c.backend) << " " << c.gigabytes;
    EXPECT_NO_THROW(check_config(config));
  }
}

TEST(Recommend, Dtypes) {
  EXPECT_EQ(get_recommended_config(Backend::CUDA, 7, 8).compute_dtype, DType::kBF16);
  EXPECT_EQ(get_recommended_config(Backend::CUDA, 7, 8, false).compute_dtype, DType::kF16);
  EXPECT_EQ(get_recommended_config(Backend::MPS).compute_dtype, DType::kF16);
  EXPECT_EQ(get_recommended_config(Backend::CPU, 7, 8).compute_dtype, DType::kF32);
}

TEST(Recommend, BadSizes) {
  EXPECT_THROW(get_recommended_config(Backend::CPU, -1, 16), Error);
  EXPECT_THROW(get_recommended_config(Backend::CPU, 7, std::numeric_limits<double>::quiet_NaN()),
               Error);
}

TEST(Recommend, SaysWhenEvenFourBitsDoNotFit) {
  const QuantizationConfig config = get_recommended_config(Backend::CUDA, 70, 8);
  EXPECT_EQ(
      memory_note(config, 70, 8),
      "weights of 70 billion parameters need about 35.0 GB with bnb_nf4, 8.0 GB are available");
  EXPECT_EQ(memory_note(config, 7, 8), "");
  EXPECT_EQ(config.note, memory_note(config, 70, 8));
  EXPECT_EQ(decide_adapter(Backend::CUDA, config).config.note, config.note);
  EXPECT_EQ(get_recommended_config(Backend::CUDA, 7, 8).note, "");
  EXPECT_EQ(config_to_json(config).find("note"), std::string::npos);
}

}  // namespace
}  // namespace quantal
