"""Checkpoints of training: any world size, atomic whatever happens, errors that name the file."""

import json
import os
import random
import resource
import signal
import time

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard

import quantal
import quantal.fsdp
from qlora_support import METHODS, lora, packed_bytes, quantized, same_bytes
from quantal import TrainingCheckpoints, base_identity, chunked_loss
from quantal import _checkpoint_store as store
from ranks import Ranks, run_ranks

GLOBAL_BATCH = 12


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# ---------------------------------------------------------------------- resuming


def test_next_steps_are_equal_to_the_bit(tmp_path):
    model, optimizer = make()
    scheduler = scheduler_of(optimizer)
    with manager(tmp_path, model) as checkpoints:
        for number in range(4):
            if number == 2:
                before = packed_bytes(model)
                checkpoints.save(
                    2, model, optimizer, scheduler=scheduler,
                    position={"rows": 24}, settings={"seed": 1},
                )  # fmt: skip
                torch.manual_seed(5)  # changes the generator after the save
            expected = step(model, optimizer, number, scheduler)
    again, optimizer_again = make()
    scheduler_again = scheduler_of(optimizer_again)
    restored = manager(tmp_path, again).load(again, optimizer_again, scheduler=scheduler_again)
    assert (restored.step, restored.position, restored.settings) == (2, {"rows": 24}, {"seed": 1})
    assert restored.world_size == 1 and restored.path.endswith("step-00000002")
    assert same_bytes(packed_bytes(again), before)
    for number in (2, 3):
        loss = step(again, optimizer_again, number, scheduler_again)
    assert loss == expected
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert scheduler_again.get_last_lr() == scheduler.get_last_lr()


def test_generators_go_on(tmp_path):
    checkpoints, model, optimizer = saved(tmp_path)
    import numpy as np

    random.gauss(0, 1)  # leaves a second value behind
    checkpoints.save(3, model, optimizer)
    expected = torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    checkpoints.close()
    manager(tmp_path, model).load(model, optimizer)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()
    assert (random.random(), random.gauss(0, 1)) == expected[2:]


def _train_and_save(rank, world, folder, method):
    model, optimizer = make(world, method)
    with manager(folder, model) as checkpoints:
        for number in range(3):
            if number == 2:
                checkpoints.save(2, model, optimizer)
            loss = step(model, optimizer, number)
    return loss


def _load_and_step(rank, world, folder, method):
    model, optimizer = make(world, method)
    with manager(folder, model) as checkpoints:
        assert checkpoints.load(model, optimizer).step == 2
    return step(model, optimizer, 2), base_identity(model).digest


@pytest.mark.parametrize("method", ["hqq4", "nf4"])
def test_another_number_of_ranks(tmp_path, method):
    expected = run_ranks(2, _train_and_save, tmp_path, method)[0]
    digest = base_identity(make(method=method)[0]).digest
    for world in (0, 1, 3):
        for loss, base in run_ranks(world, _load_and_step, tmp_path, method):
            assert loss == expected and base == digest, world


def test_another_storage_dtype(tmp_path):
    """The packed bytes may be seen under another dtype: they are the same base."""
    _, model, optimizer = saved(tmp_path, method="nf4")
    expected = step(model, optimizer, 2)
    for dtype in (torch.bfloat16, torch.float32):
        again, optimizer_again = make(method="nf4")
        quantal.fsdp.convert_storage_(again, dtype)
        manager(tmp_path, again).load(again, optimizer_again)
        assert step(again, optimizer_again, 2) == expected


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adadelta, lambda p, lr: torch.optim.SGD(p, lr, 0.9)]
)
def test_other_optimizers(tmp_path, optimizer):
    model, one = make(optimizer=optimizer)
    with manager(tmp_path, model) as checkpoints:
        step(model, one, 0)
        checkpoints.save(1, model, one)
        expected = step(model, one, 1)
    again, two = make(optimizer=optimizer)
    manager(tmp_path, again).load(again, two)
    assert step(again, two, 1) == expected


def test_before_the_first_step(tmp_path):
    _, model, optimizer = saved(tmp_path, steps=0)
    again, optimizer_again = make()
    manager(tmp_path, again).load(again, optimizer_again)
    assert step(again, optimizer_again, 0) == step(model, optimizer, 0)


# ---------------------------------------------------------------------- on disk


def test_the_base_is_not_written(tmp_path):
    checkpoints, model, optimizer = saved(tmp_path)
    written = (tmp_path / "base.json").stat()
    checkpoints.save(3, model, optimizer)
    checkpoints.close()
    assert (tmp_path / "base.json").stat().st_mtime_ns == written.st_mtime_ns
    manifest = json.loads((tmp_path / "step-00000003" / "checkpoint.json").read_text())
    assert manifest["base"]["digest"] == base_identity(model).digest
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = [torch.Size(shape).numel() for shape, _ in manifest["tensors"].values()]
    assert sum(n for n in sizes if n > 1) == 3 * trained  # weights and two moments
    assert all(".lora_" in name for name in manifest["tensors"])


def test_background_save_holds_its_own_copy(tmp_path):
    model, optimizer = make()
    step(model, optimizer, 0)
    checkpoints = manager(tmp_path, model)
    expected = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    checkpoints.save(1, model, optimizer)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    for state in optimizer.state.values():
        state["exp_avg"].fill_(7)
    checkpoints.close()
    again, optimizer_again = make()
    manager(tmp_path, again).load(again, optimizer_again)
    for name, p in again.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, expected[name])
    assert not any((s["exp_avg"] == 7).any() for s in optimizer_again.state.values())


@pytest.mark.parametrize("keep, left", [(1, [5]), (3, [3, 4, 5]), (0, [1, 2, 3, 4, 5])])
def test_keeps_the_last(tmp_path, keep, left):
    model, optimizer = make()
    with manager(tmp_path, model, keep_last=keep) as checkpoints:
        for number in range(1, 6):
            checkpoints.save(number, model, optimizer)
    names = sorted(n for n in os.listdir(tmp_path) if n not in ("latest", "base.json"))
    assert names == [f"step-{n:08d}" for n in left]
    assert checkpoints.latest().endswith("step-00000005")


def test_a_step_is_saved_again(tmp_path):
    """A run that goes on from an older checkpoint passes the same steps."""
    checkpoints, model, optimizer = saved(tmp_path)
    step(model, optimizer, 7)
    checkpoints.save(2, model, optimizer)
    checkpoints.close()
    assert sorted(os.listdir(tmp_path)) == ["base.json", "latest", "step-00000002.1"]
    again, optimizer_again = make()
    manager(tmp_path, again).load(again, optimizer_again)
    assert step(again, optimizer_again, 8) == step(model, optimizer, 8)


# ---------------------------------------------------------------------- ends of processes


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
    checkpoints = TrainingCheckpoints(
        folder, BASE, group=dist.new_group(backend="gloo", timeout=store_timeout())
    )
    checkpoints.save(1, *numbered(1))
    checkpoints.wait()
    if rank == 1 and how == "ends":
        os._exit(3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    checkpoints.save(2, *numbered(2))
    checkpoints.wait()


def store_timeout():
    import datetime

    return datetime.timedelta(seconds=10)


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


# ---------------------------------------------------------------------- bad input


def _load(folder, **kwargs):
    model, optimizer = make(**kwargs)
    return manager(folder, model).load(model, optimizer)


def test_damaged_files_are_named(tmp_path):
    saved(tmp_path)
    state = tmp_path / "step-00000002" / "state" / "__0_0.distcp"
    flip(state)
    with pytest.raises(quantal.CorruptError, match="SHA-256 of .*__0_0.distcp is .*, expected"):
        _load(tmp_path)
    size = state.stat().st_size
    os.truncate(state, size - 7)
    with pytest.raises(quantal.CorruptError, match=f"has {size - 7} bytes, expected {size}"):
        _load(tmp_path)
    state.unlink()
    with pytest.raises(quantal.CorruptError, match="__0_0.distcp is missing, expected"):
        _load(tmp_path)


def _load_on_ranks(rank, world, folder):
    model, optimizer = make(world)
    manager(folder, model).load(model, optimizer)


def test_every_rank_says_the_same(tmp_path):
    run_ranks(2, _train_and_save, tmp_path, "hqq4")
    flip(tmp_path / "step-00000002" / "state" / "__1_0.distcp")
    texts = {str(error) for _, error in Ranks(3, _load_on_ranks, tmp_path).join()}
    assert len(texts) == 1 and "__1_0.distcp" in texts.pop()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"method": "nf4"}, "same model, other codec .*q_proj.weight: bnb 4-bit"),
        ({"r": 8}, r"float32 \[4, 64\], expected float32 \[8, 64\]"),
        ({"targets": ("q_proj",)}, "it has an extra .*v_proj.lora_A"),
        ({"use_dora": True}, "it lacks .*lora_magnitude_vector"),
        ({"optimizer": torch.optim.SGD}, "optimizer is SGD, expected AdamW"),
    ],
)
def test_another_run(tmp_path, kwargs, message):
    saved(tmp_path)
    with pytest.raises(quantal.ConfigError, match=message):
        _load(tmp_path, **kwargs)


def test_mixed_dialects(tmp_path):
    saved(tmp_path)
    model, optimizer = make()
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    dense = torch.nn.Linear(64, 128, bias=False)
    dense.weight.data = layer.dequantize_weights()
    model.get_base_model().model.layers[1].mlp.up_proj = quantal.QuantizedLinear.from_linear(
        dense, METHODS["mlx4"]
    )
    with pytest.raises(
        quantal.ConfigError,
        match=r"digest of the base is [0-9a-f]{64}, expected .*same model, other codec "
        r"\(1 tensors, first model.layers.1.mlp.up_proj.weight: mlx 4-bit",
    ):
        manager(tmp_path, model).load(model, optimizer)
    with pytest.raises(quantal.ConfigError, match="belongs to another base"):
        checkpoints = manager(tmp_path, model)
        checkpoints.save(3, model, optimizer)
        checkpoints.wait()
    _load(tmp_path)  # untouched


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("checkpoint.json", "{", "is no JSON"),
        ("checkpoint.json", "[]", "format is 'list', expected"),
        ("checkpoint.json", '{"format": "quantal training checkpoint 1"}', "step is NoneType"),
        ("../latest", "step-00000099\n", "names 'step-00000099', expected one of step-00000002"),
        ("../latest", "../../etc", "names '../../etc'"),
    ],
)
def test_damaged_descriptions(tmp_path, name, text, message):
    saved(tmp_path)
    (tmp_path / "step-00000002" / name).resolve().write_text(text)
    with pytest.raises(quantal.CorruptError, match=message):
        _load(tmp_path)


def test_nothing_there(tmp_path):
    model, optimizer = make()
    checkpoints = manager(tmp_path / "none", model)
    assert checkpoints.latest() is None
    with pytest.raises(quantal.IoError, match="has no checkpoint"):
        checkpoints.load(model, optimizer)
    with pytest.raises(quantal.ConfigError, match="keep_last is -1"):
        manager(tmp_path, model, keep_last=-1)
    saved(tmp_path)
    (tmp_path / "latest").unlink()  # as after an end between the two renames of the first save
    assert _load(tmp_path).step == 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, o, c: c.save("1", m, o), "step is '1' .*expected an integer"),
        (lambda m, o, c: c.save(-1, m, o), "step is -1, expected at least 0"),
        (lambda m, o, c: c.save(1, {}, o), "model is {} .*expected an nn.Module"),
        (lambda m, o, c: c.save(1, m, [1]), "optimizer is .*expected a torch.optim.Optimizer"),
        (lambda m, o, c: c.load(m, o, path="/nowhere/at/all"), "'/nowhere/at/all'"),
        (lambda m, o, c: TrainingCheckpoints("x", "digest"), "base is .*expected a BaseIdentity"),
        (lambda m, o, c: base_identity("model"), "model is 'model' .*expected an nn.Module"),
        (lambda m, o, c: quantal.save_adapter(m, 3), "path is 3"),
        (lambda m, o, c: quantal.load_adapter(m, "/nowhere"), "'/nowhere', where nothing is"),
    ],
)
def test_wrong_arguments(tmp_path, call, message):
    model, optimizer = numbered(1)
    with pytest.raises((TypeError, ValueError, OSError), match=message):
        call(model, optimizer, TrainingCheckpoints(tmp_path, BASE))
