"""docs/api.md, the public document: each of its code blocks runs as it is printed.

A block runs in a namespace of names that the table below states and in an empty folder; nothing is
patched. Blocks that only declare are compared with the real signatures, orders and defaults.
"""

import argparse
import dataclasses
import enum
import inspect
import pathlib
import re
import types
import typing
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import quantization_wrapper as public
from backend_manager import Backend, BackendManager
from conftest import tiny_llama

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "api.md"


@dataclasses.dataclass
class Block:
    heading: str
    language: str
    code: str
    line: int


def blocks_of(page: pathlib.Path) -> list[Block]:
    found: list[Block] = []
    heading, inside = "", False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
            if inside:
                found.append(Block(heading, line[3:], "", number + 1))
        elif inside:
            found[-1].code += line + "\n"
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


BLOCKS = {block.heading: block for block in blocks_of(PAGE)}


def execute(heading: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Runs the block under `heading`; its own line numbers appear in a traceback."""
    block = BLOCKS[heading]
    code = compile("\n" * (block.line - 1) + block.code, str(PAGE), "exec")
    exec(code, namespace)
    return namespace


def names(*wanted: str, **values: Any) -> dict[str, Any]:
    return {name: getattr(public, name) for name in wanted} | {"torch": torch} | values


CONFIG = ("QuantizationConfig", "QuantizationMethod")
FACTORY = (*CONFIG, "create_quantization_adapter")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_block_of_the_page_is_tested_here():
    source = pathlib.Path(__file__).read_text(encoding="utf-8")
    python = [block for block in blocks_of(PAGE) if block.language == "python"]
    assert len(python) == len({block.heading for block in python}) == 15
    for block in python:
        assert f'"{block.heading}"' in source, block.heading


def test_no_two_blocks_share_a_heading():
    assert len(BLOCKS) == len(blocks_of(PAGE))


# Declarations


def test_method_enum_is_the_declared_one():
    declared = execute("QuantizationMethod Enum", {"enum": enum})["QuantizationMethod"]
    real = public.QuantizationMethod
    assert [(m.name, m.value) for m in real] == [(m.name, m.value) for m in declared]


def plain(annotation: Any) -> str:
    """One spelling of Optional[torch.dtype] and torch.dtype | None, of List[str] and list[str]."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if isinstance(annotation, types.GenericAlias):
        text = str(annotation)
    text = re.sub(r"typing\.Optional\[([\w.]+)\]", r"\1 | None", text).split(".")[-1]
    return re.sub(r"typing\.|quantal\.config\.", "", text).lower()


def test_config_begins_with_the_declared_fields():
    types = {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Optional")}
    namespace = names("QuantizationMethod", dataclass=dataclasses.dataclass, **types)
    namespace["field"] = dataclasses.field
    declared = dataclasses.fields(execute("QuantizationConfig", namespace)["QuantizationConfig"])
    real = dataclasses.fields(public.QuantizationConfig)
    assert [f.name for f in real[: len(declared)]] == [f.name for f in declared]
    for ours, theirs in zip(real, declared, strict=False):
        assert ours.default == theirs.default, ours.name
        if theirs.default_factory is not dataclasses.MISSING:
            assert ours.default_factory() == theirs.default_factory(), ours.name
    hints = typing.get_type_hints(public.QuantizationConfig)
    for field in declared:
        assert plain(hints[field.name]) == plain(field.type), field.name
    assert [f.name for f in real[len(declared) :]] == ["block_size", "quant_zero", "quant_scale"]


def test_adapter_has_the_declared_methods():
    code = re.sub(r"(def .*)$", r"\1: ...", BLOCKS["QuantizationAdapter"].code, flags=re.MULTILINE)
    from abc import ABC, abstractmethod

    namespace = names("QuantizedLinear", ABC=ABC, abstractmethod=abstractmethod, nn=nn)
    exec(code, namespace)
    declared, real = namespace["QuantizationAdapter"], public.QuantizationAdapter
    assert inspect.isabstract(real) and issubclass(real, ABC)
    for name in declared.__abstractmethods__:
        theirs = inspect.signature(getattr(declared, name)).parameters
        ours = inspect.signature(getattr(real, name)).parameters
        shared = list(ours.values())[: len(theirs)]
        assert [p.name for p in shared] == list(theirs), name
        assert [p.default for p in shared] == [p.default for p in theirs.values()], name
        hints = typing.get_type_hints(getattr(real, name))
        for parameter in list(theirs.values())[1:]:
            if parameter.annotation is not parameter.empty and parameter.kind < 4:
                assert hints[parameter.name] is parameter.annotation, (name, parameter.name)
        for extra in list(ours.values())[len(theirs) :]:
            assert extra.default is not extra.empty or extra.kind in (
                extra.VAR_KEYWORD,
                extra.VAR_POSITIONAL,
            ), f"{name}: {extra.name} would be a new duty of the caller"


# Usage


def test_basic_quantization(model, tokens):
    expected = model(tokens).logits.detach()
    out = execute("Basic Quantization", names("QuantizationMethod", model=model))
    assert isinstance(out["adapter"], public.BitsAndBytesAdapter)
    layer = out["quantized_model"].model.layers[0].self_attn.q_proj
    assert isinstance(layer, public.QuantizedLinear)
    logits = out["quantized_model"](tokens).logits.float()
    assert 0 < (logits - expected).norm() / expected.norm() < 0.5


def test_automatic_configuration():
    config = execute("Automatic Configuration", {"Backend": Backend})["config"]
    assert config.method is public.QuantizationMethod.MLX_INT4


@pytest.mark.parametrize(
    "heading, adapter, backend",
    [
        ("CUDA with bitsandbytes", "BitsAndBytesAdapter", Backend.CUDA),
        ("Apple Silicon with MLX", "MLXAdapter", Backend.MPS),
        ("CPU with HQQ", "HQQAdapter", Backend.CPU),
    ],
)
def test_backend_examples(heading, adapter, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = execute(heading, names(*FACTORY, Backend=Backend))
    assert type(out["adapter"]).__name__ == adapter and out["adapter"].backend is backend


def test_validation(capsys):
    good = public.QuantizationConfig("mlx_int4", bits=4, compute_dtype=torch.float16)
    assert execute("Validation", {"config": good, "Backend": Backend})["issues"] == []
    assert capsys.readouterr().out == ""
    bad = public.QuantizationConfig("bnb_nf4", compute_dtype=torch.float16)
    issues = execute("Validation", {"config": bad, "Backend": Backend})["issues"]
    assert "only supported on CUDA" in issues[0]
    assert "Configuration issues:" in capsys.readouterr().out


class Stack(nn.Module):
    """transformer.layers.0 to .23, as the document names them."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.Linear(64, 64) for _ in range(24))}
        )


def test_layers_have_their_own_bits():
    config = execute("Layer-Specific Quantization", names(*CONFIG))["config"]
    adapter = public.create_quantization_adapter(Backend.CPU, config)
    layers = adapter.quantize_model(Stack()).transformer["layers"]
    assert [layer.bits for layer in layers] == [8] + [4] * 22 + [2]


ARGUMENTS = {
    "quantize": "hqq",
    "q_bits": 8,
    "q_group_size": 64,
    "q_compute_dtype": "float32",
    "q_skip_modules": "lm_head,gate_proj",
    "q_double_quant": False,
}


@pytest.mark.parametrize(
    "changes, adapter",
    [
        ({}, "HQQAdapter"),
        ({"q_bits": None}, "HQQAdapter"),
        ({"quantize": "bnb_nf4", "q_bits": 4}, "FallbackAdapter"),
        ({"quantize": "mlx_int8", "q_bits": None}, "FallbackAdapter"),
        ({"quantize": "none", "q_bits": 16}, "FallbackAdapter"),
        ({"quantize": "something", "q_skip_modules": ""}, "FallbackAdapter"),
    ],
)
def test_integration_with_train_py(changes, adapter, model):
    namespace = names("validate_quantization_config")
    setup = execute("Integration with train.py", namespace)["setup_quantization"]
    args = argparse.Namespace(**ARGUMENTS | changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = setup(args, BackendManager("cpu", verbose=False))
    assert type(made).__name__ == adapter
    skips = ["lm_head"] if not args.q_skip_modules else ["lm_head", "gate_proj"]
    assert made.config.skip_modules == skips
    if adapter == "HQQAdapter":
        mlp = made.quantize_model(model).model.layers[0].mlp
        assert type(mlp.gate_proj) is nn.Linear and mlp.up_proj.bits == (args.q_bits or 4)


# Advanced


@pytest.mark.parametrize("method", ["none", "bnb_nf4"])
def test_custom_adapters(method, model, tokens):
    class MyQuantizedLinear(public.QuantizedLinear):
        """Weights as int8 with one scale per layer."""

        def __init__(self, in_features, out_features, bias, config):
            super().__init__(in_features, out_features, bias, config)
            self.register_buffer("q", torch.zeros(out_features, in_features, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(()))

        def quantize_weights(self, weights):
            self.scale.copy_(weights.abs().max() / 127)
            self.q.copy_((weights / self.scale).round())

        def dequantize_weights(self):
            return self.q * self.scale

        def forward(self, x):
            return nn.functional.linear(x, self.dequantize_weights(), self.bias)

    namespace = names("QuantizationAdapter", "replace_linear_with_quantized")
    namespace["MyQuantizedLinear"] = MyQuantizedLinear
    cls = execute("Custom Adapters", namespace)["MyCustomAdapter"]
    adapter = cls(Backend.CPU, public.QuantizationConfig(method))
    expected = model(tokens).logits.detach()
    quantized = adapter.quantize_model(model)
    assert isinstance(quantized.model.layers[0].mlp.up_proj, MyQuantizedLinear)
    assert type(quantized.lm_head) is nn.Linear, "skip_modules holds for custom adapters too"
    logits = quantized(tokens).logits.detach()
    assert 0 < (logits - expected).norm() / expected.norm() < 0.3
    adapter.prepare_model_for_training(quantized)
    adapter.save_quantized_model(quantized, "custom")
    again = adapter.load_quantized_model("custom", quantized.config)
    assert torch.equal(again(tokens).logits, logits)


@pytest.mark.parametrize("method", ["hqq", "quanto_int4", "quanto_int8"])
def test_qlora_training(method, model, tokens):
    namespace = names("create_quantization_adapter", model=model, backend=Backend.CPU)
    namespace["config"] = public.QuantizationConfig(method, compute_dtype=torch.float32)
    trained = execute("QLoRA Training", namespace)["model"]
    assert isinstance(trained, PeftModel)
    trained(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [p.grad for p in trained.parameters() if p.requires_grad]
    assert len(gradients) == 8 and any(g.abs().max() > 0 for g in gradients)


def test_model_loading_and_saving(model, tokens):
    config = public.QuantizationConfig("hqq", compute_dtype=torch.float32)
    earlier = public.create_quantization_adapter(Backend.CPU, config)
    saved = earlier.quantize_model(tiny_llama())
    earlier.save_quantized_model(saved, "path/to/saved/model")
    namespace = names("create_quantization_adapter", model=model, backend=Backend.CPU)
    namespace |= {"config": config, "model_config": model.config}
    out = execute("Model Loading and Saving", namespace)
    assert pathlib.Path("path/to/save").exists()
    logits = saved(tokens).logits
    assert torch.equal(out["loaded_model"](tokens).logits, logits)
    assert torch.equal(out["quantized_model"](tokens).logits, logits), "both began as one model"


def test_debug_information(capsys):
    config = public.QuantizationConfig("bnb_nf4")
    execute("Debug Information", {"config": config, "backend": Backend.CPU})
    printed = capsys.readouterr().out
    assert "bitsandbytes" in printed and "Config issue: " in printed
