"""validate_quantization_config: each rule has a failing and a passing case."""

import copy
import pickle

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from quantal import ConfigError, _core
from quantization_wrapper import (
    Backend,
    QuantizationConfig,
    QuantizationMethod,
    create_quantization_adapter,
    validate_quantization_config,
)

F16, BF16 = torch.float16, torch.bfloat16


def ids(config, backend, model=None):
    return [issue.id for issue in validate_quantization_config(config, backend, model)]


def layers(**settings):
    return {"layer_configs": {"layers.0": settings}}


#: id, backend, settings that break the rule, settings that do not
RULES = [
    ("backend.bnb", "cpu", {"method": "bnb_nf4"}, {"method": "hqq"}),
    ("backend.mlx", "cuda", {"method": "mlx_int4"}, {"method": "bnb_nf4"}),
    ("backend.quanto", "mlx", {"method": "quanto_int4"}, {"method": "mlx_int4"}),
    ("method.bits", "cuda", {"method": "bnb_nf4", "bits": 8}, {"method": "bnb_int8", "bits": 8}),
    ("method.width", "cpu", {"method": "hqq", "bits": 16}, {"method": "hqq", "bits": 3}),
    ("mps.bits", "mps", {"method": "hqq", "bits": 4}, {"method": "quanto_int4"}),
    (
        "mps.bfloat16",
        "mps",
        {"method": "mlx_int4", "compute_dtype": BF16},
        {"method": "mlx_int4", "compute_dtype": F16},
    ),
    (
        "compute_dtype.kind",
        "cpu",
        {"method": "hqq", "compute_dtype": "int8"},
        {"method": "hqq", "compute_dtype": "float32"},
    ),
    (
        "storage_dtype.kind",
        "cuda",
        {"method": "bnb_nf4", "storage_dtype": "int64"},
        {"method": "bnb_nf4", "storage_dtype": "uint8"},
    ),
    (
        "storage_dtype.fsdp",
        "cuda",
        {"method": "bnb_nf4", "storage_dtype": "float32", "compute_dtype": BF16},
        {"method": "bnb_nf4", "storage_dtype": BF16, "compute_dtype": BF16},
    ),
    (
        "group_size.illegal",
        "mps",
        {"method": "mlx_int4", "group_size": 48},
        {"method": "mlx_int4", "group_size": 32},
    ),
    (
        "quant_type.unknown",
        "cuda",
        {"method": "bnb_nf4", "quant_type": "nf5"},
        {"method": "bnb_nf4", "quant_type": "fp4"},
    ),
    (
        "settings.illegal",
        "mps",
        {"method": "mlx_int4", "backend_options": {"mode": "mx"}},
        {"method": "mlx_int4", "backend_options": {"mode": "affine"}},
    ),
    (
        "double_quant.no_effect",
        "cpu",
        {"method": "hqq", "double_quant": True},
        {"method": "hqq", "double_quant": False},
    ),
    ("quant_type.no_effect", "cpu", {"method": "hqq", "quant_type": "fp4"}, {"method": "hqq"}),
    ("block_size.no_effect", "cpu", {"method": "hqq", "block_size": 64}, {"method": "hqq"}),
    (
        "hqq.quant_meta",
        "cuda",
        {"method": "bnb_nf4", "quant_zero": True},
        {"method": "hqq", "quant_zero": True},
    ),
    (
        "options.value",
        "cpu",
        {"method": "hqq", "backend_options": {"axis": 2}},
        {"method": "hqq", "backend_options": {"axis": 0}},
    ),
    (
        "options.unknown",
        "cpu",
        {"method": "hqq", "backend_options": {"suport": "extended"}},
        {"method": "hqq", "backend_options": {"support": "extended"}},
    ),
    (
        "layer.pattern",
        "cpu",
        {"method": "hqq", "skip_modules": ["re:("]},
        {"method": "hqq", "skip_modules": ["re:(a)"]},
    ),
    (
        "layer.width",
        "cuda",
        {"method": "bnb_nf4", **layers(bits=2)},
        {"method": "bnb_nf4", **layers(bits=8)},
    ),
    (
        "layer.settings",
        "cpu",
        {"method": "hqq", **layers(group_size=12)},
        {"method": "hqq", **layers(group_size=32)},
    ),
    (
        "layer.no_effect",
        "cpu",
        {"method": "hqq", **layers(double_quant=True)},
        {"method": "hqq", **layers(bits=8)},
    ),
]


@pytest.mark.parametrize("rule, backend, bad, good", RULES, ids=[r[0] for r in RULES])
def test_each_rule_fails_and_passes(rule, backend, bad, good):
    found = validate_quantization_config(QuantizationConfig(**bad), backend)
    issue = next(i for i in found if i.id == rule)
    assert isinstance(issue, str) and len(issue) > 10 and issue.remedy
    assert issue.severity in ("error", "warning")
    assert rule not in ids(QuantizationConfig(**good), backend)


@pytest.mark.parametrize(
    "method, backend, text",
    [
        ("bnb_int8", "mps", "bitsandbytes quantization is only supported on CUDA, not mps"),
        ("mlx_int8", "cpu", "MLX quantization is only supported on Apple Silicon, not cpu"),
        ("hqq", "mps", "MPS backend has limited 4-bit quantization support"),
    ],
)
def test_documented_texts(method, backend, text):
    assert text in validate_quantization_config(QuantizationConfig(method), Backend(backend))
    bf16 = QuantizationConfig("mlx_int4", compute_dtype=BF16)
    assert "MPS backend doesn't support bfloat16" in validate_quantization_config(bf16, "mps")


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize("method", QuantizationMethod)
def test_the_matrix_and_nothing_else_speaks_about_defaults(method, backend):
    found = ids(QuantizationConfig(method), backend)
    supported = _core.documented_support(backend.value, method.value)
    expected = [] if supported else [f"backend.{method.value.split('_')[0]}"]
    if (method, backend) == (QuantizationMethod.HQQ, Backend.MPS):
        expected.append("mps.bits")
    if (method, backend) == (QuantizationMethod.BNB_NF4, Backend.MPS):
        expected.append("mps.bits")
    assert found == expected
    extended = QuantizationConfig(method, backend_options={"support": "extended"})
    assert ids(extended, backend) == []


def test_issue_is_a_string_that_survives():
    issue = validate_quantization_config(QuantizationConfig(), "cpu")[0]
    for again in (copy.deepcopy(issue), pickle.loads(pickle.dumps(issue))):
        assert again == issue and again.id == "backend.bnb" and again.remedy == issue.remedy
    assert "extended" in issue.remedy and "nearest" in issue.remedy


# With a model


def test_group_sizes_are_tried_on_the_model():
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(96, 64))
    config = QuantizationConfig("mlx_int4")
    assert ids(config, "mps") == []
    issue = validate_quantization_config(config, "mps", model)[0]
    assert issue.id == "group_size.shape" and "1 of 2" in issue and "'1' [64, 96]" in issue
    assert "group_size 32" in issue.remedy
    assert ids(QuantizationConfig("mlx_int4", group_size=32), "mps", model) == []
    dense = create_quantization_adapter("mps", config)
    dense.quantize_model(model)
    assert type(model[1]) is nn.Linear, "the finding was right"


def test_shapes_may_stand_for_a_model():
    config = QuantizationConfig("mlx_int4", skip_modules=["head"])
    for shapes in ([(64, 96)], [torch.Size([64, 96])], ((64, 96),), {"a": (64, 96)}):
        assert "group_size.shape" in ids(config, "mps", shapes)
    assert ids(config, "mps", [(64, 128), (4096, 4096)]) == []
    assert ids(config, "mps", {"a": (64, 128)}) == ["pattern.unmatched"]
    assert ids(config, "mps", {"head": (64, 96), "a": (64, 64)}) == []


def test_patterns_are_tried_on_the_model():
    model = tiny_llama()
    assert ids(QuantizationConfig("hqq"), "cpu", model) == []
    config = QuantizationConfig(
        "hqq", skip_modules=["lm_hed"], layer_configs={"model.layers.7": {"bits": 8}}
    )
    found = validate_quantization_config(config, "cpu", model)
    assert [i.id for i in found] == ["pattern.unmatched"] * 2
    assert "lm_hed" in found[0] and "model.layers.7" in found[1]


def test_models_with_nothing_to_quantize():
    assert ids(QuantizationConfig("hqq"), "cpu", nn.ReLU()) == ["model.no_linear"]
    everything = QuantizationConfig("hqq", skip_modules=["*"])
    assert ids(everything, "cpu", tiny_llama()) == ["model.nothing"]
    assert ids(QuantizationConfig("none"), "cpu", tiny_llama()) == []


def test_models_without_memory_are_enough():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 20))
    assert ids(QuantizationConfig("hqq"), "cpu", model) == []


@pytest.mark.parametrize(
    "model, kind",
    [
        (5, TypeError),
        ("model", TypeError),
        ([5], TypeError),
        (["ab"], TypeError),
        ([(1, "2")], TypeError),
        ([(1, 2, 3)], ConfigError),
        ([(10**30, 2)], ConfigError),
        ({5: (1, 2)}, TypeError),
    ],
    ids=str,
)
def test_what_is_no_model(model, kind):
    with pytest.raises(kind, match="expected"):
        validate_quantization_config(QuantizationConfig("hqq"), "cpu", model)


@pytest.mark.parametrize("shape", [(0, 0), (-1, 64), (2**62, 2**62), (1, 2**62)])
@pytest.mark.parametrize("method", ["hqq", "mlx_int4", "bnb_nf4", "quanto_int4"])
def test_absurd_shapes_are_findings(method, shape):
    config = QuantizationConfig(method, backend_options={"support": "extended"})
    assert "group_size.shape" in ids(config, "cpu", [shape])


@pytest.mark.parametrize("config", [None, {}, "hqq", QuantizationConfig])
def test_config_must_be_one(config):
    with pytest.raises(TypeError, match="a QuantizationConfig"):
        validate_quantization_config(config, "cpu")
    for backend, kind in ((None, TypeError), ("tpu", ValueError)):
        with pytest.raises(kind):
            validate_quantization_config(QuantizationConfig(), backend)


def test_a_device_without_bfloat16(monkeypatch):
    config = QuantizationConfig("bnb_nf4", compute_dtype=BF16)
    assert ids(config, "cuda") == []
    monkeypatch.setattr("quantal.config.cuda_has_bf16", lambda: False)
    assert ids(config, "cuda") == ["cuda.bfloat16"]
