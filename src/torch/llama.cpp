#include "quantal/torch/llama.h"

#include <torch/torch.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "torch/llama_model.h"
#include "torch/stable_executor.h"
#include "torch/state.h"

namespace quantal {
namespace {

/// Sum of -log p(next token) over positions 0 .. length-2, in float32 logits and double sum.
double sum_nll(const torch::Tensor& logits, const torch::Tensor& ids) {
  const std::int64_t vocab = logits.size(-1);
  const auto predicted = logits.slice(1, 0, -1).reshape({-1, vocab}).to(torch::kFloat);
  const auto target = ids.slice(1, 1).reshape({-1});
  const auto each = torch::nn::functional::cross_entropy(
      predicted, target, torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kNone));
  return each.to(torch::kDouble).sum().item<double>();
}

std::int64_t choose_token(const torch::Tensor& logits, double temperature,
                          std::optional<at::Generator>& generator) {
  if (temperature <= 0) return logits.argmax(-1).item<std::int64_t>();
  const auto p = torch::softmax(logits.to(torch::kFloat) / temperature, -1);
  return torch::multinomial(p, 1, /*replacement=*/false, generator).item<std::int64_t>();
}

void read_into(const ModelSource& source, const std::string& name, torch::Tensor& to) {
  torch::Tensor target = to.is_contiguous() ? to : torch::empty_like(to);
  const std::int64_t rows = to.dim() < 2 ? 1 : to.size(0);
  source.read_rows(name, 0, rows, from_torch(to.scalar_type()), target.mutable_data_ptr(),
                   stable_executor());
  if (!target.is_same(to)) to.copy_(target);
}

}  // namespace

LlamaImpl::LlamaImpl(LlamaConfig config, torch::ScalarType dtype)
    : torch::nn::Module("Llama"), config_(std::move(config)) {
  model = register_module("model", std::make_shared<LlamaModelImpl>(config_, dtype));
  if (!config_.tie_word_embeddings) {
    lm_head = register_module(
        "lm_head", Linear(config_.hidden_size, config_.vocab_size, false, dtype, Init::kNone));
  }
}

void LlamaImpl::check_ids(const torch::Tensor& ids, std::int64_t past) const {
  if (ids.dim() != 2 || ids.scalar_type() != torch::kLong || ids.size(1) < 1) {
    fail(Errc::kShape, "llama: ids have shape " + shape_string(ids.sizes().vec()) +
                           ", expected int64 [batch, length >= 1]");
  }
  if (past + ids.size(1) > config_.max_position_embeddings) {
    fail(Errc::kShape, "llama: positions are " + std::to_string(past + ids.size(1)) +
                           ", expected at most " + std::to_string(config_.max_position_embeddings));
  }
  if (ids.numel() == 0) return;
  const auto [low, high] = torch::aminmax(ids);
  if (low.item<std::int64_t>() < 0 || high.item<std::int64_t>() >= config_.vocab_size) {
    fail(Errc::kShape, "llama: ids are " + std::to_string(low.item<std::int64_t>()) + " .. " +
                           std::to_string(high.item<std::int64_t>()) + ", expected 0 .. " +
                           std::to_string(config_.vocab_size - 1));
  }
}

std::map<std::string, std::string> LlamaImpl::tied_tensors() const {
  if (!lm_head.is_empty()) return {};
  return {{"lm_head.weight", "model.embed_tokens.weight"}};
}

Embedding LlamaImpl::embed_tokens() const { return model->embed_tokens; }

torch::Tensor LlamaImpl::hidden(const torch::Tensor& ids, KvCache* cache) {
  check_ids(ids, cache ? cache->length : 0);
  return model->forward(ids, cache, checkpointing_ && is_training());
}

torch::Tensor LlamaImpl::logits(const torch::Tensor& hidden_states) {
  if (!lm_head.is_empty()) return lm_head->forward(hidden_states);
  return model->embed_tokens->logits(hidden_states);
}

torch::Tensor LlamaImpl::forward(const torch::Tensor& ids) { return logits(hidden(ids, nullptr)); }

torch::Tensor LlamaImpl::step(const torch::Tensor& ids, KvCache& cache) {
  return logits(hidden(ids, &cache).select(1, -1));
}

KvCache LlamaImpl::make_cache(std::int64_t batch, std::int64_t capacity) const {
  KvCache cache;
  const auto options = torch::TensorOptions().dtype(model->embed_tokens->dtype());
  for (std::int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    const std::array<std::int64_t, 4> shape{batch, config_.num_key_value_heads, capacity,
                                            config_.head_dim};
    cache.keys.push_back(torch::zeros(shape, options));
    cache.values.push_back(torch::zeros(shape, options));
  }
  return cache;
}

torch::Tensor LlamaImpl::loss(const torch::Tensor& ids) {
  const auto predicted = logits(hidden(ids, nullptr).slice(1, 0, -1));
  return torch::nn::functional::cross_entropy(
      predicted.reshape({-1, predicted.size(-1)}).to(torch::kFloat), ids.slice(1, 1).reshape({-1}));
}

double LlamaImpl::perplexity(const torch::Tensor& ids, std::int64_t rows_at_a_time) {
  if (ids.dim() != 2 || ids.size(0) < 1 || ids.size(1) < 2) {
    fail(Errc::kShape, "llama: ids have shape " + shape_string(ids.sizes().vec()) +
                           ", expected [n >= 1, length >= 2]");
  }
  const torch::NoGradGuard no_grad;
  const bool was_training = is_training();
  eval();
  double sum = 0;
  for (std::int64_t begin = 0; begin < ids.size(0); begin += rows_at_a_time) {
    const auto rows = ids.narrow(0, begin, std::min(rows_at_a_time, ids.size(0) - begin));
    sum += sum_nll(forward(rows), rows);
  }
  train(was_training);
  return std::exp(sum / static_cast<double>(ids.size(0) * (ids.size(1) - 1)));
}

std::vector<std::int64_t> LlamaImpl::generate(const torch::Tensor& ids,
                                              const GenerateOptions& options) {
  if (ids.dim() != 1)
    fail(Errc::kShape,
         "llama: prompt has " + std::to_string(ids.dim()) + " dimensions, expected 1");
  const torch::NoGradGuard no_grad;
  const bool was_training = is_training();
  eval();
  const std::int64_t capacity =
      std::min(ids.size(0) + options.max_new_tokens, config_.max_position_embeddings);
  KvCache cache = make_cache(1, capacity);
  std::optional<at::Generator> generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  std::vector<std::int64_t> out;
  torch::Tensor next = ids.unsqueeze(0);
  while (static_cast<std::int64_t>(out.size()) < options.max_new_tokens &&
         cache.length + next.size(1) <= capacity) {
    const std::int64_t token = choose_token(step(next, cache)[0], options.temperature, generator);
    out.push_back(token);
    if (std::ranges::find(config_.eos_token_ids, token) != config_.eos_token_ids.end()) break;
    next = torch::tensor({token}).unsqueeze(0);
  }
  train(was_training);
  return out;
}

void LlamaImpl::initialize(std::uint64_t seed) {
  const torch::NoGradGuard no_grad;
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  for (auto& [name, tensor] : base_tensors(*this)) {
    if (name.ends_with("norm.weight") || name.ends_with("layernorm.weight")) {
      tensor.fill_(1);
    } else if (name.ends_with(".bias")) {
      tensor.zero_();
    } else {
      tensor.normal_(0, 0.02, generator);
    }
  }
}

Llama load_llama(const std::string& path, torch::ScalarType dtype) {
  const auto source = ModelSource::open(path);
  Llama llama(LlamaConfig::from_json(source->config_json()), dtype);
  std::map<std::string, std::vector<std::int64_t>> shapes;
  for (const auto& info : source->tensors()) shapes[info.name] = info.shape;
  std::string missing, misshapen;
  const torch::NoGradGuard no_grad;
  auto tensors = base_tensors(*llama);
  for (auto& [name, tensor] : tensors) {
    const auto found = shapes.find(name);
    if (found == shapes.end()) {
      missing += " " + name;
    } else if (found->second != tensor.sizes().vec()) {
      misshapen += " " + name + " " + shape_string(found->second) + " instead of " +
                   shape_string(tensor.sizes().vec());
    }
  }
  if (!missing.empty() || !misshapen.empty()) {
    fail(Errc::kCorrupt,
         "load_llama: tensors do not fit the config: missing" +
             (missing.empty() ? " none" : missing) + "; misshapen" +
             (misshapen.empty() ? " none" : misshapen),
         {path, "", -1});
  }
  for (auto& [name, tensor] : tensors) read_into(*source, name, tensor);
  return llama;
}

}  // namespace quantal
