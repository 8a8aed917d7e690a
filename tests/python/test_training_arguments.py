"""Wrong arguments of the functions for training are named before anything happens."""

import pytest
import torch

import quantal
from conftest import tiny_llama
from quantal import BaseIdentity, TrainingCheckpoints

BASE = BaseIdentity({}, {})
IDS = torch.zeros(1, 4, dtype=torch.int64)


def checkpoints(folder) -> TrainingCheckpoints:
    return TrainingCheckpoints(folder, BASE)


CALLS = {
    "step": lambda f, v: checkpoints(f).save(v, *pair()),
    "model": lambda f, v: checkpoints(f).save(1, v, pair()[1]),
    "optimizer": lambda f, v: checkpoints(f).save(1, pair()[0], v),
    "position": lambda f, v: checkpoints(f).save(1, *pair(), position=v),
    "settings": lambda f, v: checkpoints(f).save(1, *pair(), settings=v),
    "folder": lambda f, v: TrainingCheckpoints(v, BASE),
    "base": lambda f, v: TrainingCheckpoints(f, v),
    "keep_last": lambda f, v: TrainingCheckpoints(f, BASE, keep_last=v),
    "asynchronous": lambda f, v: TrainingCheckpoints(f, BASE, asynchronous=v),
    "load model": lambda f, v: checkpoints(f).load(v, pair()[1]),
    "load optimizer": lambda f, v: checkpoints(f).load(pair()[0], v),
    "load path": lambda f, v: checkpoints(f).load(*pair(), path=v),
    "base_identity model": lambda f, v: quantal.base_identity(v),
    "base_identity path": lambda f, v: quantal.base_identity(tiny_llama(), v),
    "save_adapter model": lambda f, v: quantal.save_adapter(v, f / "a"),
    "save_adapter path": lambda f, v: quantal.save_adapter(tiny_llama(), v),
    "save_adapter base": lambda f, v: quantal.save_adapter(tiny_llama(), f / "a", v),
    "save_adapter adapter": lambda f, v: quantal.save_adapter(tiny_llama(), f / "a", adapter=v),
    "load_adapter model": lambda f, v: quantal.load_adapter(v, f),
    "load_adapter path": lambda f, v: quantal.load_adapter(tiny_llama(), v),
    "on_other_codec": lambda f, v: quantal.load_adapter(tiny_llama(), f, on_other_codec=v),
    "on_different_model": lambda f, v: quantal.load_adapter(tiny_llama(), f, on_different_model=v),
    "is_trainable": lambda f, v: quantal.load_adapter(tiny_llama(), f, is_trainable=v),
    "read_adapter_base": lambda f, v: quantal.read_adapter_base(v),
    "compare path": lambda f, v: quantal.compare_adapter_base(v, tiny_llama()),
    "compare model": lambda f, v: quantal.compare_adapter_base(f, v),
    "loss model": lambda f, v: quantal.chunked_loss(v, IDS, IDS),
    "loss input_ids": lambda f, v: quantal.chunked_loss(tiny_llama(), v, IDS),
    "loss labels": lambda f, v: quantal.chunked_loss(tiny_llama(), IDS, v),
    "loss chunk_tokens": lambda f, v: quantal.chunked_loss(tiny_llama(), IDS, IDS, chunk_tokens=v),
    "loss num_items": lambda f, v: quantal.chunked_loss(tiny_llama(), IDS, IDS, num_items=v),
    "token_losses model": lambda f, v: quantal.token_losses(v, IDS, IDS),
    "hidden": lambda f, v: quantal.chunked_cross_entropy(v, torch.nn.Linear(4, 4), IDS),
    "head": lambda f, v: quantal.chunked_cross_entropy(torch.zeros(1, 4, 4), v, IDS),
}
WRONG = [object(), -3.5, b"x", {1: 2}.items()]
#: What means "the default" or is a value.
LEGAL = {"loss num_items": (-3.5,)}


def pair():
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("name", list(CALLS))
def test_wrong_arguments(tmp_path, name):
    for wrong in WRONG:
        with pytest.raises((TypeError, ValueError, OSError), match="expected"):
            CALLS[name](tmp_path, wrong)
    assert list(tmp_path.iterdir()) == []
