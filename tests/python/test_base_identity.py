"""Which base is which: same base, same model in another codec, different model."""

import json

import pytest
import torch
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard

import quantal
import quantal.fsdp
from conftest import tiny_llama
from qlora_support import METHODS, lora, quantized
from quantal import BaseIdentity, base_identity, create_quantization_adapter
from quantal.base_identity import DIFFERENT_MODEL, OTHER_CODEC, SAME_BASE
from ranks import run_ranks


def reseeded():
    model = tiny_llama()
    generator = torch.Generator().manual_seed(99)
    for p in model.parameters():
        if p.dim() == 2:  # norms stay ones: only the weights tell
            p.data.normal_(std=0.02, generator=generator)
    return model


@pytest.fixture(scope="module")
def identities() -> dict[str, BaseIdentity]:
    found = {name: base_identity(quantized(config)) for name, config in METHODS.items()}
    found["dense"] = base_identity(tiny_llama())
    found["bf16"] = base_identity(tiny_llama().bfloat16())
    return found


def test_every_codec_of_one_model(identities):
    for a, mine in identities.items():
        for b, theirs in identities.items():
            assert mine.compare(theirs).kind == (SAME_BASE if a == b else OTHER_CODEC), (a, b)
    text = str(identities["nf4"].compare(identities["hqq4"]))
    assert "14 tensors, first model.layers.0.self_attn.q_proj.weight: hqq 4-bit g64" in text


@pytest.mark.parametrize("mine", ["nf4", "bf16"])
def test_other_weights(identities, mine):
    other = reseeded()
    for theirs in (other, other.bfloat16(), tiny_llama(hidden=128)):
        assert identities[mine].compare(base_identity(theirs)).kind == DIFFERENT_MODEL
    packed = create_quantization_adapter("cpu", METHODS["mlx4"]).quantize_model(other)
    assert identities[mine].compare(base_identity(packed)).kind == DIFFERENT_MODEL


def test_other_weights_in_one_codec(identities):
    packed = create_quantization_adapter("cpu", METHODS["hqq4"]).quantize_model(tiny_llama())
    layer = packed.model.layers[1].mlp.up_proj
    layer.codes.data[3, 5] ^= 1
    match = identities["hqq4"].compare(base_identity(packed))
    assert match.kind == DIFFERENT_MODEL
    assert "1 tensors of equal codec" in match.detail and "layers.1.mlp.up_proj" in match.detail


def test_norms_and_config_tell_models_apart(identities):
    tuned = tiny_llama().bfloat16()
    tuned.model.norm.weight.data += 0.25
    match = identities["dense"].compare(base_identity(tuned))
    assert match.kind == DIFFERENT_MODEL and "values of model.norm.weight" in match.detail
    turned = tiny_llama()
    turned.config.rope_theta = 5e5
    match = identities["dense"].compare(base_identity(turned))
    assert str(match) == "different model (config rope_theta is 500000.0, expected 10000.0)"


def test_adapters_are_no_part_of_it(identities):
    model = get_peft_model(quantized(METHODS["nf4"]), lora(use_dora=True))
    assert base_identity(model).digest == identities["nf4"].digest


def test_tied_weights_have_both_names():
    tied = base_identity(tiny_llama(tied=True)).tensors
    assert tied["lm_head.weight"] == tied["model.embed_tokens.weight"]


def _sharded(rank, world, name):
    config = METHODS[name]
    model = get_peft_model(quantized(config), lora())
    base = model.get_base_model()
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(base)
    identity = base_identity(model)
    return identity.digest, {n: t.sketch for n, t in identity.tensors.items()}


@pytest.mark.parametrize("name", ["nf4", "hqq4", "quanto4"])
def test_sharding_does_not_change_it(identities, name):
    whole = identities[name]
    for world in (2, 3):
        for digest, sketches in run_ranks(world, _sharded, name):
            assert digest == whole.digest
            for tensor, sketch in sketches.items():
                assert sketch == pytest.approx(whole.tensors[tensor].sketch, abs=1e-4)


def _stored(rank, world, method, dtype):
    model = quantal.fsdp.convert_storage_(quantized(METHODS[method]), dtype)
    if world:
        quantal.fsdp.shard_model(model)
    return base_identity(model).digest


@pytest.mark.parametrize("method", ["nf4", "mlx4"])
def test_storage_dtype_does_not_change_it(identities, method):
    for dtype in (torch.bfloat16, torch.float32):
        assert _stored(0, 0, method, dtype) == identities[method].digest
        assert set(run_ranks(3, _stored, method, dtype)) == {identities[method].digest}


def test_json_round_trip(identities):
    text = json.dumps(identities["quanto4"].to_dict())
    back = BaseIdentity.from_dict(json.loads(text))
    assert back.digest == identities["quanto4"].digest
    assert back.compare(identities["quanto4"]).same


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.update(format="x"), "format is 'x', expected \"quantal base 1\""),
        (lambda v: v.update(tensors={}), "digest is"),
        (lambda v: v.pop("config"), "KeyError: 'config'"),
        (lambda v: v.update(tensors=[1]), "expected the fields"),
        (lambda v: v["tensors"].update(a={"shape": [1]}), "TypeError"),
    ],
)
def test_damaged_json(identities, change, message):
    values = json.loads(json.dumps(identities["nf4"].to_dict()))
    change(values)
    with pytest.raises(quantal.CorruptError, match="base identity") as error:
        BaseIdentity.from_dict(values, "somewhere/base.json")
    assert message in str(error.value) and "somewhere/base.json" in str(error.value)
    with pytest.raises(quantal.CorruptError):
        BaseIdentity.from_dict(None)
