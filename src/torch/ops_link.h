// Keeps the op registrations in a program that links quantal_torch as an archive.
#pragma once

namespace quantal {

/// Does nothing; whoever calls it makes the linker keep ops_stable.cpp, whose static registrations
/// define the ops of library "quantal".
void link_torch_ops() noexcept;
/// The same for ops_weights.cpp; link_torch_ops calls it.
void link_weight_ops() noexcept;
/// And for ops_activations.cpp.
void link_activation_ops() noexcept;
/// And for ops_attention.cpp.
void link_attention_ops() noexcept;
/// And for ops_low_rank.cpp.
void link_low_rank_ops() noexcept;
/// And for ops_cuda.cpp and ops_cuda_quantize.cpp.
void link_cuda_ops() noexcept;
void link_cuda_weight_ops() noexcept;
/// And for ops_aten.cpp.
void link_aten_ops() noexcept;

}  // namespace quantal
