"""What the tests of the planner share: a small Llama, and the real bytes of models and steps."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, VOCABULARY = 128, 512


def small_llama(
    dtype: torch.dtype = torch.float32, attention: str = "sdpa", **settings
) -> LlamaForCausalLM:
    """Three blocks with grouped-query attention and sizes that no power of two divides evenly."""
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 3, "vocab_size": VOCABULARY} | settings
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=344,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attn_implementation=attention,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Of this rank where it is sharded."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def real_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, of this rank where they are sharded."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(map(tensor_bytes, tensors.values()))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's states, less the counters of steps."""
    return sum(
        tensor_bytes(value)
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )


def peak_bytes(body: Callable[[], object]) -> int:
    """The most bytes that torch's allocator handed out at once, beyond those before `body`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = body()
    del kept
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    current = most = 0
    for _, change in changes:
        current += change
        most = max(most, current)
    return most
