// Linear layers over torch::nn::Module that hold packed weights, and adapters on them.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "quantal/torch/ops.h"

namespace quantal {

/// A quantized linear layer of any kind, `y = x @ W^T + bias`: what Python calls QuantizedLinear.
///
/// quantal's own is QuantizedLinear below. A form of one's own derives from this class, keeps its
/// state in registered parameters and buffers and writes the three pure functions; a Linear holds
/// it (Linear(std::make_shared<MyLayer>(...)), LinearImpl::set_custom).
class QuantizedLayerImpl : public torch::nn::Module {
 public:
  /// [..., in_features] -> [..., out_features], in the dtype of x.
  virtual torch::Tensor forward(const torch::Tensor& x) = 0;
  /// Takes the values of a dense [out_features, in_features] over.
  virtual void quantize_weights(const torch::Tensor& weights) = 0;
  /// The values [out_features, in_features] that the layer multiplies with; a new dense tensor.
  virtual torch::Tensor dequantize_weights() const = 0;
  /// Bytes of parameters and buffers.
  virtual std::int64_t nbytes() const;

  std::int64_t in_features() const { return in_features_; }    ///< columns of W
  std::int64_t out_features() const { return out_features_; }  ///< rows of W
  /// Replaces the bias: [out_features] or undefined. Throws Error{kShape}.
  void set_bias(const torch::Tensor& values);

  torch::Tensor bias;  ///< parameter "bias"; undefined if there is none

 protected:
  /// `name` is the class's, for printing. There is no bias until set_bias is called.
  QuantizedLayerImpl(const std::string& name, std::int64_t in_features, std::int64_t out_features);

 private:
  std::int64_t in_features_, out_features_;
};

/// `y = x @ W^T + bias` with W kept as packed codes and statistics: Python's PackedLinear.
///
/// Parameters `codes`, `stats` (uint8, frozen) and `bias` (of any weight dtype); buffers `shared`
/// and `spec` (16 int64). forward() computes in `compute_dtype` and returns the dtype of its input.
/// `to(dtype)` converts the bias only: packed bytes are never cast.
class QuantizedLinearImpl : public QuantizedLayerImpl {
 public:
  /// Takes the tensors over without a copy. `bias` [rows] or undefined.
  /// Throws Error{kShape} / Error{kDtype} if they do not fit together.
  explicit QuantizedLinearImpl(PackedTensors packed, torch::Tensor bias = {},
                               torch::ScalarType compute_dtype = torch::kFloat);

  torch::Tensor forward(const torch::Tensor& x) override;
  /// Quantizes into the same form; new tensors, the old ones are not written.
  void quantize_weights(const torch::Tensor& weights) override;
  torch::Tensor dequantize_weights() const override { return weight(); }
  /// Decoded values [out_features, in_features] in the dtype that the dialect dequantizes to. A new
  /// tensor at each call: writing to it changes nothing.
  torch::Tensor weight() const;
  /// The packed tensors, shared with the layer.
  PackedTensors packed() const { return {spec_, codes, stats, shared}; }
  /// Exchanges the packed tensors for others of the same spec. Throws Error{kShape}.
  void set_packed(PackedTensors packed);
  const PackedSpec& spec() const { return spec_; }  ///< what the bytes mean
  /// Bytes of parameters and buffers, without the 128 bytes of `spec`.
  std::int64_t nbytes() const override;

  /// Moves the tensors and casts the bias.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  /// Casts the bias.
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  /// Moves the tensors.
  void to(torch::Device device, bool non_blocking = false) override;
  /// Prints sizes and form.
  void pretty_print(std::ostream& stream) const override;

  torch::Tensor codes;              ///< [out_features, code_bytes]
  torch::Tensor stats;              ///< [stat_rows, stat_bytes]
  torch::Tensor shared;             ///< [shared_bytes]
  torch::ScalarType compute_dtype;  ///< of products
  /// LLM.int8: outlier threshold of its product (linear_int8); unset: exact weights.
  std::optional<double> int8_threshold;
  /// kInt8: the product is linear_int8_activations, which refuses forms that have none.
  Activations activations = Activations::kExact;

 private:
  PackedSpec spec_;
};
/// Holder of a QuantizedLinearImpl.
TORCH_MODULE(QuantizedLinear);

/// A low-rank addition `scaling * B A dropout(x)` to a linear layer, or a DoRA adapter.
///
/// Parameters `A` [r, in] and `B` [out, r] in float32 and, for DoRA, `magnitude` [out].
class LoraImpl : public torch::nn::Module {
 public:
  /// A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform with a = sqrt(5)), drawn on the CPU; B = 0: no
  /// effect at first. `device` is where both stay.
  LoraImpl(std::int64_t in_features, std::int64_t out_features, std::int64_t r, double scaling,
           double dropout, torch::Device device = torch::kCPU);
  /// `scaling * B A dropout(x)`; x is converted to float32 and the result to the dtype of x.
  torch::Tensor forward(const torch::Tensor& x);
  /// dropout(x) while training, else x.
  torch::Tensor drop(const torch::Tensor& x) const;
  /// `scaling * B A`, float32 [out, in].
  torch::Tensor delta() const;
  /// Makes it a DoRA adapter; `values` [out].
  void set_magnitude(const torch::Tensor& values);
  bool is_dora() const { return magnitude.defined(); }  ///< whether it has magnitudes
  std::int64_t rank() const { return A.size(0); }       ///< r

  torch::Tensor A;          ///< [r, in]
  torch::Tensor B;          ///< [out, r]
  torch::Tensor magnitude;  ///< [out]; undefined unless DoRA
  double scaling;           ///< factor of the product
  double dropout;           ///< rate while training
};
/// Holder of a LoraImpl.
TORCH_MODULE(Lora);

/// How a new dense layer gets its values.
enum class Init {
  kKaimingUniform,  ///< as torch::nn::Linear
  kNone,            ///< undefined values, to be loaded
};

struct MergeState;

/// A linear layer whose weight can be exchanged in place: dense or packed, with or without LoRA.
///
/// torch::nn::Linear members are typed pointers that nobody but their owner can replace, so models
/// that want quantization use this class. Dense: parameters `weight`, `bias`. Packed: child
/// `packed` (QuantizedLinear) and no `weight`; another form: child `custom`. Adapters: one child
/// `lora_<name>` each, of which the active ones are added to the product.
class LinearImpl : public torch::nn::Module {
 public:
  /// A dense layer, as torch::nn::Linear.
  LinearImpl(std::int64_t in_features, std::int64_t out_features, bool bias = true,
             torch::ScalarType dtype = torch::kFloat, Init init = Init::kKaimingUniform);
  /// A layer that is packed from the start.
  explicit LinearImpl(QuantizedLinear layer);
  /// A layer of a form of one's own.
  explicit LinearImpl(std::shared_ptr<QuantizedLayerImpl> layer);

  /// y = x @ W^T + bias, then the active adapters in order. While adapters are merged (merge.h) no
  /// adapter is added. DoRA with a weight W and result y0 of what came before:
  /// `y0 + (m / n - 1) (y0 - bias) + (m / n) scaling B A x`, n the row norms of W + scaling B A
  /// without gradient; in training with dropout, W dropout(x) takes the place of `y0 - bias`
  /// (PEFT's arithmetic).
  torch::Tensor forward(const torch::Tensor& x);

  /// Whether the weight is packed or of another quantized form.
  bool is_quantized() const { return packed != nullptr || custom != nullptr; }
  /// The quantized form, null while the weight is dense.
  std::shared_ptr<QuantizedLayerImpl> quantized() const;
  /// Exchanges the weight and bias for `layer`'s; the dense weight is released. Throws
  /// Error{kShape}.
  void set_quantized(QuantizedLinear layer);
  /// The same for a form of one's own.
  void set_custom(std::shared_ptr<QuantizedLayerImpl> layer);
  /// Exchanges whatever is there for a dense weight [out, in] and bias (or undefined).
  void set_dense(torch::Tensor new_weight, torch::Tensor new_bias);
  /// The values of W as float32 [out, in], a new tensor unless the weight is dense float32.
  torch::Tensor dense_weight() const;
  /// Where the weight is, in whatever form.
  torch::Device device() const;
  /// The bias of either form; may be undefined.
  torch::Tensor current_bias() const;

  /// Adds an adapter, or replaces the one of that name; the first one is active. Throws
  /// Error{kShape}; Error{kConfig} for a name that is empty or has a dot.
  void set_lora(Lora layer, const std::string& name = "default");
  /// Removes one adapter; all of them without a name. A name that is not there is ignored.
  void remove_lora(const std::string& name = "");
  /// An adapter by name; null if there is none.
  std::shared_ptr<LoraImpl> lora(const std::string& name = "default") const;
  /// Adapters in the order in which they were set.
  const std::vector<std::pair<std::string, std::shared_ptr<LoraImpl>>>& loras() const {
    return loras_;
  }
  /// Names of the adapters that forward() adds, in order.
  const std::vector<std::string>& active() const { return active_; }
  /// Chooses them; names that this layer lacks are ignored.
  void set_active(const std::vector<std::string>& names);
  /// Norms of the rows of `W + scaling B A`, float32 [out]; a packed W is never decoded as a whole.
  torch::Tensor weight_norm(const LoraImpl& adapter) const;
  /// Prints sizes, form and adapters.
  void pretty_print(std::ostream& stream) const override;

  std::int64_t in_features;                     ///< columns of W
  std::int64_t out_features;                    ///< rows of W
  torch::Tensor weight;                         ///< [out, in]; undefined while quantized
  torch::Tensor bias;                           ///< undefined while quantized, or if there is none
  std::shared_ptr<QuantizedLinearImpl> packed;  ///< quantal's own form
  std::shared_ptr<QuantizedLayerImpl> custom;   ///< any other form
  std::shared_ptr<MergeState> merge_state;      ///< of merge_adapter; null before the first

 private:
  void drop_weight();
  void set_form(std::shared_ptr<QuantizedLayerImpl> layer, const char* child);
  torch::Tensor base(const torch::Tensor& x) const;
  torch::Tensor add_dora(const torch::Tensor& x, const torch::Tensor& y, LoraImpl& adapter) const;
  torch::Tensor row_squares() const;

  std::vector<std::pair<std::string, std::shared_ptr<LoraImpl>>> loras_;
  std::vector<std::string> active_;
  /// Sums of squares of packed rows, and the codes (by address and version) they were made of.
  mutable torch::Tensor row_squares_, row_squares_of_;
  mutable std::int64_t row_squares_version_ = -1;
};
/// Holder of a LinearImpl.
TORCH_MODULE(Linear);

/// All quantal::Linear of a model with their dotted names, in registration order; a layer that is
/// registered twice appears once.
std::vector<std::pair<std::string, std::shared_ptr<LinearImpl>>> named_linears(
    torch::nn::Module& model);

/// Sum of the bytes of all storages that parameters and buffers of `model` use, shared ones once.
std::int64_t storage_bytes(const torch::nn::Module& model);

}  // namespace quantal
