"""The two faces agree: names of the table in docs/cpp.md, members, order and defaults."""

import dataclasses
import enum
import functools
import inspect
import json
import pathlib
import re

import pytest

import quantal
from quantal import BackendCapabilities, QuantizationConfig, QuantizationMethod, _core

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "include"
ROW = re.compile(r"^\| `([\w.]+)` \| `(\w+)` \| `(quantal/[\w/]+\.h)` \|$", re.M)
TWINS = ROW.findall((ROOT / "docs" / "cpp.md").read_text(encoding="utf-8"))


def header(name):
    return (INCLUDE / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("python, cpp, path", TWINS, ids=lambda v: v)
def test_both_names_exist(python, cpp, path):
    assert functools.reduce(getattr, python.split("."), quantal) is not None
    declared = rf"(class|struct|enum class) {cpp}\b|\b{cpp}\(|TORCH_MODULE\({cpp}\)"
    assert re.search(declared, header(path)), f"{path} declares no {cpp}"


def test_the_table_is_found():
    assert len(TWINS) >= 40


def enumerators(text, name):
    body = re.search(rf"enum class {name}\b[^{{]*\{{(.*?)\}};", text, re.S)
    assert body, name
    return re.findall(r"\w+", re.sub(r"//[^\n]*", "", body.group(1)))


@pytest.mark.parametrize("twin", [QuantizationMethod, quantal.Backend], ids=lambda e: e.__name__)
def test_enumerators(twin: type[enum.Enum]):
    assert enumerators(header("quantal/formats.h"), twin.__name__) == [m.name for m in twin]
    if twin is QuantizationMethod:
        assert _core.method_names() == [m.name for m in twin]


def test_config_has_the_same_members_in_the_same_order_with_the_same_defaults():
    native = json.loads(_core.normalize_config("{}"))
    assert native.pop("bits_set") is False and native.pop("double_quant_set") is False
    names = [f.name for f in dataclasses.fields(QuantizationConfig)]
    assert list(native) == names and len(names) == 13
    python = json.loads(QuantizationConfig().to_json())
    assert (python.pop("bits"), native.pop("bits")) == (None, 4)
    assert (python.pop("double_quant"), native.pop("double_quant")) == (None, True)
    assert python == native
    text = re.search(r"struct QuantizationConfig \{(.*?)\n\};", header("quantal/policy.h"), re.S)
    members = re.findall(r"^  [\w:<>, ]+ (\w+)(?: = [^;]+|\{\})?;", text.group(1), re.M)
    assert [m for m in members if m in names] == names
    assert {m for m in members if m not in names} == {
        "bits_set",
        "double_quant_set",
        "custom_method",
        "note",
    }


def test_capabilities_have_the_same_members():
    text = re.search(
        r"struct BackendCapabilities \{(.*?)\n\};", header("quantal/backend.h"), re.S
    ).group(1)
    members = re.findall(r"^  [\w:<>, ]+ (\w+)(?: = \w+)?;", text, re.M)
    assert members == [f.name for f in dataclasses.fields(BackendCapabilities)]


ARGUMENTS = [
    (quantal.get_recommended_config, "quantal/policy.h", ["model_size_b", "available_memory_gb"]),
    (quantal.BackendManager.get_dtype, "quantal/backend.h", ["prefer_bfloat16"]),
    (quantal.BackendManager.get_optimal_batch_size, "quantal/backend.h", ["sequence_length"]),
    (
        quantal.prepare_model_for_training,
        "quantal/torch/training.h",
        ["use_gradient_checkpointing"],
    ),
    (quantal.prepare_model_for_training, "quantal/torch/training.h", ["norms_in_float32"]),
    (quantal.merge_to_full_precision, "quantal/torch/merge.h", ["safe_merge"]),
    (quantal.register_adapter, "quantal/torch/adapter.h", ["replace"]),
]


@pytest.mark.parametrize(
    "function, path, names", ARGUMENTS, ids=lambda v: getattr(v, "__name__", None)
)
def test_defaults_of_arguments(function, path, names):
    parameters = inspect.signature(function).parameters
    for name in names:
        written = set(re.findall(rf"\b{name} = ([\w.]+)[,;)]", header(path)))
        default = parameters[name].default
        if isinstance(default, bool):
            assert written == {str(default).lower()}, name
        else:
            assert {float(v) for v in written} == {default}, name


def test_methods_of_the_backend_manager():
    text = header("quantal/backend.h")
    for name, member in vars(quantal.BackendManager).items():
        if not name.startswith("_") and callable(getattr(member, "__func__", member)):
            assert re.search(rf"\b{name}\(", text), name
