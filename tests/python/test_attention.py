"""quantal.functional.attention and attn_implementation="quantal" against torch's attention in
float32 on the same values. What the kernels of this CPU refuse is torch's on both sides."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import quantal
from conftest import tiny_llama
from quantal import _core
from quantal.functional import attention

#: (batch, heads, kv_heads, queries, keys, dim)
SIZES = [
    (1, 9, 3, 1, 40, 64),
    (2, 4, 4, 1, 7, 16),
    (2, 4, 2, 5, 5, 32),
    (1, 6, 2, 3, 11, 64),
    (2, 4, 2, 40, 40, 64),
    (1, 2, 1, 20, 50, 80),
    (1, 3, 3, 4, 9, 7),
    (2, 2, 1, 1, 1, 64),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Relative error of a result and of gradients, in the norm.
BOUNDS = {torch.float32: (1e-5, 2e-5), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1e-2, 2e-2)}


def inputs(sizes, dtype=torch.float32, seed=0, grad=False):
    batch, heads, kv_heads, queries, keys, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, queries, dim),
        (batch, kv_heads, keys, dim),
        (batch, kv_heads, keys, dim),
    )
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.requires_grad_() if grad else t for t in made]


def reference(q, k, v, causal=False, scale=None, mask=None):
    """In double, through torch's plain operators."""
    queries, keys = q.shape[2], k.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen = seen.tril(keys - queries)
    if mask is not None and mask.dtype is torch.bool:
        seen = seen & mask
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    if mask is not None and mask.dtype is not torch.bool:
        added = added + mask
    shared_by = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(shared_by, 1) for t in (k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = q.double() @ k.transpose(2, 3) * scale + added
    return scores.softmax(-1) @ v


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def refused(q, k, v, causal, with_gradient):
    name = quantal._dtypes.dtype_name(q.dtype)
    return _core.attention_refusal(q.shape, k.shape, v.shape, name, causal, with_gradient)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_values_and_gradients(sizes, dtype, causal):
    value_bound, grad_bound = BOUNDS[dtype]
    q, k, v = inputs(sizes, dtype)
    y = attention(q, k, v, causal=causal)
    assert y.shape == q.shape and y.dtype is dtype and not y.requires_grad
    assert relative(y, reference(q, k, v, causal)) < value_bound
    results = []
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for function in (attention, reference):
        leaves = inputs(sizes, dtype, grad=True)
        out = function(*leaves, causal=causal)
        out.backward(grad.to(out.dtype))
        results.append([out.detach(), *(t.grad for t in leaves)])
    assert relative(results[0][0], results[1][0]) < value_bound
    for ours, expected in zip(results[0][1:], results[1][1:], strict=True):
        assert ours.dtype is dtype
        # A query that sees one key has no gradient of its score: only rounding is left.
        bound = grad_bound * max(expected.double().norm().item(), grad.double().norm().item())
        assert (ours.double() - expected.double()).norm().item() < bound


def test_causal_ends_at_the_last_key():
    """torch's is_causal begins at the first one."""
    q, k, v = inputs((1, 2, 2, 3, 8, 16))
    y = attention(q, k, v, causal=True)
    for i in range(3):
        seen = 8 - 3 + i + 1
        one = scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen])
        torch.testing.assert_close(y[:, :, i : i + 1], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    for sizes in ((2, 4, 2, 6, 6, 32), (2, 4, 2, 1, 6, 32)):
        q, k, v = inputs(sizes, dtype)
        expected = attention(q, k, v, causal=True)
        positions_first = q.transpose(1, 2).contiguous().transpose(1, 2)
        store = torch.full((2, 2, 10, 32), 99.0, dtype=dtype)
        store[:, :, :6] = k
        wide = torch.full((2, 2, 6, 64), 99.0, dtype=dtype)
        wide[..., ::2] = v
        strided = positions_first, store[:, :, :6], wide[..., ::2]
        assert torch.equal(attention(*strided, causal=True), expected)
        shared = k[:1].expand(2, -1, -1, -1)
        same = attention(q, shared, shared, causal=True)
        assert torch.equal(same, attention(q, shared.clone(), shared.clone(), causal=True))


def test_results_and_gradients_lie_as_models_read_them():
    """The product behind attention reads [batch, positions, heads, dim], and so does the one that
    takes the gradients: no copies where the kernels run."""
    sizes = 2, 4, 2, 8, 8, 64
    leaves = [
        t.transpose(1, 2).contiguous().requires_grad_() for t in inputs(sizes, torch.bfloat16)
    ]
    q, k, v = (t.transpose(1, 2) for t in leaves)
    grads: list[torch.Tensor] = []
    for t in (q, k, v):
        t.register_hook(grads.append)
    if refused(q, k, v, True, True):
        pytest.skip("these kernels take no gradients")
    y = attention(q, k, v, causal=True)
    assert y.transpose(1, 2).is_contiguous()
    y.sum().backward()  # a gradient without memory of its own
    assert len(grads) == 3 and all(grad.transpose(1, 2).is_contiguous() for grad in grads)


def test_masks_and_scales():
    q, k, v = inputs((2, 4, 2, 5, 8, 16))
    flags = torch.rand(2, 1, 5, 8, generator=torch.Generator().manual_seed(3)) > 0.3
    flags[..., 0] = True
    masks = flags, torch.randn(5, 8), torch.arange(8) > 2, torch.rand(2, 4, 5, 8) > 0.2
    for mask, causal in itertools.product(masks, (False, True)):
        y = attention(q, k, v, causal=causal, mask=mask)
        assert relative(y, reference(q, k, v, causal, mask=mask)) < 1e-5
    assert relative(attention(q, k, v, scale=0.7), reference(q, k, v, scale=0.7)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    q, k, v = inputs((1, 4, 2, 6, 6, 16), grad=True)
    mixed = q, k.to(dtype), v.to(dtype)  # as rotary positions leave them
    with torch.autocast("cpu", dtype=dtype):
        y = attention(*mixed, causal=True)
        direct = scaled_dot_product_attention(*mixed, is_causal=True, enable_gqa=True)
    assert y.dtype is dtype is direct.dtype
    assert relative(y, reference(*mixed, causal=True)) < 2e-2
    y.float().sum().backward()
    assert q.grad.dtype is torch.float32 and q.grad.shape == q.shape


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_gives_the_same_gradients(reentrant, dtype):
    sizes = 2, 4, 2, 9, 9, 64
    results = []
    for again in (False, True):
        leaves = inputs(sizes, dtype, grad=True)

        def block(q, k, v):
            return attention(q * 2, k, v, causal=True)

        y = checkpoint(block, *leaves, use_reentrant=reentrant) if again else block(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for once, twice in zip(*results, strict=True):
        assert torch.equal(once, twice)


def test_a_second_derivative_is_refused_where_the_kernels_ran():
    q, k, v = inputs((1, 2, 2, 8, 8, 64), torch.bfloat16, grad=True)
    grads = torch.autograd.grad(attention(q, k, v, causal=True).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):  # of torch's attention for CPUs too
        grads[0].square().sum().backward()


def test_what_does_not_belong_together_is_named():
    q, k, v = inputs((2, 4, 2, 5, 8, 16))
    cases = [
        (quantal.ShapeError, r"q has shape \[4, 5, 16\], expected \[batch, heads", (q[0], k, v)),
        (quantal.ShapeError, r"k has shape \[1, 2, 8, 16\], expected \[2, kv", (q, k[:1], v)),
        (quantal.ShapeError, r"v has shape \[2, 2, 7, 16\], expected", (q, k, v[:, :, :7])),
        (quantal.ShapeError, "heads is 3, expected a multiple of kv_heads 2", (q[:, :3], k, v)),
        (quantal.DtypeError, "v is torch.float16, expected torch.float32", (q, k, v.half())),
        (quantal.DeviceError, "k is on meta, expected cpu as q", (q, k.to("meta"), v)),
    ]
    for kind, message, arguments in cases:
        for mask in (None, torch.zeros(5, 8)):
            with pytest.raises(kind, match=message):
                attention(*arguments, mask=mask)
    with pytest.raises(quantal.ShapeError, match=r"mask has shape \[5, 7\].*to \[2, 4, 5, 8\]"):
        attention(q, k, v, mask=torch.zeros(5, 7))
    with pytest.raises(quantal.DtypeError, match="mask is torch.int64, expected torch.bool or a"):
        attention(q, k, v, mask=torch.zeros(5, 8, dtype=torch.int64))
    with pytest.raises(quantal.ShapeError, match="keys is 4, expected >= 5"):
        attention(q, k[:, :, :4], v[:, :, :4], causal=True)
    with pytest.raises(TypeError, match="causal is 'yes'.*expected True or False"):
        attention(q, k, v, causal="yes")


def test_other_types_and_devices_are_torchs():
    q, k, v = inputs((1, 4, 2, 3, 6, 16), torch.float64)
    assert relative(attention(q, k, v, causal=True), reference(q, k, v, True)) < 1e-12
    far = [t.to("meta") for t in (q, k, v)]
    assert attention(*far, causal=True).shape == q.shape


class Seen(torch.Tensor):
    """A subclass, as tensors of tensor parallelism are."""


def test_subclasses_are_torchs():
    q, k, v = (t.as_subclass(Seen) for t in inputs((1, 4, 2, 1, 6, 64)))
    assert type(attention(q, k, v)) is Seen


# ---------------------------------------------------------------------- the operators


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[4]], ids=str)
def test_operators_pass_opcheck(sizes):
    with_gradient = not refused(*inputs(sizes, torch.bfloat16), True, True)
    if not with_gradient and refused(*inputs(sizes, torch.bfloat16), True, False):
        pytest.skip("these kernels do not run on this CPU")
    q, k, v = inputs(sizes, torch.bfloat16, grad=with_gradient)
    arguments = (q, k, v, None, True, 0.125, with_gradient)
    torch.library.opcheck(torch.ops.quantal.attention.default, arguments)
    if with_gradient:
        out, lse = (t.detach() for t in torch.ops.quantal.attention(*arguments))
        assert lse.shape == q.shape[:3] and lse.dtype is torch.float32
        q, k, v = (t.detach() for t in (q, k, v))
        saved = (torch.randn_like(out), q, k, v, None, out, lse, True, 0.125)
        torch.library.opcheck(torch.ops.quantal.attention_backward.default, saved)


def test_the_operator_refuses_what_the_rule_refuses():
    q, k, v = inputs((1, 2, 2, 4, 4, 16), torch.float64)
    with pytest.raises(RuntimeError, match="q is float64, expected float32, float16 or bfloat16"):
        torch.ops.quantal.attention(q, k, v, None, True, 1.0, False)
    q, k, v = inputs((1, 2, 2, 4, 3, 16))
    with pytest.raises(RuntimeError, match="keys is 3, expected >= 4"):
        torch.ops.quantal.attention(q, k, v, None, True, 1.0, False)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[4], SIZES[5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_equal_to_eager(sizes, dtype, dynamic):
    torch._dynamo.reset()

    def block(q, k, v):
        return attention(q, k, v, causal=True) * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for call in (block, compiled):
        leaves = inputs(sizes, dtype, grad=True)
        y = call(*leaves)
        y.float().square().sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for eager, other in zip(*results, strict=True):
        bound = 1e-5 if dtype is torch.float32 else 2e-2
        assert (eager.double() - other.double()).norm() <= bound * (eager.double().norm() + 1)
    with torch.no_grad():
        plain = inputs(sizes, dtype)
        assert relative(compiled(*plain), block(*plain)) < BOUNDS[dtype][0]
    torch._dynamo.reset()


# ---------------------------------------------------------------------- transformers


@pytest.fixture
def llama():
    """(quantal's attention, torch's), one model."""
    ours = tiny_llama()
    theirs = copy.deepcopy(ours)
    ours.set_attn_implementation("quantal")
    assert theirs.config._attn_implementation == "sdpa"
    return ours, theirs


def test_a_model_computes_the_same(llama, tokens):
    ours, theirs = llama
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    grads = []
    for model in llama:
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5)


def test_training_without_padding_needs_no_mask(llama, tokens, monkeypatch):
    """transformers makes a mask in every step without a cache; one that is causal and no more goes
    away, one of packed documents stays."""
    ours, theirs = llama
    masks = []
    forward = type(ours.model.layers[0]).forward

    def look(self, *args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(ours.model.layers[0]), "forward", look)
    ours(input_ids=tokens, use_cache=False)
    assert masks and all(mask is None for mask in masks)
    masks.clear()
    length = tokens.shape[1]
    positions = torch.cat([torch.arange(3), torch.arange(length - 3)]).expand(tokens.shape[0], -1)
    packed = [m(input_ids=tokens, position_ids=positions, use_cache=False).logits for m in llama]
    torch.testing.assert_close(*packed, rtol=1e-4, atol=1e-5)
    assert all(mask is not None for mask in masks)


def test_generating_with_padding_on_the_left_is_that_of_sdpa(llama):
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    texts = [
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        for model in llama
    ]
    assert torch.equal(*texts)


def test_the_kernels_run_where_they_are_not_refused(llama, tokens, kernel_calls):
    ours, _ = llama
    config = ours.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads
    shape = (1, heads, 1, dim), (1, kv_heads, 8, dim), (1, kv_heads, 8, dim)
    taken = not _core.attention_refusal(*shape, "f32", False, False)
    settings = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = tokens[:1]
    ours.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    steps = kernel_calls[config.num_hidden_layers :]  # behind the prompt
    assert len(steps) == 3 * config.num_hidden_layers and all(s is taken for s in steps)


def test_dropout_and_cross_attention_are_torchs(kernel_calls):
    from transformers import AttentionInterface

    forward = AttentionInterface()["quantal"]
    q, k, v = inputs((1, 4, 4, 3, 6, 16))
    module = torch.nn.Module()
    y, weights = forward(module, q, k, v, None, is_causal=True)  # begins at the first key
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert weights is None and torch.equal(y, expected.transpose(1, 2)) and not kernel_calls
    torch.manual_seed(0)
    y, _ = forward(module, q, k, v, None, dropout=0.5, is_causal=False)
    torch.manual_seed(0)
    expected = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert torch.equal(y, expected.transpose(1, 2)) and not kernel_calls
    other = torch.randn(1, 4, 6, 8)  # values of another width
    y, _ = forward(module, q, k, other, None, is_causal=False)
    torch.testing.assert_close(y, scaled_dot_product_attention(q, k, other).transpose(1, 2))


# ---------------------------------------------------------------------- who has it


def test_loading_chooses(tmp_path, llama):
    ours, theirs = llama
    theirs.save_pretrained(tmp_path / "model")
    config = theirs.config
    heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads[0]
    refusal = _core.attention_gain_refusal(*heads, dim, "f32", False)
    loaded = quantal.load_model(tmp_path / "model")
    assert loaded.config._attn_implementation == ("sdpa" if refusal else "quantal")
    for name in ("eager", "sdpa", "quantal"):
        model = quantal.load_model(tmp_path / "model", attn_implementation=name)
        assert model.config._attn_implementation == name
    given = copy.deepcopy(theirs)
    given.set_attn_implementation("eager")
    assert (
        quantal.load_model(tmp_path / "model", model=given).config._attn_implementation == "eager"
    )
    with pytest.raises(quantal.ConfigError, match="attn_implementation"):
        quantal.load_model(tmp_path / "model", attn_implementation="no such thing")
    with pytest.raises(quantal.ConfigError, match="expected auto for a model that is not"):
        quantal._model_attention.set_attention("test", torch.nn.Linear(2, 2), "sdpa")
    quantal.save_model(ours, tmp_path / "again")
    assert "attn" not in (tmp_path / "again" / "config.json").read_text()


def test_models_that_are_left_alone(llama, monkeypatch):
    _, model = llama
    set_attention = quantal._model_attention.set_attention
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    choice = set_attention("test", model)
    assert choice == ("sdpa", "LlamaForCausalLM has no attention that can be chosen")
    with pytest.raises(quantal.ConfigError, match="expected sdpa: transformers cannot change"):
        set_attention("test", model, "quantal")
    monkeypatch.undo()
    model.config.num_attention_heads = [4, 4]
    assert set_attention("test", model) == ("sdpa", "LlamaConfig names no heads")
    model.set_attn_implementation("eager")
    assert set_attention("test", model).name == "eager"
    assert set_attention("test", torch.nn.Linear(2, 2)) is None


def test_registered_whichever_is_imported_first():
    program = """
import sys
import {first}
assert {first!r} == "transformers" or "transformers" not in sys.modules
import {second}
from transformers import AttentionInterface, AttentionMaskInterface
assert "quantal" in AttentionInterface().valid_keys()
assert "quantal" in AttentionMaskInterface().valid_keys()
"""
    for first, second in itertools.permutations(("quantal", "transformers")):
        text = program.format(first=first, second=second)
        subprocess.run([sys.executable, "-c", text], check=True)
    quantal.register_attention()  # again: nothing changes
