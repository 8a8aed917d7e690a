"""Checkpoints of training: going on with any number of ranks, what is on disk, errors that name the
file. test_training_checkpoint_ends.py ends processes."""

import json
import os
import random

import pytest
import torch

import quantal
import quantal.fsdp
from checkpoint_support import (
    BASE,
    flip,
    make,
    manager,
    numbered,
    saved,
    scheduler_of,
    step,
)
from qlora_support import METHODS, packed_bytes, same_bytes
from quantal import TrainingCheckpoints, base_identity
from ranks import Ranks, run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

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
