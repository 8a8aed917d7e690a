"""Several ranks inside one test: forked processes joined by gloo. A fork costs no import, which
would be most of the time of such a test."""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from typing import NoReturn

import torch
import torch.distributed as dist


def _child(rank: int, world: int, folder: str, function, args, timeout: float) -> None:
    import datetime

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    out = os.path.join(folder, f"result-{rank}")
    try:
        if world:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=timeout),
            )
        result = ("value", function(rank, world, *args))
    except BaseException as error:
        traceback.print_exc()
        result = ("error", error)
    with open(out + ".new", "wb") as file:
        pickle.dump(result, file)
    os.rename(out + ".new", out)
    os._exit(0 if result[0] == "value" else 1)


def leave() -> NoReturn:
    """Ends a process that torchrun started. Threads of gloo release Python objects while the
    interpreter ends, which aborts a process now and then: this does not wait for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Ranks:
    """Started ranks; `world` 0 is one process without a process group."""

    def __init__(self, world: int, function, *args, timeout: float = 600.0) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(
                target=_child, args=(rank, world, self._folder.name, function, args, timeout)
            )
            for rank in range(max(world, 1))
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def join(self, seconds: float = 900.0) -> list:
        """("value", result), ("error", exception) or ("died", exit code) of each rank."""
        end = time.monotonic() + seconds
        found = []
        for rank, process in enumerate(self.processes):
            process.join(max(0.1, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            path = os.path.join(self._folder.name, f"result-{rank}")
            if os.path.exists(path):
                with open(path, "rb") as file:
                    found.append(pickle.load(file))
            else:
                found.append(("died", process.exitcode))
        self._folder.cleanup()
        return found


def run_ranks(world: int, function, *args, timeout: float = 600.0) -> list:
    """What ``function(rank, world, *args)`` returned on each rank; an error of a rank fails."""
    results = Ranks(world, function, *args, timeout=timeout).join(timeout + 60.0)
    assert [kind for kind, _ in results] == ["value"] * max(world, 1), results
    return [value for _, value in results]
