// Linear layers over torch::nn::Module that hold packed weights.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "quantal/torch/ops.h"

namespace quantal {

/// `y = x @ W^T + bias` with W kept as packed codes and statistics.
///
/// Parameters `codes`, `stats` (uint8, frozen) and `bias` (of any weight dtype); buffers `shared`
/// and `spec` (16 int64). forward() computes in `compute_dtype` and returns the dtype of its input.
/// `to(dtype)` converts the bias only: packed bytes are never cast.
class QuantizedLinearImpl : public torch::nn::Module {
 public:
  /// Takes the tensors over without a copy. `bias` [rows] or undefined.
  /// Throws Error{kShape} / Error{kDtype} if they do not fit together.
  explicit QuantizedLinearImpl(PackedTensors packed, torch::Tensor bias = {},
                               torch::ScalarType compute_dtype = torch::kFloat);

  torch::Tensor forward(const torch::Tensor& x);
  /// Decoded values [out_features, in_features] in the dtype that the dialect dequantizes to. A new
  /// tensor at each call: writing to it changes nothing.
  torch::Tensor weight() const;
  PackedTensors packed() const { return {spec_, codes, stats, shared}; }
  const PackedSpec& spec() const { return spec_; }
  std::int64_t in_features() const { return spec_.cols; }
  std::int64_t out_features() const { return spec_.rows; }
  /// Bytes of parameters and buffers, without the 128 bytes of `spec`.
  std::int64_t nbytes() const;

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;
  void pretty_print(std::ostream& stream) const override;

  torch::Tensor codes, stats, shared, bias;
  torch::ScalarType compute_dtype;

 private:
  PackedSpec spec_;
};
TORCH_MODULE(QuantizedLinear);

/// A low-rank addition `scaling * B A dropout(x)` to a linear layer. Parameters `A` [r, in] and
/// `B` [out, r] in float32; x is converted to float32 and the result to the dtype of x.
class LoraImpl : public torch::nn::Module {
 public:
  /// A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform with a = sqrt(5)), B = 0: no effect at first.
  LoraImpl(std::int64_t in_features, std::int64_t out_features, std::int64_t r, double scaling,
           double dropout);
  torch::Tensor forward(const torch::Tensor& x);
  std::int64_t rank() const { return A.size(0); }

  torch::Tensor A, B;
  double scaling, dropout;
};
TORCH_MODULE(Lora);

/// How a new dense layer gets its values.
enum class Init { kKaimingUniform, kNone };

/// A linear layer whose weight can be exchanged in place: dense or packed, with or without LoRA.
///
/// torch::nn::Linear members are typed pointers that nobody but their owner can replace, so models
/// that want quantization use this class. Dense: parameters `weight`, `bias`. Packed: child
/// `packed` (QuantizedLinear) and no `weight`. LoRA: child `lora`.
class LinearImpl : public torch::nn::Module {
 public:
  LinearImpl(std::int64_t in_features, std::int64_t out_features, bool bias = true,
             torch::ScalarType dtype = torch::kFloat, Init init = Init::kKaimingUniform);
  /// A layer that is packed from the start.
  explicit LinearImpl(QuantizedLinear layer);

  torch::Tensor forward(const torch::Tensor& x);

  bool is_quantized() const { return packed != nullptr; }
  /// Exchanges the weight and bias for `layer`'s; the dense weight is released. Throws
  /// Error{kShape}.
  void set_quantized(QuantizedLinear layer);
  /// Exchanges whatever is there for a dense weight [out, in] and bias (or undefined).
  void set_dense(torch::Tensor new_weight, torch::Tensor new_bias);
  void set_lora(Lora layer);
  void remove_lora();
  /// The bias of either form; may be undefined.
  torch::Tensor current_bias() const { return packed ? packed->bias : bias; }
  void pretty_print(std::ostream& stream) const override;

  std::int64_t in_features, out_features;
  torch::Tensor weight, bias;  ///< undefined while packed
  std::shared_ptr<QuantizedLinearImpl> packed;
  std::shared_ptr<LoraImpl> lora;

 private:
  void drop_dense();
};
TORCH_MODULE(Linear);

/// All quantal::Linear of a model with their dotted names, in registration order; a layer that is
/// registered twice appears once.
std::vector<std::pair<std::string, std::shared_ptr<LinearImpl>>> named_linears(
    torch::nn::Module& model);

/// Sum of the bytes of all storages that parameters and buffers of `model` use, shared ones once.
std::int64_t storage_bytes(const torch::nn::Module& model);

}  // namespace quantal
