"""Packed bytes among tools that take parameters for numbers: optimizers, averages, casts, DDP,
FSDP2, distributed checkpoints. They leave the bytes alone, or the damage is found and named."""

import copy
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import strangers_worker
from conftest import hqq
from qlora_support import METHODS, packed_bytes, quantized, same_bytes
from quantal import CorruptError, UnsupportedError, create_quantization_adapter


@pytest.fixture(params=list(METHODS))
def method(request):
    return METHODS[request.param]


@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers_with_weight_decay_skip_packed_bytes(method, foreach, tokens):
    model = quantized(method)
    model.lm_head.weight.requires_grad_(True)
    before = packed_bytes(model)
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, foreach=foreach)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert same_bytes(packed_bytes(model), before)


def test_initialisation_of_transformers_leaves_packed_layers_alone():
    model = quantized(hqq())
    before = packed_bytes(model)
    layer = model.model.layers[0].self_attn.q_proj
    for write in (
        lambda: model._init_weights(layer),
        lambda: model.apply(model._init_weights),
        lambda: layer.weight.data.normal_(),
        lambda: torch.nn.utils.vector_to_parameters(torch.zeros(64 * 64), [layer.weight]),
    ):
        with pytest.raises(UnsupportedError, match="quantize_weights"):
            write()
    layer.reset_parameters()
    assert same_bytes(packed_bytes(model), before)


def average(model, **kwargs):
    averaged = AveragedModel(model, **kwargs)
    for _ in range(3):
        averaged.update_parameters(model)
    return averaged.module


def test_an_average_that_corrupts_bytes_is_not_saved(method, tmp_path):
    model = quantized(method)
    adapter = create_quantization_adapter("cpu", method)
    averaged = average(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    assert not same_bytes(packed_bytes(averaged), packed_bytes(model))
    with pytest.raises(CorruptError, match=r"q_proj.*changed in place.*quantize_weights"):
        adapter.save_quantized_model(averaged, tmp_path / "averaged")
    assert not (tmp_path / "averaged").exists()
    adapter.save_quantized_model(model, tmp_path / "model")
    # An average of the trained parameters alone is fine.
    half = copy.deepcopy(model)
    half.load_state_dict(model.state_dict())
    adapter.save_quantized_model(half, tmp_path / "half")


def test_new_bytes_through_the_front_door_are_saved(tmp_path):
    model, other = quantized(hqq()), quantized(hqq())
    for layer in (m for m in other.modules() if hasattr(m, "quantize_weights")):
        layer.quantize_weights(torch.randn(layer.out_features, layer.in_features))
    adapter = create_quantization_adapter("cpu", hqq())
    for assign in (False, True):
        fresh = copy.deepcopy(model)
        fresh.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        adapter.save_quantized_model(fresh, tmp_path / f"{assign}")
    moved = copy.deepcopy(model).half().to("cpu", torch.float32)
    adapter.save_quantized_model(moved, tmp_path / "moved")


# ---------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> pathlib.Path:
    """Runs strangers_worker.py on two ranks under QUANTAL_CPU=scalar."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        + [f"--master-port={port}", strangers_worker.__file__, str(folder)],
        env={**os.environ, "QUANTAL_CPU": "scalar", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_ddp_and_fsdp2_keep_bytes_free_memory_and_agree(ranks):
    assert (ranks / "done").read_text() == "scalar"


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("form", list(strangers_worker.FORMS))
@pytest.mark.filterwarnings("ignore:.*torch.distributed.*")
def test_a_distributed_checkpoint_reads_under_another_instruction_set(ranks, form):
    """Two ranks wrote it with scalar kernels; one process reads it with its own."""
    expected = strangers_worker.build(form)
    model = strangers_worker.build(form, seed=9)
    assert not same_bytes(packed_bytes(model), packed_bytes(expected))
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=ranks / form, no_dist=True)
    set_model_state_dict(model, state)
    assert same_bytes(packed_bytes(model), packed_bytes(expected))
    x = strangers_worker.inputs()
    assert torch.equal(model(x), expected(x))
