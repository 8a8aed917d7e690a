#include "torch/llama_model.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string>

#include "quantal/torch/attention.h"
#include "torch/recompute.h"

namespace quantal {
namespace {

/// Rows of `dim` values, `length` of them to a head: y = x cos + (halves of x exchanged) sin, each
/// operation rounded to T.
template <class T>
void rotate_rows(const T* x, const T* cos, const T* sin, std::int64_t rows, std::int64_t length,
                 std::int64_t dim, T* y) {
  const auto product = [](T a, T b) {
    return static_cast<float>(static_cast<T>(static_cast<float>(a) * static_cast<float>(b)));
  };
  const std::int64_t half = dim / 2;
  for (std::int64_t r = 0; r < rows; ++r, x += dim, y += dim) {
    const T* c = cos + r % length * dim;
    const T* s = sin + r % length * dim;
    for (std::int64_t i = 0; i < half; ++i) {
      y[i] = static_cast<T>(product(x[i], c[i]) + product(x[half + i], s[i]));
      y[half + i] = static_cast<T>(product(x[half + i], c[half + i]) + product(x[i], s[half + i]));
    }
  }
}

/// x cos + rotate_half(x) sin, where rotate_half puts minus the second half before the first; that
/// minus is in Rotary::sin. Without gradients and for few positions one pass instead of four
/// operators, which cost more than they compute; the same bits.
torch::Tensor rotate(const torch::Tensor& x, const Rotary& rotary) {
  constexpr std::int64_t kFewPositions = 4;
  const auto type = x.scalar_type();
  const auto cos = rotary.cos.to(type), sin = rotary.sin.to(type);
  const bool few = x.size(2) <= kFewPositions && x.device().is_cpu();
  if (torch::GradMode::is_enabled() || !few || type != torch::kBFloat16) {
    return (x * cos).add_(x.roll(x.size(-1) / 2, -1) * sin);
  }
  const auto in = x.contiguous();
  torch::Tensor out = torch::empty_like(in);
  rotate_rows(in.const_data_ptr<at::BFloat16>(), cos.const_data_ptr<at::BFloat16>(),
              sin.const_data_ptr<at::BFloat16>(), in.numel() / in.size(3), in.size(2), in.size(3),
              out.mutable_data_ptr<at::BFloat16>());
  return out;
}

/// Appends new keys (or values) of one layer and returns all of them.
torch::Tensor append(torch::Tensor& store, const torch::Tensor& fresh, std::int64_t past) {
  const std::int64_t length = fresh.size(2);
  if (past + length > store.size(2)) {
    fail(Errc::kShape, "llama: cache holds " + std::to_string(store.size(2)) +
                           " positions, expected at least " + std::to_string(past + length));
  }
  store.narrow(2, past, length).copy_(fresh);
  return store.narrow(2, 0, past + length);
}

/// Sum of squares, 16 partial sums.
template <class T>
float sum_squares(const T* x, std::int64_t n) {
  constexpr std::int64_t kSums = 16;
  std::array<float, kSums> sums{};
  for (std::int64_t i = 0; i < n; i += kSums) {
    const std::int64_t count = std::min(kSums, n - i);
    for (std::int64_t j = 0; j < count; ++j) {
      const auto value = static_cast<float>(x[i + j]);
      sums[static_cast<std::size_t>(j)] += value * value;
    }
  }
  return std::accumulate(sums.begin(), sums.end(), 0.0F);
}

/// RmsNorm of contiguous rows.
template <class T>
void normalize_rows(const T* x, const float* weight, std::int64_t rows, std::int64_t size,
                    float eps, T* y) {
  constexpr std::int64_t kGrain = 32 * 1024;  // values of one task
  at::parallel_for(0, rows, kGrain / size + 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T* in = x + r * size;
      const float mean = sum_squares(in, size) / static_cast<float>(size);
      const float scale = 1 / std::sqrt(mean + eps);
      for (std::int64_t i = 0; i < size; ++i) {
        const T scaled = static_cast<T>(static_cast<float>(in[i]) * scale);
        y[r * size + i] = static_cast<T>(weight[i] * static_cast<float>(scaled));
      }
    }
  });
}

torch::Tensor normalize(const torch::Tensor& x, const torch::Tensor& weight, double eps) {
  const auto in = x.contiguous();
  const auto wide = weight.to(torch::kFloat).contiguous();
  torch::Tensor out = torch::empty_like(in);
  const std::int64_t size = weight.numel(), rows = in.numel() / size;
  const float* w = wide.const_data_ptr<float>();
  if (in.scalar_type() == torch::kFloat) {
    normalize_rows(in.const_data_ptr<float>(), w, rows, size, static_cast<float>(eps),
                   out.mutable_data_ptr<float>());
  } else {
    normalize_rows(in.const_data_ptr<at::BFloat16>(), w, rows, size, static_cast<float>(eps),
                   out.mutable_data_ptr<at::BFloat16>());
  }
  return out;
}

/// One pass over each row instead of eight operators, for small inputs most of a model's time. With
/// n = x r, r = 1 / sqrt(mean(x^2) + eps) and h = grad * weight: dx = r (h - n mean(h n)), and
/// dweight sums grad * n over rows. Roundings pass gradients straight through.
struct NormFunction : public torch::autograd::Function<NormFunction> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x,
                               const torch::Tensor& weight, double eps) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    return normalize(x, weight, eps);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto x = saved[0].to(torch::kFloat), grad = grads[0].to(torch::kFloat);
    const auto r = torch::rsqrt(x.square().mean(-1, true) + ctx->saved_data["eps"].toDouble());
    const auto n = x * r;
    torch::Tensor dx, dweight;
    if (ctx->needs_input_grad(0)) {
      const auto h = grad * saved[1].to(torch::kFloat);
      dx = (r * (h - n * (h * n).mean(-1, true))).to(saved[0].scalar_type());
    }
    if (ctx->needs_input_grad(1)) {
      const auto rounded = n.to(saved[0].scalar_type()).to(torch::kFloat);
      dweight = (grad * rounded).reshape({-1, n.size(-1)}).sum(0).to(saved[1].scalar_type());
    }
    return {dx, dweight, torch::Tensor()};
  }
};

Linear make_linear(std::int64_t in, std::int64_t out, bool bias, torch::ScalarType dtype) {
  return Linear(in, out, bias, dtype, Init::kNone);
}

}  // namespace

Rotary rotary_angles(const LlamaConfig& config, std::int64_t first, std::int64_t length,
                     torch::ScalarType dtype) {
  const auto even = torch::arange(0, config.head_dim, 2, torch::kLong).to(torch::kFloat);
  const auto inverse =
      1.0 / torch::pow(config.rope_theta, even / static_cast<double>(config.head_dim));
  const auto positions = torch::arange(first, first + length, torch::kLong).to(torch::kFloat);
  const auto half = torch::outer(positions, inverse);
  const auto sin = half.sin();
  return {torch::cat({half, half}, -1).cos().to(dtype), torch::cat({-sin, sin}, -1).to(dtype)};
}

RmsNormImpl::RmsNormImpl(std::int64_t size, double eps, torch::ScalarType dtype)
    : torch::nn::Module("RmsNorm"), eps_(eps) {
  weight = register_parameter("weight", torch::ones({size}, torch::TensorOptions().dtype(dtype)));
}

torch::Tensor RmsNormImpl::forward(const torch::Tensor& x) {
  const bool known = x.scalar_type() == torch::kFloat || x.scalar_type() == torch::kBFloat16;
  if (known && x.device().is_cpu()) {
    if (!torch::GradMode::is_enabled()) return normalize(x, weight, eps_);
    return NormFunction::apply(x, weight, eps_);
  }
  const auto wide = x.to(torch::kFloat);
  const auto scaled = wide * torch::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps_);
  return (weight * scaled.to(x.scalar_type())).to(x.scalar_type());
}

LlamaAttentionImpl::LlamaAttentionImpl(const LlamaConfig& c, torch::ScalarType dtype)
    : torch::nn::Module("LlamaAttention"),
      heads_(c.num_attention_heads),
      kv_heads_(c.num_key_value_heads),
      head_dim_(c.head_dim) {
  const std::int64_t q = heads_ * head_dim_, kv = kv_heads_ * head_dim_;
  q_proj = register_module("q_proj", make_linear(c.hidden_size, q, c.attention_bias, dtype));
  k_proj = register_module("k_proj", make_linear(c.hidden_size, kv, c.attention_bias, dtype));
  v_proj = register_module("v_proj", make_linear(c.hidden_size, kv, c.attention_bias, dtype));
  o_proj = register_module("o_proj", make_linear(q, c.hidden_size, c.attention_bias, dtype));
}

torch::Tensor LlamaAttentionImpl::forward(const torch::Tensor& x, const Rotary& rotary,
                                          KvCache* cache, std::size_t index) {
  const std::int64_t batch = x.size(0), length = x.size(1);
  const auto split = [&](const torch::Tensor& t, std::int64_t heads) {
    return t.view({batch, length, heads, head_dim_}).transpose(1, 2);
  };
  const auto q = rotate(split(q_proj->forward(x), heads_), rotary);
  auto k = rotate(split(k_proj->forward(x), kv_heads_), rotary);
  auto v = split(v_proj->forward(x), kv_heads_);
  const std::int64_t past = cache ? cache->length : 0;
  if (cache) {
    k = append(cache->keys[index], k, past);
    v = append(cache->values[index], v, past);
  }
  const auto y = attention(q, k, v, {.causal = true});
  return o_proj->forward(y.transpose(1, 2).reshape({batch, length, heads_ * head_dim_}));
}

LlamaMlpImpl::LlamaMlpImpl(const LlamaConfig& c, torch::ScalarType dtype)
    : torch::nn::Module("LlamaMLP") {
  const std::int64_t hidden = c.hidden_size, inner = c.intermediate_size;
  gate_proj = register_module("gate_proj", make_linear(hidden, inner, c.mlp_bias, dtype));
  up_proj = register_module("up_proj", make_linear(hidden, inner, c.mlp_bias, dtype));
  down_proj = register_module("down_proj", make_linear(inner, hidden, c.mlp_bias, dtype));
}

torch::Tensor LlamaMlpImpl::forward(const torch::Tensor& x) {
  return down_proj->forward(torch::silu(gate_proj->forward(x)) * up_proj->forward(x));
}

LlamaBlockImpl::LlamaBlockImpl(const LlamaConfig& c, torch::ScalarType dtype)
    : torch::nn::Module("LlamaBlock") {
  self_attn = register_module("self_attn", LlamaAttention(c, dtype));
  mlp = register_module("mlp", LlamaMlp(c, dtype));
  input_layernorm =
      register_module("input_layernorm", RmsNorm(c.hidden_size, c.rms_norm_eps, dtype));
  post_attention_layernorm =
      register_module("post_attention_layernorm", RmsNorm(c.hidden_size, c.rms_norm_eps, dtype));
}

torch::Tensor LlamaBlockImpl::forward(const torch::Tensor& x, const Rotary& rotary, KvCache* cache,
                                      std::size_t index) {
  const auto h = x + self_attn->forward(input_layernorm->forward(x), rotary, cache, index);
  return h + mlp->forward(post_attention_layernorm->forward(h));
}

LlamaModelImpl::LlamaModelImpl(const LlamaConfig& c, torch::ScalarType dtype)
    : torch::nn::Module("LlamaModel"), config_(c) {
  embed_tokens = register_module("embed_tokens", Embedding(c.vocab_size, c.hidden_size, dtype));
  layers = register_module("layers", torch::nn::ModuleList());
  for (std::int64_t i = 0; i < c.num_hidden_layers; ++i) layers->push_back(LlamaBlock(c, dtype));
  norm = register_module("norm", RmsNorm(c.hidden_size, c.rms_norm_eps, dtype));
}

torch::Tensor LlamaModelImpl::forward(const torch::Tensor& ids, KvCache* cache, bool recompute) {
  const std::int64_t past = cache ? cache->length : 0;
  torch::Tensor h = embed_tokens->forward(ids);
  const Rotary rotary = rotary_angles(config_, past, ids.size(1), h.scalar_type());
  const bool recorded = recompute && cache == nullptr && torch::GradMode::is_enabled();
  // Recomputed blocks are recorded only behind an input that asks for gradients.
  if (recorded && !h.requires_grad()) h.set_requires_grad(true);
  for (std::size_t i = 0; i < layers->size(); ++i) {
    const auto block = layers->ptr<LlamaBlockImpl>(i);
    if (recorded) {
      h = recompute_in_backward(
          [block, rotary, i](const torch::Tensor& x) {
            return block->forward(x, rotary, nullptr, i);
          },
          h);
    } else {
      h = block->forward(h, rotary, cache, i);
    }
  }
  if (cache) cache->length += ids.size(1);
  return norm->forward(h);
}

}  // namespace quantal
