"""bench/cuda: its own packer and reference agree with quantal to the bit, so that the check on a
machine with a GPU compares with the truth."""

import pathlib
import sys

import pytest
import torch

import quantal  # noqa: F401  loads the ops

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench" / "cuda"))

import forms  # noqa: E402


@pytest.mark.parametrize("form", [*forms.FORMS, forms.INT8], ids=lambda form: form.name)
@pytest.mark.parametrize("shape", [(24, 256), (7, 1280)])
def test_the_packer_of_the_bench_and_quantal_agree(form, shape):
    w = forms.make(form, *shape, seed=3)
    values = torch.ops.quantal.dequantize(w.codes, w.stats, w.shared, w.spec, torch.float32)
    assert torch.equal(values.view(torch.int32), w.values.view(torch.int32))
