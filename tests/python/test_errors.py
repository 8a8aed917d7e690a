"""Bad input: one typed error with its place, never a crash, nothing half-written."""

import pickle

import pytest
import torch
from torch import nn

import quantal
from conftest import GOLDEN, hqq, tiny_llama
from quantal import (
    ConfigError,
    CorruptError,
    DtypeError,
    IoError,
    QuantalError,
    ShapeError,
    UnsupportedError,
    _core,
    create_quantization_adapter,
)

TINY = GOLDEN / "checkpoints" / "gguf" / "tiny-q4_1.gguf"


def test_classes_are_also_the_built_in_kinds():
    kinds = {
        ConfigError: ValueError,
        ShapeError: ValueError,
        DtypeError: TypeError,
        UnsupportedError: NotImplementedError,
        CorruptError: ValueError,
        IoError: OSError,
    }
    for cls, kind in kinds.items():
        error = cls("what happened", "file", "tensor", 7)
        assert isinstance(error, QuantalError) and isinstance(error, kind)
        assert str(error) == "what happened"
        again = pickle.loads(pickle.dumps(error))
        assert (again.path, again.tensor, again.offset) == ("file", "tensor", 7)
        assert again.code == cls.code and type(again) is cls


def test_missing_file_is_an_io_error_with_its_path(tmp_path):
    for load in (quantal.load_gguf, quantal.inspect, quantal.load_model):
        suffix = "safetensors" if load is quantal.load_model else "gguf"
        with pytest.raises(IoError) as error:
            load(tmp_path / f"nowhere.{suffix}")
        assert f"nowhere.{suffix}" in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.6, 0.99])
def test_truncated_gguf(share, tmp_path):
    data = TINY.read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CorruptError) as error:
        quantal.load_gguf(path)
    assert error.value.path == str(path) and "short.gguf" in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_every_byte_of_a_gguf_header_may_lie(tmp_path):
    data = bytearray(TINY.read_bytes())
    path = tmp_path / "lying.gguf"
    outcomes = set()
    for position in range(400):
        changed = bytearray(data)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        try:
            _core.ModelSource.open(str(path))
            outcomes.add("read")
        except QuantalError as error:
            outcomes.add(error.code)
    assert "Corrupt" in outcomes and "Internal" not in outcomes


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.999])
def test_truncated_safetensors(share, tmp_path):
    adapter = create_quantization_adapter("cpu", hqq())
    adapter.save_quantized_model(adapter.quantize_model(tiny_llama()), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CorruptError) as error:
        adapter.load_quantized_model(tmp_path / "m")
    assert error.value.path == str(file)


@pytest.mark.parametrize(
    "path", sorted((GOLDEN / "containers").glob("bad_*.safetensors")), ids=lambda p: p.stem
)
def test_hostile_safetensors_are_refused(path):
    with pytest.raises(CorruptError) as error:
        _core.SafetensorsFile(str(path))
    assert error.value.path == str(path)


def test_good_safetensors_are_read():
    from safetensors.torch import load_file

    from quantal.checkpoint import read_tensor

    path = GOLDEN / "containers" / "good.safetensors"
    expected = load_file(path)
    tensors = _core.SafetensorsFile(str(path)).tensors()
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(read_tensor(tensors[name]), tensor), name


def test_weights_with_nan_name_the_place():
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[3, 7] = float("nan")
    adapter = create_quantization_adapter("cpu", hqq())
    with pytest.raises(UnsupportedError, match="row 3") as error:
        adapter.quantize_model(model)
    assert "nan" in str(error.value).lower()
    assert type(model[0]) is nn.Linear


def test_layers_that_cannot_be_grouped_stay_dense_or_raise():
    model = nn.Sequential(nn.Linear(60, 3))
    adapter = create_quantization_adapter("cpu", hqq())
    adapter.quantize_model(model)
    assert type(model[0]) is nn.Linear
    assert "group_size is 64" in adapter.report.entries[0]["reason"]
    strict = create_quantization_adapter("cpu", hqq(), fallback="error")
    with pytest.raises((ShapeError, ConfigError), match="group"):
        strict.quantize_model(model)


def test_unsupported_bits_of_a_method():
    with pytest.raises(QuantalError, match="bits"):
        create_quantization_adapter("cpu", hqq(bits=16), fallback="error").quantize_model(
            nn.Sequential(nn.Linear(64, 64))
        )


def test_operators_raise_typed_errors():
    from quantal import _ops

    layer = quantal.QuantizedLinear.from_linear(nn.Linear(64, 64), hqq())
    packed = layer.codes, layer.stats, layer.shared
    with pytest.raises(ShapeError, match="63"):
        _ops.linear(torch.zeros(2, 63), *packed, None, layer._spec)
    with pytest.raises(DtypeError):
        _ops.linear(torch.zeros(2, 64, dtype=torch.int32), *packed, None, layer._spec)
    with pytest.raises(DtypeError):
        _ops.dequantize(*packed, layer._spec, torch.int8)
    with pytest.raises(CorruptError):
        _ops.dequantize(*packed, [99, *layer._spec[1:]], torch.float32)
    with pytest.raises(ShapeError):
        _ops.dequantize(packed[0][:3], *packed[1:], layer._spec, torch.float32)


def test_a_failed_save_leaves_nothing(tmp_path):
    adapter = create_quantization_adapter("cpu", hqq())
    model = adapter.quantize_model(tiny_llama())
    target = tmp_path / "no" / "such" / "parent"
    try:
        adapter.save_quantized_model(model, target)
    except IoError:
        assert not (tmp_path / "no").exists()
    else:
        assert (target / "model.safetensors").exists()
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]
