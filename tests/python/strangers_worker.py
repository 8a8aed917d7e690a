"""Two ranks over gloo; run by test_strangers.py under torch.distributed.run. Each function is one
check; a failure ends the process with its traceback."""

import os
import pathlib
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from quantal import QuantizationConfig, QuantizedLinear
from ranks import leave

OPTIONS = {"support": "extended"}
FORMS = {
    "nf4": QuantizationConfig("bnb_nf4", compute_dtype=torch.float32, backend_options=OPTIONS),
    "hqq": QuantizationConfig("hqq", bits=4, compute_dtype=torch.float32, backend_options=OPTIONS),
    "int8": QuantizationConfig(
        "bnb_int8", compute_dtype=torch.float32, backend_options={**OPTIONS, "int8_threshold": 1.5}
    ),
}


class Block(nn.Module):
    """A quantized layer between trained ones. Where the format allows it, its rows do not divide by
    two ranks."""

    def __init__(self, form: str) -> None:
        super().__init__()
        rows = 62 if form == "hqq" else 63
        self.down = nn.Linear(64, 64, bias=False)
        self.base = QuantizedLinear.from_linear(nn.Linear(64, rows), FORMS[form])
        self.base.bias.requires_grad_(False)
        self.up = nn.Linear(rows, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(torch.relu(self.base(self.down(x))))


def build(form: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[Block(form) for _ in range(3)])


def inputs() -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


def trained_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    out = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            out[name.removeprefix("module.")] = whole
    return out


def reference(form: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = build(form)
    y = model(inputs())
    y.square().sum().backward()
    return y.detach(), trained_gradients(model)


def unsharded_bytes(model: nn.Sequential) -> int:
    """Storage of gathered parameters that is alive, as FSDP keeps it."""
    total = 0
    for block in model:
        for parameter in block._get_fsdp_state()._fsdp_param_group.fsdp_params:
            gathered = getattr(parameter, "_unsharded_param", None)
            if gathered is not None:
                total += gathered.untyped_storage().size()
    return total


def check_fully_shard(form: str) -> None:
    expected, wanted = reference(form)
    model = build(form)
    for block in model:
        fully_shard(block, reshard_after_forward=True)
    fully_shard(model)
    assert model[0].base.codes.to_local().dtype is torch.uint8
    for _ in range(2):  # storage is freed and filled again at each step
        model.zero_grad()
        y = model(inputs())
        torch.testing.assert_close(y.detach(), expected)
        assert unsharded_bytes(model) == 0, "after forward"
        y.square().sum().backward()
        assert unsharded_bytes(model) == 0, "after backward"
        grads = trained_gradients(model)
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name])


def check_mixed_precision_keeps_bytes(form: str) -> None:
    model, whole = build(form), build(form)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model(inputs()).float().sum().backward()
    for ours, theirs in zip(model, whole, strict=True):
        assert torch.equal(ours.base.codes.full_tensor(), theirs.base.codes)
        assert torch.equal(ours.base.stats.full_tensor(), theirs.base.stats)


def check_ddp(form: str) -> None:
    expected, wanted = reference(form)
    # Every rank starts elsewhere: DDP brings rank 0's packed bytes to all.
    model = DistributedDataParallel(build(form, seed=dist.get_rank()))
    y = model(inputs())
    torch.testing.assert_close(y.detach(), expected)
    y.square().sum().backward()
    for name, grad in trained_gradients(model).items():
        torch.testing.assert_close(grad, wanted[name])
    whole = build(form)
    for ours, theirs in zip(model.module, whole, strict=True):
        assert torch.equal(ours.base.codes, theirs.base.codes)
        assert torch.equal(ours.base.stats, theirs.base.stats)


def write_checkpoint(form: str, folder: pathlib.Path) -> None:
    model = build(form)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / form)


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for form in FORMS:
        check_fully_shard(form)
        check_mixed_precision_keeps_bytes(form)
        check_ddp(form)
        write_checkpoint(form, folder)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "done").write_text(os.environ.get("QUANTAL_CPU", ""))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
