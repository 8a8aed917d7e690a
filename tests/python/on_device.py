"""The whole flow on a device without kernels: run by test_devices.py in a process of its own, since
torch asks an accelerator that is there for many things.

The device is tests/torch/device/test_device.cpp: PrivateUse1 with memory that the host cannot read.
"""

import copy
import os
import pathlib
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import quantal
from conftest import CONFIGS, hqq, tiny_llama
from qlora_support import ALL, LLM_INT8, METHODS
from quantal import (
    DeviceError,
    DtypeError,
    QuantizedEmbedding,
    QuantizedLinear,
    ShapeError,
    UnsupportedError,
    create_quantization_adapter,
)
from quantal.error_handling import detect_oom_error

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = os.environ.get(
    "QUANTAL_TEST_DEVICE", str(ROOT / "build/release/tests/libquantal_test_device.so")
)
torch.ops.load_library(LIBRARY)
torch.utils.rename_privateuse1_backend("pretended")


class _Module:
    """What torch looks for as torch.pretended."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def device_count():
        return 2

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        """No generator of its own."""

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.float16, torch.bfloat16]


torch._register_device_module("pretended", _Module)
torch.utils.generate_methods_for_privateuse1_backend()
DEVICE = torch.device("pretended:0")
asked = torch.ops.quantal_test_device


def pair(config, rows=48, cols=192, bias=True, **kwargs):
    """The same layer here and there."""
    torch.manual_seed(1)
    near = QuantizedLinear.from_linear(nn.Linear(cols, rows, bias=bias), config, **kwargs)
    return near, copy.deepcopy(near).to(DEVICE)


def close(far, near, rtol=1e-5, atol=1e-6):
    assert far.device == DEVICE
    torch.testing.assert_close(far.cpu(), near, rtol=rtol, atol=atol)


EVERY = {**CONFIGS, **METHODS, "llm-int8": LLM_INT8}


@pytest.mark.parametrize("name", EVERY)
def test_layers_move_and_compute(name):
    near, far = pair(EVERY[name])
    assert far.codes.device == far.stats.device == far.shared.device == DEVICE
    dense = far.dequantize_weights()
    assert dense.device == DEVICE and torch.equal(dense.cpu(), near.dequantize_weights())
    x = torch.randn(2, 3, 192, requires_grad=True)
    there = x.detach().to(DEVICE).requires_grad_()
    y, y_there = near(x), far(there)
    close(y_there, y)
    g = torch.randn_like(y)
    y.backward(g)
    y_there.backward(g.to(DEVICE))
    close(there.grad, x.grad)
    close(far.bias.grad, near.bias.grad)
    assert not far.bytes_changed()
    back = far.to("cpu")
    assert torch.equal(back.codes, near.codes) and torch.equal(back.stats, near.stats)
    assert not back.bytes_changed()


@pytest.mark.parametrize("name", EVERY)
def test_quantizing_there_gives_the_bytes_of_here(name):
    torch.manual_seed(2)
    dense = nn.Linear(192, 48)
    near = QuantizedLinear.from_linear(copy.deepcopy(dense), EVERY[name])
    far = QuantizedLinear.from_linear(dense.to(DEVICE), EVERY[name])
    for part in ("codes", "stats", "shared"):
        assert getattr(far, part).device == DEVICE
        assert torch.equal(getattr(far, part).cpu(), getattr(near, part))
    weight = dense.weight.detach()
    assert far.relative_error(weight) == pytest.approx(near.relative_error(weight.cpu()), rel=1e-5)


def test_int8_activations():
    config = hqq(backend_options={"activations": "int8"})
    near, far = pair(config)
    assert far.activations == "int8"
    x = torch.randn(5, 192)
    close(far(x.to(DEVICE)), near(x))


def test_second_derivative_and_out():
    near, far = pair(hqq(), bias=False)
    x = torch.randn(3, 192, requires_grad=True)
    there = x.detach().to(DEVICE).requires_grad_()
    for layer, v in ((near, x), (far, there)):
        (grad,) = torch.autograd.grad(layer(v).pow(2).sum(), v, create_graph=True)
        grad.sum().backward()
    close(there.grad, x.grad, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for far_out in (torch.empty(0, device=DEVICE), torch.empty(3, 48, device=DEVICE)):
            quantal.functional.linear(there, far, out=far_out)
            close(far_out, near(x))
        out = torch.empty(48, 192, dtype=torch.bfloat16, device=DEVICE)
        far.dequantize_weights(out=out)
        assert torch.equal(out.cpu(), near.dequantize_weights(torch.bfloat16))


def test_embeddings_gather_there():
    layer = METHODS["mlx4"]
    near = QuantizedLinear.from_linear(nn.Linear(192, 48, bias=False), layer)
    table = QuantizedEmbedding.from_packed(near._spec, near.codes, near.stats, near.shared)
    ids = torch.tensor([[3, 0], [47, 3]])
    here = table(ids)
    table.to(DEVICE)
    assert torch.equal(table(ids.to(DEVICE)).cpu(), here)
    x = torch.randn(2, 192)
    close(table.logits(x.to(DEVICE)), x @ near.dequantize_weights().T, rtol=1e-4, atol=1e-4)


def test_state_dicts_and_pickles():
    near, far = pair(CONFIGS["nf4-double"])
    state = far.state_dict()
    assert state["codes"].device == DEVICE
    other, _ = pair(CONFIGS["nf4-double"])
    with torch.no_grad():
        other.codes.zero_()
    other.load_state_dict({k: v.cpu() for k, v in state.items()})
    assert torch.equal(other.codes, near.codes)
    again = pickle.loads(pickle.dumps(far.cpu()))
    assert torch.equal(again.codes, near.codes)


@pytest.mark.parametrize("method", ["nf4", "hqq4", "mlx4"])
def test_a_model_is_quantized_there(method, tokens):
    near = create_quantization_adapter("cpu", METHODS[method]).quantize_model(tiny_llama())
    adapter = create_quantization_adapter("cpu", METHODS[method])
    far = adapter.quantize_model(tiny_llama().to(DEVICE))
    layer = far.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantizedLinear) and layer.codes.device == DEVICE
    assert torch.equal(layer.codes.cpu(), near.model.layers[0].mlp.up_proj.codes)
    close(far(tokens.to(DEVICE)).logits, near(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_qlora_step_and_merge(dora, tokens, tmp_path):
    results = []
    for device in ("cpu", DEVICE):
        adapter = create_quantization_adapter("cpu", hqq())
        model = adapter.quantize_model(tiny_llama().to(device))
        model = adapter.prepare_model_for_training(model)
        torch.manual_seed(4)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL), use_dora=dora)
        model = get_peft_model(model, lora)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    start = torch.linspace(-0.02, 0.03, p.numel()).view(p.shape)
                    p.copy_(start.to(device))
        loss = model(input_ids=tokens.to(device), labels=tokens.to(device)).loss
        loss.backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        merged = model.merge_and_unload()
        results.append((loss.detach().cpu(), grads, merged))
    (loss, grads, near), (far_loss, far_grads, far) = results
    torch.testing.assert_close(far_loss, loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == far_grads.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(far_grads[name], grad, rtol=1e-3, atol=1e-5)
    down, far_down = (m.model.layers[1].mlp.down_proj for m in (near, far))
    assert far_down.codes.device == DEVICE
    assert (far_down.codes.cpu() == down.codes).float().mean() > 0.99
    adapter.save_quantized_model(far, str(tmp_path / "saved"))
    again = adapter.load_quantized_model(str(tmp_path / "saved"), far.config)
    assert torch.equal(again.model.layers[1].mlp.down_proj.codes, far_down.codes.cpu())


def test_autocast_and_checkpointing():
    near, far = pair(hqq())
    x = torch.randn(3, 192)
    with torch.autocast("pretended", dtype=torch.bfloat16):
        y = far(x.to(DEVICE))
    assert y.dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = near(x)
    close(y, expected, rtol=2e-2, atol=2e-2)
    there = x.to(DEVICE).requires_grad_()
    torch.utils.checkpoint.checkpoint(far, there, use_reentrant=False).sum().backward()
    here = x.clone().requires_grad_()
    near(here).sum().backward()
    close(there.grad, here.grad)


def test_compiled_graphs():
    near, far = pair(hqq())
    compiled = torch.compile(far, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 192)
    there = x.to(DEVICE).requires_grad_()
    y = compiled(there)
    close(y, near(x))
    y.sum().backward()
    close(there.grad, near.dequantize_weights().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_copied_to_or_from_the_host(name):
    _, far = pair(EVERY[name])
    x = torch.randn(5, 192).to(DEVICE).requires_grad_()
    g = torch.randn(5, 48).to(DEVICE)
    asked.transfers()
    y = far(x)
    y.backward(g)
    far.dequantize_weights(torch.float16)
    assert asked.transfers() == 0
    y.detach().cpu()
    assert asked.transfers() == 1


def test_memory_is_bounded_and_returned():
    _, far = pair(CONFIGS["nf4-double"], 1024, 2048)
    x = torch.randn(2, 2048).to(DEVICE)
    with torch.no_grad():
        far(x)
        asked.peak_bytes()
        far(x)
    dense = 1024 * 2048 * 4
    assert dense <= asked.peak_bytes() <= 6 * dense  # one panel of one block: nothing larger


def test_errors_are_typed_and_name_the_place():
    near, far = pair(hqq())
    x = torch.randn(2, 192)
    with pytest.raises(DeviceError, match="x is on cpu"):
        far(x)
    with pytest.raises(DeviceError, match="expected cpu as the codes"):
        near(x.to(DEVICE))
    with pytest.raises(DeviceError, match=":1"):
        far(x.to("pretended:1"))
    with pytest.raises(ShapeError, match="expected last dimension 192"):
        far(torch.randn(2, 191).to(DEVICE))
    with pytest.raises(DtypeError, match="dtype is int32"):
        quantal._ops.dequantize(*far._buffers_packed, far._spec, torch.int32)
    with pytest.raises(ShapeError, match="out has shape"):
        far.dequantize_weights(out=torch.empty(192, 48, device=DEVICE))
    with pytest.raises(DeviceError, match="out is on cpu"):
        far.dequantize_weights(out=torch.empty(48, 192))
    weight = torch.randn(48, 192)
    weight[3, 5] = float("nan")
    with pytest.raises(UnsupportedError, match="row 3, column 5"):
        far.quantize_weights(weight.to(DEVICE))


def test_out_of_memory_is_said_by_torch_and_leaks_nothing():
    _, far = pair(CONFIGS["nf4-double"], 1024, 2048)
    x = torch.randn(2, 2048).to(DEVICE)
    held = asked.limit(1 << 20)
    with pytest.raises(DeviceError) as failed:
        far(x)
    assert asked.limit(1 << 40) == held
    assert detect_oom_error(failed.value), str(failed.value)
    assert far(x).device == DEVICE


def test_every_operator_is_one_of_cuda_and_metal():
    """By torch's own table; the CPU-only torch of the tests has neither."""
    native = pytest.importorskip("torchgen.gen").parse_native_yaml
    import torchgen

    folder = pathlib.Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = native(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    functions = {f"aten::{f.func.name}": f for f in parsed.native_functions}
    tables = {str(k): v.index for k, v in parsed.backend_indices.items()}

    def has(function, key):
        if function.structured_delegate is not None:
            function = functions[f"aten::{function.structured_delegate}"]
        if function.func.name in tables[key]:
            return True
        return any(function.func.name in tables[k] for k in tables if k.startswith("Composite"))

    asked.operators()
    for config in EVERY.values():
        _, far = pair(config)
        x = torch.randn(5, 192).to(DEVICE).requires_grad_()
        g = torch.randn(5, 48).to(DEVICE)
        asked.operators()
        far(x).backward(g)
        far.dequantize_weights(torch.float16)
        used = set(asked.operators())
        missing = {n: k for n in used for k in ("CUDA", "MPS") if not has(functions[n], k)}
        assert used and not missing
