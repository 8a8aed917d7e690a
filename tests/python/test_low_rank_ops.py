"""quantal::add_low_rank_ and quantal::low_rank_backward_: formula, schema, layouts, errors."""

import pytest
import torch

import quantal  # noqa: F401  (its operators)

ops = torch.ops.quantal
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
#: Relative error in norm: a rounding of what is stored, and float32 sums.
BOUNDS = {F32: 1e-6, F16: 1e-3, BF16: 8e-3}


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def arguments(rows=5, columns=16, out=12, rank=3, dtype=F32):
    torch.manual_seed(16)
    x, y = torch.randn(rows, columns).to(dtype), torch.randn(rows, out).to(dtype)
    return x, y, torch.randn(rank, columns), torch.randn(out, rank)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_operators(dtype):
    x, y, a, b = arguments(dtype=dtype)
    before, low = y.double(), 0.5 * (x.double() @ a.double().T)
    t = ops.add_low_rank_(y, x, a, b, 0.5)
    assert t.dtype is F32 and error(t, low) < 1e-6
    assert error(y, before + low @ b.double().T) < BOUNDS[dtype]
    grad, x_grad = torch.randn(5, 12).to(dtype), torch.randn(5, 16).to(dtype)
    d = 0.5 * (grad.double() @ b.double())
    expected = x_grad.double() + d @ a.double()
    a_grad, b_grad = ops.low_rank_backward_(x_grad, grad, x, t, a, b, 0.5)
    assert error(x_grad, expected) < BOUNDS[dtype]
    assert error(a_grad, d.T @ x.double()) < 1e-6 and error(b_grad, grad.double().T @ low) < 1e-6
    alone = ops.low_rank_backward_(None, grad, x, t, a, b, 0.5)
    assert torch.equal(alone[0], a_grad) and torch.equal(alone[1], b_grad)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("rows", [5, 70])
def test_matrices_of_16_bits_are_widened_and_their_gradients_rounded_once(rows, dtype):
    x, y, a, b = arguments(rows, dtype=BF16)
    t, grad = torch.randn(rows, 3), torch.randn(rows, 12).to(BF16)
    narrow, wide = (a.to(dtype), b.to(dtype)), (a.to(dtype).float(), b.to(dtype).float())
    both = []
    for a, b in (narrow, wide):
        out, x_grad = y.clone(), x.clone()
        low = ops.add_low_rank_(out, x, a, b, 0.5)
        both.append([out, low, x_grad, *ops.low_rank_backward_(x_grad, grad, x, t, a, b, 0.5)])
    found, expected = both
    assert found[1].dtype is F32
    for mine, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(found[3:], expected[3:], strict=True):
        assert other.dtype is F32 and torch.equal(mine, other.to(dtype))
    of_a, of_b = ops.low_rank_backward_(None, grad, x, t, narrow[0], wide[1], 0.5)
    assert of_a.dtype is dtype and of_b.dtype is F32


def test_operators_keep_their_schema_and_have_meta_kernels():
    x, y, a, b = arguments()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.add_low_rank_.default, (y, x, a, b, 0.5), test_utils=tests)
    t, grad = torch.randn(5, 3), torch.randn(5, 12)
    for x_grad in (torch.randn(5, 16), None):
        backward = ops.low_rank_backward_.default
        torch.library.opcheck(backward, (x_grad, grad, x, t, a, b, 0.5), test_utils=tests)
        narrow = (x_grad, grad, x, t, a.to(BF16), b.to(F16), 0.5)
        torch.library.opcheck(backward, narrow, test_utils=tests)
    x = torch.randn(2, 3, 16)
    y = torch.randn(2, 3, 12)
    for dtype in (F32, BF16):
        operands = y, x, a.to(dtype), b.to(dtype), 0.5
        torch.library.opcheck(ops.add_low_rank_.default, operands, test_utils=tests)


def test_operators_read_what_has_gaps():
    x, y, a, b = arguments(rows=6)
    t, grad, x_grad = torch.randn(6, 3), torch.randn(6, 12), torch.zeros(6, 16)
    expected = ops.add_low_rank_(y, x, a, b, 2.0)
    back = ops.low_rank_backward_(x_grad, grad, x, t, a, b, 2.0)

    def gaps(m):
        return m.T.contiguous().T

    again, again_grad = arguments(rows=6)[1], torch.zeros(6, 16)
    assert torch.equal(ops.add_low_rank_(again, gaps(x), gaps(a), gaps(b), 2.0), expected)
    assert torch.equal(again, y)
    seen = ops.low_rank_backward_(again_grad, gaps(grad), gaps(x), gaps(t), gaps(a), gaps(b), 2.0)
    assert torch.equal(again_grad, x_grad) and all(map(torch.equal, seen, back))


REFUSED = {
    "x is float64": ({"x": lambda x: x.double()}, "x is float64, expected float32"),
    "y of another dtype": ({"y": lambda y: y.to(BF16)}, "y is bfloat16, expected float32"),
    "y has gaps": ({"y": lambda y: y.T.contiguous().T}, "y has gaps, expected a contiguous"),
    "y has other rows": ({"y": lambda y: y[:4]}, r"y has shape \[4, 12\], expected \[5, 12\]"),
    "y is a scalar": ({"y": lambda y: y[0, 0]}, "y is a scalar, expected"),
    "y is x": ({"y": lambda y: y.new_zeros(5, 16)}, "b has shape"),
    "a is float64": ({"a": lambda a: a.double()}, "a is float64, expected float32, float16 or"),
    "a is narrow": ({"a": lambda a: a[:, :8]}, r"a has shape \[3, 8\], expected \[3, 16\]"),
    "a is a vector": ({"a": lambda a: a[0]}, r"a has shape \[16\], expected \[0, 16\]"),
    "b of another rank": ({"b": lambda b: b[:, :2]}, r"b has shape \[12, 2\], expected \[12, 3\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_operators_refuse(what):
    changes, message = REFUSED[what]
    x, y, a, b = arguments()
    given = {"y": y, "x": x, "a": a, "b": b}
    given |= {name: change(given[name]) for name, change in changes.items()}
    before = given["y"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.add_low_rank_(*given.values(), 1.0)
    assert torch.equal(given["y"], before)


def test_operators_refuse_shared_memory_and_wrong_gradients():
    x, y, a, b = arguments(columns=12)
    with pytest.raises(RuntimeError, match="y shares memory with an operand"):
        ops.add_low_rank_(x, x, a, b, 1.0)
    t, grad = torch.randn(5, 3), torch.randn(5, 12)
    with pytest.raises(RuntimeError, match="x_grad shares memory with an operand"):
        ops.low_rank_backward_(grad, grad, x, t, a, b, 1.0)
    for wrong, message in (
        ((None, grad, x, t[:, :2], a, b), r"t has shape \[5, 2\], expected \[5, 3\]"),
        ((None, grad[:4], x, t, a, b), r"grad has shape \[4, 12\], expected \[5, 12\]"),
        ((x[:4].clone(), grad, x, t, a, b), r"x_grad has shape \[4, 12\]"),
        ((x.T.contiguous().T, grad, x, t, a, b), "x_grad has gaps"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.low_rank_backward_(*wrong, 1.0)
