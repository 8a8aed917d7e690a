"""What the tests of training checkpoints share: a small run over any number of ranks, and models of
which a mixture of two saves shows."""

import os

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard

import quantal
from qlora_support import METHODS, lora, quantized
from quantal import TrainingCheckpoints, base_identity, chunked_loss

GLOBAL_BATCH = 12


def make(world: int = 0, method: str = "hqq4", optimizer=torch.optim.AdamW, **kwargs):
    torch.manual_seed(11)
    model = get_peft_model(quantized(METHODS[method]), lora(**kwargs)).train()
    if world:
        base = model.get_base_model()
        for block in base.model.layers:
            fully_shard(block)
        fully_shard(base)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, optimizer(trained, lr=1e-2)


def scheduler_of(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def step(model, optimizer, number: int, scheduler=None) -> float:
    """One step over the same 12 rows for any number of ranks. The loss is summed in the order of
    the rows, so equal weights give equal bits."""
    ids = torch.randint(
        0, 256, (GLOBAL_BATCH, 24), generator=torch.Generator().manual_seed(100 + number)
    )
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    losses = torch.zeros(GLOBAL_BATCH, dtype=torch.float64)
    for i in range(rank, GLOBAL_BATCH, ranks):
        loss = chunked_loss(model, ids[i : i + 1], ids[i : i + 1])
        (loss * ranks / GLOBAL_BATCH).backward()
        losses[i] = loss.detach().double()
    if ranks > 1:
        dist.all_reduce(losses)
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    optimizer.zero_grad()
    return sum(losses.tolist())


def manager(folder, model, **kwargs) -> TrainingCheckpoints:
    return TrainingCheckpoints(folder, base_identity(model), **kwargs)


def saved(folder, steps: int = 2, **kwargs):
    """A folder with one checkpoint; returns (checkpoints, model, optimizer)."""
    model, optimizer = make(**kwargs)
    for number in range(steps):
        step(model, optimizer, number)
    checkpoints = manager(folder, model)
    checkpoints.save(steps, model, optimizer)
    checkpoints.wait()
    return checkpoints, model, optimizer


def flip(path: str, at: int = -100) -> None:
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


class Numbered(torch.nn.Module):
    """Every value is the number of the step: a mixture of two saves shows."""

    def __init__(self, step: int) -> None:
        super().__init__()
        for name in "abc":
            setattr(self, name, torch.nn.Parameter(torch.full((50, 1000), float(step))))


BASE = quantal.BaseIdentity({}, {})


def numbered(step: int):
    model = Numbered(step)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def assert_whole(folder) -> int:
    """The step of the last good checkpoint, which has to be whole; 0 where there is none."""
    checkpoints = TrainingCheckpoints(folder, BASE)
    if checkpoints.latest() is None:
        return 0
    model, optimizer = numbered(-1)
    step = checkpoints.load(model, optimizer).step
    for p in model.parameters():
        assert (p == step).all()
    return step
