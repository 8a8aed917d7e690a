// quantal over libtorch: quantized linear layers, adapters, LoRA and a Llama-family model for
// torch::nn::Module. This header is the whole face; its parts can be included alone.
#pragma once

#include "quantal/torch/adapter.h"
#include "quantal/torch/attention.h"
#include "quantal/torch/embedding.h"
#include "quantal/torch/linear.h"
#include "quantal/torch/llama.h"
#include "quantal/torch/lora.h"
#include "quantal/torch/merge.h"
#include "quantal/torch/ops.h"
#include "quantal/torch/plan.h"
#include "quantal/torch/training.h"
