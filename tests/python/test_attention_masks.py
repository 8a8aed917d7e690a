"""Masks that are one run of keys for each query: padding on either side, packed documents, windows,
caches. The kernels take the runs."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from conftest import tiny_llama
from quantal import _core
from quantal.functional import attention

LENGTH = 24


def causal(queries: int = LENGTH, keys: int = LENGTH) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def stacked(*rows: torch.Tensor) -> torch.Tensor:
    return torch.stack(rows)[:, None]


def documents(*lengths: int) -> torch.Tensor:
    return torch.block_diag(*(causal(n, n).int() for n in lengths)).bool()


KEY = torch.arange(LENGTH)
MASKS = {
    "plain": stacked(causal(), causal()),
    "left": stacked(causal(), causal() & (KEY > 4)),
    "right": stacked(causal() & (KEY < 20), causal() & (KEY < 23)),
    "documents": stacked(causal(), documents(3, 1, LENGTH - 4)),
    "window": stacked(causal(), causal() & ~causal().tril(-5)),
    "cache": stacked(causal(3), causal(3) & (KEY > 1)),
    "one": stacked(torch.ones(1, LENGTH).bool(), (KEY > 3)[None]),
    "all": stacked(torch.ones(4, LENGTH).bool(), torch.ones(4, LENGTH).bool()),
    "nothing": stacked(causal(), torch.zeros(LENGTH, LENGTH).bool()),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_runs_are_the_mask(name):
    mask = MASKS[name]
    begin, end = torch.ops.quantal.mask_runs(mask)
    run = (begin[..., None] <= KEY) & (end[..., None] > KEY)
    assert torch.equal(run[:, None], mask)


def test_other_masks_have_no_runs():
    scattered = MASKS["plain"].clone()
    scattered[1, 0, 9, 2] = False
    assert torch.ops.quantal.mask_runs(scattered).shape == (0,)
    with pytest.raises(RuntimeError, match=r"mask is float32 \[2, 1, 3, 4\], expected bool"):
        torch.ops.quantal.mask_runs(torch.zeros(2, 1, 3, 4))
    with pytest.raises(RuntimeError, match=r"mask is bool \[2, 3, 3, 4\], expected bool"):
        torch.ops.quantal.mask_runs(torch.zeros(2, 3, 3, 4).bool())


def inputs(mask, dtype, grad):
    batch, _, queries, keys = mask.shape
    generator = torch.Generator().manual_seed(4)
    shapes = (batch, 4, queries, 64), (batch, 2, keys, 64), (batch, 2, keys, 64)
    narrow = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    return [[t.detach().to(d).requires_grad_(grad) for t in narrow] for d in (dtype, torch.float32)]


def taken(q, k, v, grad):
    name = {torch.float32: "f32", torch.bfloat16: "bf16"}[q.dtype]
    return not _core.attention_refusal(q.shape, k.shape, v.shape, name, False, grad)


@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["values", "gradients"])
def test_attention_under_a_mask(name, dtype, grad, kernel_calls):
    mask = MASKS[name]
    (q, k, v), wide = inputs(mask, dtype, grad)
    y = attention(q, k, v, mask=mask)
    assert kernel_calls == [taken(q, k, v, grad)]
    expected = scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)
    seen = mask.any(-1).squeeze(1)  # torch's of queries that see nothing differ between versions
    if kernel_calls[0]:
        assert not y.transpose(1, 2)[~seen].any()
    expected, y = expected.transpose(1, 2)[seen], y.transpose(1, 2)[seen]
    bound = 1e-5 if dtype is torch.float32 else 1e-2
    assert (y.float() - expected).norm() <= bound * expected.norm()
    if not grad:
        return
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (y.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip((q, k, v), wide, strict=True):
        theirs = theirs.grad.nan_to_num()
        difference = ours.grad.nan_to_num().float() - theirs
        assert difference.norm() <= 2e-2 * theirs.norm().clamp_min(weight.norm())


def test_a_mask_keeps_its_runs_until_it_changes():
    mask = MASKS["documents"].clone()
    (q, k, v), _ = inputs(mask, torch.bfloat16, False)
    before = attention(q, k, v, mask=mask)
    assert torch.equal(attention(q, k, v, mask=mask), before)
    mask[1, 0, :, 0] = True  # no run any more
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert torch.equal(attention(q, k, v, mask=mask), expected)
    with torch.inference_mode():
        mask = MASKS["documents"].clone()  # has no version to go by
        assert torch.equal(attention(q, k, v, mask=mask), before)
        mask[1, 0, :, 0] = True
        assert torch.equal(attention(q, k, v, mask=mask), expected)


def test_padded_and_packed_training(tokens, kernel_calls):
    """In bfloat16, no further from float32 than sdpa, and by the kernels where they are not
    refused."""
    theirs = tiny_llama(hidden=256).to(torch.bfloat16)
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("quantal")
    shape = (2, 4, 12, 64), (2, 2, 12, 64), (2, 2, 12, 64)
    refused = bool(_core.attention_refusal(*shape, "bf16", False, True))
    padding = torch.ones_like(tokens)
    padding[1, 8:] = 0
    positions = torch.cat([torch.arange(5), torch.arange(tokens.shape[1] - 5)]).expand(2, -1)
    for more in ({"attention_mask": padding}, {"position_ids": positions}):
        results = []
        for model in (copy.deepcopy(theirs).float(), ours, theirs):
            model.zero_grad()
            labels = tokens.masked_fill(padding == 0, -100)
            model(input_ids=tokens, labels=labels, use_cache=False, **more).loss.backward()
            grads = [p.grad.float().flatten() for n, p in model.named_parameters() if "_proj" in n]
            results.append(torch.cat(grads))
        exact, by_ours, by_theirs = results
        assert (by_ours - exact).norm() <= 1.2 * (by_theirs - exact).norm()
        assert kernel_calls and all(call is not refused for call in kernel_calls)
        kernel_calls.clear()
