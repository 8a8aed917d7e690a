"""What the tests of sharding share: models, a few steps of training, bytes put together again."""

import contextlib
import warnings

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

from conftest import EXTENDED, hqq, nf4
from qlora_support import ALL, METHODS, lora, packed_layers, quantized
from quantal import PackedLinear, QuantizationConfig, QuantizedEmbedding, _core, _peft_layers
from quantal import prepare_model_for_training as prepare
from quantal._packed import whole_tensor

PREFIXES = ("_fsdp_wrapped_module.", "base_model.model.", ".base_layer")

#: Forms whose statistics or groups are cut in other ways than rows.
ODD_FORMS = {
    "nf4": nf4(double_quant=False),
    "fp4": nf4(double_quant=True, quant_type="fp4"),
    "hqq4-axis0": hqq(backend_options={"axis": 0}),
    "hqq8": hqq(8, 128),
    "quanto4-hqq": QuantizationConfig(
        "quanto_int4", compute_dtype=torch.float32, backend_options={**EXTENDED, "mode": "hqq"}
    ),
    "mxfp4": QuantizationConfig(
        "mlx_int4",
        compute_dtype=torch.float32,
        group_size=32,
        backend_options={**EXTENDED, "mode": "mxfp4"},
    ),
}
FORMS = {**METHODS, **ODD_FORMS}


def plain_name(name: str) -> str:
    for part in PREFIXES:
        name = name.replace(part, "")
    return name


def whole_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The packed bytes of a sharded model, gathered; by the names of the base."""
    out = {}
    for name, layer in packed_layers(model).items():
        for part, data in zip(("codes", "stats", "shared"), layer._whole_bytes(), strict=True):
            out[f"{plain_name(name)}.{part}"] = data.detach().clone()
    return out


def adapted(config: QuantizationConfig, dora: bool = False, hidden: int = 64) -> nn.Module:
    """A tiny quantized Llama with adapters; the same on every rank."""
    torch.manual_seed(0)
    model = prepare(quantized(config, hidden), use_gradient_checkpointing=False)
    return get_peft_model(model, lora(ALL, use_dora=dora))


def attach(dora: bool = False):
    def add(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        model = prepare(model, use_gradient_checkpointing=False)
        return get_peft_model(model, lora(ALL, use_dora=dora))

    return add


@contextlib.contextmanager
def lora_calls(one_step: bool = True):
    """A list to which every call of an adapted layer adds whether it was done in one step; or, with
    `one_step` False, PEFT's own way for all of them."""
    own, calls = _peft_layers.lora_product, []

    def counted(layer, x):
        y = own(layer, x) if one_step else None
        calls.append(y is not None)
        return y

    _peft_layers.lora_product = counted
    try:
        yield calls
    finally:
        _peft_layers.lora_product = own


def batch(step: int, size: int = 12, length: int = 16) -> torch.Tensor:
    """Tokens with something to learn: each sequence counts upwards from a random start."""
    generator = torch.Generator().manual_seed(100 + step)
    start = torch.randint(0, 256, (size, 1), generator=generator)
    return (start + torch.arange(length)) % 256


def train(model: nn.Module, rank: int, world: int, steps: int, lr: float = 1e-2) -> list[float]:
    """Steps of AdamW over the global batch of 12, cut into equal parts; mean losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    losses = []
    for step in range(steps):
        tokens = batch(step).chunk(world)[rank]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone().double()
        if world > 1:
            dist.all_reduce(mean)
        losses.append((mean / max(world, 1)).item())
    return losses


def plant_nans(model: nn.Module) -> int:
    """Overwrites codes with byte patterns that are NaNs as float16, bfloat16 and float32, quiet
    and signalling, of both signs. Returns the number of bytes."""
    patterns = [
        torch.tensor(p, dtype=torch.uint8)
        for p in (
            [0x01, 0x7C, 0x01, 0xFC, 0xFF, 0x7F, 0xFF, 0xFF],  # float16
            [0x81, 0x7F, 0x81, 0xFF, 0xC1, 0x7F, 0x90, 0xFF],  # bfloat16, float32's high half
            [0x01, 0x00, 0x80, 0x7F, 0xFF, 0xFF, 0xBF, 0xFF],  # float32, signalling
        )
    ]
    count = 0
    for layer in packed_layers(model).values():
        rows = layer.codes.shape[0]
        for r in range(rows):
            width = min(layer.codes.shape[1], 8)
            layer.codes.data[r, :width] = patterns[r % 3][:width]
            count += width
    return count


@contextlib.contextmanager
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Zoo(nn.Module):
    """Blocks of layers of many forms behind a packed embedding; no row count divides by 2, 3 or 4
    but where a form asks for it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)

        def values(rows: int, cols: int) -> torch.Tensor:
            return 0.05 * torch.randn(rows, cols, generator=generator)

        cols = 256
        self.embed = _packed(QuantizedEmbedding, values(61, cols), "mlx", bits=4, group_size=64)
        blocks: list[nn.Module] = []
        for dialect, options in _zoo_forms():
            rows = 128 if options.get("axis") in (0, -1) else 71 - (options["bits"] == 1)
            down = _packed(PackedLinear, values(rows, cols), dialect, **options)
            up = nn.Linear(rows, cols)
            up.weight.data.copy_(values(cols, rows))
            up.bias.data.zero_()
            blocks.append(nn.Sequential(down, up))
        self.blocks = nn.ModuleList(blocks)
        for p in self.parameters():
            p.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(cols))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = x + block(x)
        return x


def _zoo_forms():
    for bits in (1, 2, 3, 4, 5, 6, 8):
        yield "hqq", {"bits": bits, "group_size": 64}
    yield "hqq", {"bits": 4, "group_size": 64, "axis": 0}
    for bits in (2, 3, 4, 5, 6, 8):
        yield "mlx", {"bits": bits, "group_size": 64}
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        yield "mlx", {"bits": 0, "group_size": 0, "mode": mode}
    for bits in (2, 4, 8):
        yield "quanto", {"bits": bits, "method": f"quanto_int{bits}"}
    yield "quanto", {"bits": 4, "method": "quanto_int4", "axis": -1}
    yield "bnb", {"bits": 4, "method": "bnb_nf4"}
    yield "bnb", {"bits": 4, "method": "bnb_nf4", "double_quant": False, "quant_type": "fp4"}
    yield "bnb", {"bits": 8, "method": "bnb_int8"}
    for mode in ("Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"):
        yield "gguf", {"bits": 0, "group_size": 0, "mode": mode}


def _packed(kind, weight: torch.Tensor, dialect: str, **settings):
    from quantal import _ops

    options = _core.QuantizeOptions()
    options.value_dtype = "f32"
    if dialect == "hqq":
        options.method = "hqq"
    for name, value in settings.items():
        setattr(options, name, value)
    spec = _core.make_spec(*weight.shape, options, dialect)
    return kind.from_packed(spec, *_ops.quantize(weight, spec))


__all__ = [
    "ALL",
    "FORMS",
    "METHODS",
    "ODD_FORMS",
    "Zoo",
    "adapted",
    "attach",
    "batch",
    "lora_calls",
    "plant_nans",
    "quietly",
    "train",
    "whole_bytes",
    "whole_tensor",
]
