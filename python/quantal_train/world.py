"""The ranks of a run: process group, device, and errors of ranks that are gone."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from quantal import ConfigError, DeviceError, QuantalError

_GONE = re.compile(
    r"gloo|nccl|connection|peer|timed? ?out|timeout|store|broken pipe|process group", re.IGNORECASE
)


@dataclasses.dataclass
class World:
    """``group`` moves host memory (gloo) and is used by checkpoints alone."""

    rank: int
    size: int
    device: torch.device
    group: Any
    timeout: float

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError("--device is cuda, expected cpu: torch finds no CUDA device")
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if name != "cpu":
        raise ConfigError(f"--device is {name}, expected cuda or cpu")
    return torch.device("cpu")


def join(device: str | None, timeout: float, threads: int | None) -> World:
    """Joins the ranks that torchrun started; alone without torchrun."""
    if threads:
        torch.set_num_threads(threads)
    place = _device(device)
    backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
    limit = datetime.timedelta(seconds=timeout)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group(backend="gloo", timeout=limit)
    return World(dist.get_rank(), dist.get_world_size(), place, group, timeout)


@contextlib.contextmanager
def peers(world: World, doing: str) -> Iterator[None]:
    """Inside, what torch says of a rank that ended or hangs becomes a DeviceError in words."""
    try:
        yield
    except QuantalError:
        raise
    except RuntimeError as error:
        text = (str(error).strip().splitlines() or [""])[0]
        if world.size == 1 or not _GONE.search(text):
            raise
        raise DeviceError(
            f"{doing}: another rank ended, or was silent for {world.timeout:.0f} s (this is rank "
            f"{world.rank} of {world.size}); start again with the same --output_dir, on any number "
            f"of ranks, to go on from the last good checkpoint ({text})"
        ) from error
