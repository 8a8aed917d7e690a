"""Checkpoints of training are whole whatever ends a process: kills at every change on disk and at
random moments, full disks, ranks that are gone."""

import datetime
import os
import random
import resource
import signal
import time

import pytest
import torch.distributed as dist

import quantal
from checkpoint_support import BASE, assert_whole, numbered
from quantal import TrainingCheckpoints
from quantal import _checkpoint_store as store
from ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def _die_at(rank, world, folder, count):
    """Saves two steps; the process is killed at its count-th change on disk."""
    left = [count]

    def dies(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "makedirs"):
        setattr(os, name, dies(getattr(os, name)))
    store.shutil.rmtree = dies(store.shutil.rmtree)
    with TrainingCheckpoints(folder, BASE, keep_last=1) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, *numbered(number))
            checkpoints.wait()


def test_killed_at_every_change_on_disk(tmp_path):
    steps = []
    for count in range(1, 60):
        folder = tmp_path / str(count)
        ((kind, _),) = Ranks(0, _die_at, folder, count).join()
        steps.append(assert_whole(folder))
        if kind == "value":
            break
        # the next run removes what is left and saves over it
        with TrainingCheckpoints(folder, BASE, keep_last=1) as checkpoints:
            checkpoints.save(3, *numbered(3))
        assert assert_whole(folder) == 3
        assert sorted(os.listdir(folder)) == ["base.json", "latest", "step-00000003"]
    assert steps == sorted(steps) and set(steps) == {0, 1, 2} and len(steps) > 12


def _save_for_ever(rank, world, folder):
    with TrainingCheckpoints(folder, BASE, keep_last=2) as checkpoints:
        for number in range(1, 10_000):
            checkpoints.save(number, *numbered(number))


def wait_for_commits(folder, count: int) -> None:
    """Until `latest` was replaced that often."""
    seen = {mark_of(folder)}
    end = time.monotonic() + 600
    while len(seen) <= count and time.monotonic() < end:
        seen.add(mark_of(folder))
        time.sleep(0.002)


def mark_of(folder) -> int:
    try:
        return (folder / "latest").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_killed_at_random_moments(tmp_path):
    generator = random.Random(1)
    found = []
    for _ in range(8):
        ranks = Ranks(2, _save_for_ever, tmp_path)
        wait_for_commits(tmp_path, generator.randrange(1, 4))
        time.sleep(generator.uniform(0, 0.1))
        ranks.kill(generator.randrange(2))
        time.sleep(generator.uniform(0, 0.05))
        ranks.kill(0), ranks.kill(1)
        ranks.join()
        found.append(assert_whole(tmp_path))
    assert min(found) >= 1, found


def test_killed_while_a_step_is_saved_again(tmp_path):
    for count in range(1, 60):
        with TrainingCheckpoints(tmp_path / str(count), BASE) as checkpoints:
            checkpoints.save(1, *numbered(1))  # what `latest` names is saved again
        ((kind, _),) = Ranks(0, _die_at, tmp_path / str(count), count).join()
        assert assert_whole(tmp_path / str(count)) in (1, 2)
        if kind == "value":
            break
    assert count > 12


def _full_disk(rank, world, folder):
    with TrainingCheckpoints(folder, BASE) as checkpoints:
        checkpoints.save(1, *numbered(1))
        checkpoints.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if rank == world - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoints.save(2, *numbered(2))
        checkpoints.wait()


@pytest.mark.parametrize("world", [1, 2])
def test_full_disk(tmp_path, world):
    for kind, error in Ranks(world, _full_disk, tmp_path).join():
        assert kind == "error" and isinstance(error, quantal.IoError), error
        assert f"rank {world - 1} cannot write" in str(error) and "disk full" in str(error), error
        assert str(error).endswith("last good checkpoint: step-00000001")
    assert assert_whole(tmp_path) == 1
    assert sorted(os.listdir(tmp_path)) == ["base.json", "latest", "step-00000001"]


def _one_dies(rank, world, folder, how):
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=10))
    checkpoints = TrainingCheckpoints(folder, BASE, group=group)
    checkpoints.save(1, *numbered(1))
    checkpoints.wait()
    if rank == 1 and how == "ends":
        os._exit(3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    checkpoints.save(2, *numbered(2))
    checkpoints.wait()


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_a_rank_is_gone(tmp_path, how):
    ranks = Ranks(3, _one_dies, tmp_path, how)
    for rank in (0, 2):
        ranks.processes[rank].join(300)
    ranks.kill(1)
    found = ranks.join(60)
    for rank in (0, 2):
        kind, error = found[rank]
        assert kind == "error" and isinstance(error, quantal.IoError), (kind, error)
        assert f"rank {rank} of 3 cannot finish step-00000002" in str(error)
        assert "another rank ended or does not answer" in str(error)
    assert found[1][0] == "died"
    assert assert_whole(tmp_path) == 1
