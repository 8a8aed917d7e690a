"""QuantizationConfig and QuantizationMethod: fields, unset values, text forms, refusals."""

import copy
import dataclasses
import inspect
import json
import pickle

import numpy as np
import pytest
import torch

import quantal
from quantal import ConfigError, DtypeError, _core, get_recommended_config
from quantization_wrapper import QuantizationConfig, QuantizationMethod

FIELDS = {
    "method": QuantizationMethod.BNB_NF4,
    "bits": 4,
    "group_size": 64,
    "compute_dtype": None,
    "storage_dtype": None,
    "double_quant": True,
    "quant_type": "nf4",
    "skip_modules": ["lm_head"],
    "layer_configs": {},
    "backend_options": {},
    "block_size": None,
    "quant_zero": None,
    "quant_scale": False,
}


def test_fields_their_order_and_defaults():
    assert [f.name for f in dataclasses.fields(QuantizationConfig)] == list(FIELDS)
    config = QuantizationConfig()
    assert {name: getattr(config, name) for name in FIELDS} == FIELDS
    assert config.double_quant is True and isinstance(config.bits, int)
    parameters = inspect.signature(QuantizationConfig).parameters
    assert list(parameters) == list(FIELDS)


def test_names_and_defaults_are_those_of_the_library():
    """The dataclass and the enumeration are declarations; what they say is decided in C++."""
    assert [m.name for m in QuantizationMethod] == _core.method_names()
    ours = QuantizationConfig(bits=None, double_quant=None).to_dict()
    theirs = json.loads(_core.normalize_config("{}"))
    for name in ("bits", "double_quant"):
        assert ours.pop(name) is None and theirs.pop(f"{name}_set") is False
        assert theirs.pop(name) == getattr(QuantizationConfig(), name)
    assert ours == theirs


def test_positional_use_follows_the_document():
    config = QuantizationConfig(
        QuantizationMethod.HQQ, 8, 128, torch.float16, torch.uint8, False, "fp4", [], {}, {}
    )
    assert (config.bits, config.group_size, config.storage_dtype) == (8, 128, torch.uint8)
    assert (config.double_quant, config.quant_type, config.skip_modules) == (False, "fp4", [])


@pytest.mark.parametrize("method", QuantizationMethod)
def test_methods_by_value_name_and_case(method):
    for spelling in (method, method.value, method.name, method.value.title()):
        assert QuantizationMethod(spelling) is method
        assert QuantizationConfig(spelling).method is method
    assert str(method) == method.value


@pytest.mark.parametrize("method", QuantizationMethod)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_four_widths_construct_with_any_method(method, bits):
    assert QuantizationConfig(method, bits=bits).bits == bits


@pytest.mark.parametrize("bits", [1, 3, 5, 6])
def test_other_widths_only_where_the_method_has_them(bits):
    assert QuantizationConfig("hqq", bits=bits).bits == bits
    for method in ("bnb_nf4", "bnb_int8", "mlx_int4", "quanto_int4", "none"):
        with pytest.raises(ValueError) as error:
            QuantizationConfig(method, bits=bits)
        assert str(error.value) == f"Unsupported bit width: {bits}. Supported: 2, 4, 8, 16"


@pytest.mark.parametrize("bits", [0, -4, 7, 32, 5_000_000_000])
def test_unsupported_widths_have_the_documented_message(bits):
    for method in ("bnb_nf4", "hqq"):
        with pytest.raises(ValueError) as error:
            QuantizationConfig(method, bits=bits)
        assert str(error.value) == f"Unsupported bit width: {bits}. Supported: 2, 4, 8, 16"


def test_bits_none_means_unset():
    for config in (QuantizationConfig(), QuantizationConfig(bits=None)):
        assert config.bits == 4 and not config.bits_set
        assert config.to_dict()["bits"] is None
    assert QuantizationConfig(bits=4).bits_set
    assert not dataclasses.replace(QuantizationConfig(), group_size=32).bits_set
    int8 = quantal.create_quantization_adapter("cuda", QuantizationConfig("bnb_int8"))
    assert int8.config.bits == 8 and int8.report.substitutions == []


def test_double_quant_remembers_whether_it_was_given():
    assert not QuantizationConfig().double_quant_set
    assert not QuantizationConfig(double_quant=None).double_quant_set
    assert QuantizationConfig(double_quant=None).double_quant is True
    assert QuantizationConfig(double_quant=True).double_quant_set
    assert QuantizationConfig("hqq", 4, 64, None, None, True).double_quant_set
    assert QuantizationConfig(double_quant=False).double_quant_set
    assert not dataclasses.replace(QuantizationConfig(), bits=8).double_quant_set
    given = QuantizationConfig(double_quant=True)
    for again in (
        QuantizationConfig.from_dict(given.to_dict()),
        copy.deepcopy(given),
        pickle.loads(pickle.dumps(given)),
    ):
        assert again.double_quant_set
    assert not QuantizationConfig.from_json(QuantizationConfig().to_json()).double_quant_set


def test_dtypes_as_text_and_unset():
    config = QuantizationConfig(compute_dtype="bfloat16", storage_dtype="torch.uint8")
    assert config.compute_dtype is torch.bfloat16 and config.storage_dtype is torch.uint8
    assert QuantizationConfig().compute_dtype is None
    adapter = quantal.create_quantization_adapter("mps", QuantizationConfig("mlx_int4"))
    assert adapter.config.compute_dtype is torch.float16
    assert adapter.config.storage_dtype is torch.uint8


def test_numbers_of_numpy_are_numbers():
    config = QuantizationConfig("hqq", bits=np.int64(8), group_size=np.int32(128))
    assert type(config.bits) is int and config.to_dict()["group_size"] == 128


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(),
        QuantizationConfig("hqq", bits=3, group_size=None, skip_modules=[]),
        QuantizationConfig(
            "bnb_nf4",
            compute_dtype=torch.float16,
            storage_dtype=torch.bfloat16,
            double_quant=False,
            quant_type="fp4",
            skip_modules=("a", "re:b.*"),
            layer_configs={
                "z": {"bits": 8, "compute_dtype": torch.float32},
                "a": {"method": QuantizationMethod.HQQ},
                "m": None,
            },
            backend_options={"support": "extended", "axis": 0},
            block_size=128,
        ),
        QuantizationConfig("hqq", quant_zero=True, quant_scale=True),
    ],
    ids=str,
)
def test_text_forms_are_lossless(config):
    values = json.loads(json.dumps(config.to_dict()))
    for again in (
        QuantizationConfig.from_dict(values),
        QuantizationConfig.from_json(config.to_json()),
    ):
        assert again.to_dict() == config.to_dict()
        assert (again.bits_set, again.double_quant_set) == (
            config.bits_set,
            config.double_quant_set,
        )
    assert list(QuantizationConfig.from_dict(values).layer_configs) == list(config.layer_configs)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(QuantizationConfig("hqq")) == "QuantizationConfig(method=HQQ)"
    config = QuantizationConfig("bnb_nf4", bits=4, compute_dtype=torch.float16, skip_modules=[])
    assert repr(config) == (
        "QuantizationConfig(method=BNB_NF4, bits=4, compute_dtype=torch.float16, skip_modules=[])"
    )


def test_unknown_settings_are_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match="'group_sise' is not known, did you mean 'group_size'"):
        QuantizationConfig(group_sise=64)
    with pytest.raises(ConfigError, match="did you mean 'compute_dtype'"):
        QuantizationConfig.from_dict({"compute_type": "float16"})
    with pytest.raises(ConfigError, match="did you mean 'skip_modules'"):
        QuantizationConfig.from_json('{"skip_module": []}')
    with pytest.raises(ConfigError, match="did you mean 'bits'"):
        QuantizationConfig("hqq", layer_configs={"a": {"bit": 8}})


@pytest.mark.parametrize(
    "kwargs, kind, text",
    [
        ({"method": "nf5"}, ValueError, "bnb_nf4"),
        ({"method": None}, TypeError, "QuantizationMethod or its name"),
        ({"method": 4}, TypeError, "QuantizationMethod or its name"),
        ({"bits": "4"}, ValueError, 'config.bits is "4", expected an integer'),
        ({"bits": 4.0}, ValueError, "expected an integer"),
        ({"bits": 1.58}, ValueError, "expected an integer"),
        ({"bits": True}, ValueError, "expected an integer"),
        ({"bits": 10**40}, ValueError, "Unsupported bit width: 1"),
        ({"bits": [4]}, ValueError, "expected an integer"),
        ({"group_size": -64}, ValueError, "expected >= 0"),
        ({"group_size": "64"}, ValueError, "expected an integer"),
        ({"group_size": 10**40}, ValueError, "expected an integer"),
        ({"block_size": 0}, ValueError, "expected >= 1"),
        ({"compute_dtype": "float3"}, TypeError, "compute_dtype"),
        ({"compute_dtype": 16}, TypeError, "torch.dtype or its name"),
        ({"storage_dtype": "complex64"}, TypeError, "storage_dtype"),
        ({"double_quant": "yes"}, ValueError, "true or false"),
        ({"double_quant": 1}, ValueError, "true or false"),
        ({"quant_type": 4}, ValueError, "a string"),
        ({"skip_modules": "lm_head"}, TypeError, r'\["lm_head"\]'),
        ({"skip_modules": 5}, TypeError, "a list of names"),
        ({"skip_modules": [5]}, ValueError, "a string"),
        ({"layer_configs": ["a"]}, TypeError, "a dict"),
        ({"layer_configs": {"a": 8}}, ValueError, "layer_configs"),
        ({"layer_configs": {5: {}}}, TypeError, "key of layer_configs"),
        ({"layer_configs": {"a": {"bits": "x"}}}, ValueError, "layer_configs"),
        ({"backend_options": 5}, TypeError, "a dict"),
        ({"backend_options": {"a": object()}}, ValueError, "expected a number, text"),
        ({"quant_scale": None}, None, ""),
        ({"quant_zero": "no"}, ValueError, "true or false"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_wrong_values_name_the_member(kwargs, kind, text):
    if kind is None:
        assert QuantizationConfig("hqq", **kwargs)
        return
    with pytest.raises(kind, match=text):
        QuantizationConfig(**({"method": "hqq"} | kwargs))


def test_settings_changed_later_are_checked_when_used():
    config = QuantizationConfig("hqq")
    config.bits = 7
    with pytest.raises(ConfigError, match="Unsupported bit width: 7"):
        quantal.create_quantization_adapter("cpu", config)
    config.bits, config.method = 4, "hqq"
    assert quantal.create_quantization_adapter("cpu", config).config.method.name == "HQQ"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "5", "null", '{"bits": }', "[" * 100_000, '{"backend_options": [1]}']
)
def test_text_that_is_no_config(text):
    with pytest.raises((ConfigError, TypeError)):
        QuantizationConfig.from_json(text)


@pytest.mark.parametrize("values", [None, 5, "hqq", ["hqq"], [("a", 1)]])
def test_from_dict_wants_a_dict(values):
    with pytest.raises(TypeError, match="a dict"):
        QuantizationConfig.from_dict(values)
    with pytest.raises(TypeError, match="JSON text"):
        QuantizationConfig.from_json({"method": "hqq"})


def test_huge_settings_are_carried():
    config = QuantizationConfig("hqq", skip_modules=[f"layer.{i}" for i in range(20_000)])
    assert len(QuantizationConfig.from_json(config.to_json()).skip_modules) == 20_000


# get_recommended_config


@pytest.mark.parametrize(
    "backend, memory, method, bits",
    [
        ("cuda", 10.4, "BNB_NF4", 4),
        ("cuda", 10.5, "BNB_INT8", 8),
        ("cuda", 16.8, "NONE", 4),
        ("mps", 16, "MLX_INT4", 4),
        ("mlx", 17, "MLX_INT8", 8),
        ("mps", 22, "NONE", 4),
        ("cpu", 13.9, "HQQ", 8),
        ("cpu", 14, "NONE", 4),
    ],
)
def test_recommendations(backend, memory, method, bits):
    config = get_recommended_config(backend, 7.0, memory)
    assert (config.method.name, config.bits) == (method, bits)
    assert quantal.validate_quantization_config(config, backend) == []
    assert config.note == ""


def test_recommendation_says_when_nothing_fits():
    config = get_recommended_config("cuda", 70.0, 8.0)
    assert config.method is QuantizationMethod.BNB_NF4
    assert "35.0 GB" in config.note and "8.0 GB" in config.note
    assert QuantizationConfig().note == ""


@pytest.mark.parametrize(
    "arguments, kind",
    [
        (("tpu",), ValueError),
        ((None,), TypeError),
        (("cuda", "7"), TypeError),
        (("cuda", None), TypeError),
        (("cuda", True), TypeError),
        (("cuda", -1.0), ValueError),
        (("cuda", float("nan")), ValueError),
        (("cuda", 10**400), ValueError),
        (("cuda", 7.0, "16"), TypeError),
        (("cuda", 7.0, float("inf")), ValueError),
        (("cuda", 7.0, -1), ValueError),
    ],
    ids=str,
)
def test_recommendation_refuses_what_is_no_size(arguments, kind):
    with pytest.raises(kind, match="expected"):
        get_recommended_config(*arguments)


def test_dtype_errors_are_type_errors_of_quantal():
    with pytest.raises(DtypeError, match="compute_dtype.*float17"):
        QuantizationConfig(compute_dtype="float17")
