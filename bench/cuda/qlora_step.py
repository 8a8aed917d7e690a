"""A QLoRA step of a Llama-shaped model with random weights: quantal, bitsandbytes, and bf16 LoRA.

The model is written here, so that it needs no package and no file. All sides have the same model,
tokens, loss, AdamW and checkpointing of every block, and LoRA of rank 16 on all linear layers of
the blocks: PEFT's where it is installed, else the layer below. Steps of all sides alternate in one
process; the memory of a side is what its first steps add to what the device held before it was
built.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
from report import Report
from targets import Training
from timing import Budget, Timer, reason
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Size:
    """Of a Llama; `full` is that of TinyLlama, 1.1 billion weights."""

    hidden: int = 2048
    inner: int = 5632
    blocks: int = 22
    heads: int = 32
    groups: int = 4  #: heads of keys and values
    words: int = 32000
    seq: int = 2048

    def weights(self) -> int:
        """Number of weights."""
        keys = self.hidden // self.heads * self.groups
        block = self.hidden * (2 * self.hidden + 2 * keys + 3 * self.inner + 2)
        return self.blocks * block + self.hidden * (2 * self.words + 1)


TINY = Size(64, 128, 2, 4, 2, 128, 32)

# ------------------------------------------------------------------ the model


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of [batch, heads, seq, size], Llama's halves."""
    size = x.shape[-1]
    rate = 10000.0 ** (-torch.arange(0, size, 2, device=x.device).float() / size)
    angle = torch.arange(x.shape[-2], device=x.device).float()[:, None] * rate
    cos, sin = (f(torch.cat([angle, angle], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        keys = size.hidden // size.heads * size.groups
        self.size = size
        self.q_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.k_proj = nn.Linear(size.hidden, keys, bias=False)
        self.v_proj = nn.Linear(size.hidden, keys, bias=False)
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.gate_proj = nn.Linear(size.hidden, size.inner, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.inner, bias=False)
        self.down_proj = nn.Linear(size.inner, size.hidden, bias=False)
        self.before, self.between = Norm(size.hidden), Norm(size.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(t: torch.Tensor, count: int) -> torch.Tensor:
            return t.unflatten(-1, (count, -1)).transpose(1, 2)

        h = self.before(x)
        q = rotated(heads(self.q_proj(h), self.size.heads))
        k = rotated(heads(self.k_proj(h), self.size.groups))
        v = heads(self.v_proj(h), self.size.groups)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        h = self.between(x)
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.words, size.hidden)
        self.layers = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.norm = Norm(size.hidden)
        self.lm_head = nn.Linear(size.hidden, size.words, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=False)
        return self.lm_head(self.norm(x))


def random_model(size: Size, device: torch.device, seed: int = 0) -> Llama:
    """bfloat16, made on the device."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Llama(size)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    return model.requires_grad_(False)


# ------------------------------------------------------------------ adapters


class Lora(nn.Module):
    """base(x) + up(down(x)) * alpha / rank, as PEFT computes it without dropout."""

    def __init__(self, base: nn.Module, cols: int, rows: int, like: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_down = nn.Linear(cols, RANK, bias=False, device=like.device)
        self.lora_up = nn.Linear(RANK, rows, bias=False, device=like.device)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        extra = self.lora_up(self.lora_down(x.to(self.lora_down.weight.dtype)))
        y = self.base(x)
        return y + (extra * (ALPHA / RANK)).to(y.dtype)


def with_lora(model: nn.Module, peft: bool) -> nn.Module:
    """The model with adapters, which alone are trained."""
    model.requires_grad_(False)
    if peft:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEARS)
        )
        model = get_peft_model(model, config)
    else:
        for block in model.layers:
            for name in LINEARS:
                base = getattr(block, name)
                like = model.norm.weight
                setattr(block, name, Lora(base, base.in_features, base.out_features, like))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.train()


# ------------------------------------------------------------------ sides


def bitsandbytes_base(model: Llama) -> nn.Module:
    import bitsandbytes as bnb

    for block in model.layers:
        for name in LINEARS:
            old = getattr(block, name)
            new = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=True,
            )
            new.weight = bnb.nn.Params4bit(
                old.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=new
            )
            setattr(block, name, new.to(old.weight.device))
    model.is_loaded_in_4bit = True
    return model


def quantal_base(model: Llama, method: str, options: dict[str, Any]) -> nn.Module:
    import quantal

    device = model.norm.weight.device
    backend = quantal.Backend.CUDA if device.type == "cuda" else quantal.Backend.CPU
    config = quantal.QuantizationConfig(
        method=method,
        compute_dtype=torch.bfloat16,
        skip_modules=["lm_head"],
        backend_options={"support": "extended"},
        **options,
    )
    return quantal.create_quantization_adapter(backend, config).quantize_model(model)


#: Order in which sides are built; the first two are what the target is about.
SIDES: dict[str, Callable[[Llama], nn.Module]] = {
    "bf16 LoRA": lambda model: model,
    "quantal NF4": lambda model: quantal_base(model, "bnb_nf4", {"double_quant": True}),
    "bitsandbytes NF4": bitsandbytes_base,
    "quantal HQQ": lambda model: quantal_base(model, "hqq", {"bits": 4, "group_size": 64}),
}
NEEDS = {"bitsandbytes NF4": "bitsandbytes", "quantal NF4": "quantal", "quantal HQQ": "quantal"}


def stepper(model: nn.Module, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One step of training; returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> torch.Tensor:
        logits = model(tokens)[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


class Memory:
    """Bytes that torch holds on the device; without a GPU there is no figure."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated(device)

    def restart(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before


def _built(
    side: str, size: Size, timer: Timer, tokens: torch.Tensor, peft: bool
) -> tuple[Training, Callable[[], torch.Tensor]]:
    memory = Memory(timer.device)
    step = stepper(with_lora(SIDES[side](random_model(size, timer.device)), peft), tokens)
    gc.collect()
    memory.restart()
    for _ in range(2):
        step()
    timer.synchronize()
    return Training(side, peak=memory.peak()), step


def run(
    timer: Timer,
    budget: Budget,
    report: Report,
    size: Size,
    found: dict[str, str],
    sides: tuple[str, ...] = tuple(SIDES),
) -> None:
    """Builds the sides that are installed, times their steps in turn, and fills the report."""
    peft = peers.usable(found, "peft")
    adapters = f"PEFT {found['peft']}" if peft else "the bench's own (PEFT is not installed)"
    report.say(
        "QLoRA step",
        f"{size.weights() / 1e9:.2f} billion weights, 1 x {size.seq} tokens, LoRA of rank {RANK}: "
        f"{adapters}",
    )
    tokens = torch.randint(0, size.words, (1, size.seq), device=timer.device)
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    for side in sides:
        package = NEEDS.get(side)
        training = Training(side)
        if package is not None and not peers.usable(found, package):
            training.note = f"{package} {found[package]}"
        elif budget.left() <= 0:
            training.note = "left out for time"
        else:
            try:
                training, steps[side] = _built(side, size, timer, tokens, peft)
            except Exception as error:  # out of memory, or a rival's own
                training.note = reason(error)
        report.results.training.append(training)
        report.write()
    losses: dict[str, torch.Tensor] = {}

    def kept(side: str) -> Callable[[], None]:
        return lambda: losses.__setitem__(side, steps[side]())

    for side, seconds in timer.steps({side: kept(side) for side in steps}).items():
        training = next(t for t in report.results.training if t.side == side)
        training.tokens_per_second = size.seq / seconds
        training.loss = float(losses[side])
    report.write()
