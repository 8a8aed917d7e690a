// quantal without torch in one header: element types and errors, kernels, dialects and conversion
// between them, containers, policy, whole models, the planner. Link quantal::quantal.
//
// The layers, adapters and LoRA over torch::nn::Module are in quantal/torch.h (quantal::torch).
#pragma once

#include "quantal/archive.h"
#include "quantal/attention.h"
#include "quantal/attention_choice.h"
#include "quantal/backend.h"
#include "quantal/checkpoint.h"
#include "quantal/core.h"
#include "quantal/coverage.h"
#include "quantal/formats.h"
#include "quantal/ggml.h"
#include "quantal/io.h"
#include "quantal/kernels.h"
#include "quantal/low_rank.h"
#include "quantal/merge_report.h"
#include "quantal/model_fit.h"
#include "quantal/packed.h"
#include "quantal/plan.h"
#include "quantal/policy.h"
#include "quantal/safetensors.h"
#include "quantal/shards.h"
#include "quantal/stored_layer.h"
#include "quantal/transcode.h"
