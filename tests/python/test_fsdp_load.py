"""Shard-direct loading: bytes of quantize-then-shard, from dense and quantized folders, and errors
that reach every rank."""

import json
import os
import pathlib
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh

from conftest import GOLDEN, hqq, nf4, tiny_llama
from fsdp_support import FORMS, METHODS, attach, train, whole_bytes, whole_tensor
from qlora_support import packed_bytes, packed_layers, same_bytes
from quantal import (
    ConfigError,
    PackedLinear,
    QuantalError,
    QuantizedEmbedding,
    _core,
    create_quantization_adapter,
    load_model,
    model_digest,
    save_model,
)
from quantal.fsdp import load_sharded, local_base_bytes
from ranks import Ranks, run_ranks


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    """A bfloat16 folder in several files, with 72 columns: groups cross rows."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    model = tiny_llama(hidden=72, bias=True).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return str(folder)


def quantized_folder(dense: str, folder: pathlib.Path, config) -> str:
    model = load_model(dense)
    save_model(_adapter(config).quantize_model(model), folder)
    return str(folder)


def _adapter(config):
    return create_quantization_adapter("cpu", config, support="extended")


def _like_the_whole(rank: int, world: int, dense: str, forms: list[str]) -> dict:
    out = {}
    for name in forms:
        config = FORMS[name]
        reference = _adapter(config).quantize_model(load_model(dense))
        expected, digest = packed_bytes(reference), model_digest(reference)
        for dora in (False, True):
            model = load_sharded(dense, config=config, attach=attach(dora))
            whole = attach(dora)(_adapter(config).quantize_model(load_model(dense)))
            state = {n: whole_tensor(t) for n, t in model.state_dict().items()}
            other = whole.state_dict()
            differ = [
                n for n in other if not torch.allclose(state[n], other[n], rtol=_rtol(n), atol=0)
            ]
            tokens = torch.arange(16)[None]
            loss = model(tokens, labels=tokens).loss.item()
            close = abs(loss - whole(tokens, labels=tokens).loss.item()) < 1e-2
            out[f"{name}{'-dora' if dora else ''}"] = (
                same_bytes(whole_bytes(model), expected),
                state.keys() == other.keys() and not differ,
                close,
            )
        model = load_sharded(dense, config=config)
        out[f"{name}-digest"] = (model_digest(model) == digest,) * 3
    return out


def _rtol(name: str) -> float:
    """PEFT rounds the first norms of bfloat16 weights to bfloat16; ours are float32."""
    return 2**-8 if "magnitude" in name else 0.0


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_dense_folder_gives_the_bytes_of_the_whole(dense, world):
    """Every method; groups and second-level blocks cross rows and shares (72 columns)."""
    forms = ["nf4", "fp4", "int8", "hqq4", "hqq4-axis0", "hqq8"]  # 72 columns
    for result in run_ranks(world, _like_the_whole, dense, forms, timeout=300.0):
        assert {k: v for k, v in result.items() if v != (True,) * 3} == {}


def test_even_columns(tmp_path):
    tiny_llama(hidden=64).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    forms = ["mlx4", "mxfp4", "quanto4", "quanto4-hqq"]
    for result in run_ranks(3, _like_the_whole, str(tmp_path / "m"), forms, timeout=300.0):
        assert {k: v for k, v in result.items() if v != (True,) * 3} == {}


def _load_quantized(rank: int, world: int, folder: str, digest: str) -> tuple:
    model = load_sharded(folder, attach=attach())
    base = load_sharded(folder)
    losses = train(model, rank, world, 2)
    return model_digest(base) == digest, losses[1] < losses[0], local_base_bytes(base)


@pytest.mark.parametrize("name", ["nf4", "hqq4", "mlx4", "quanto4", "int8"])
def test_a_quantized_folder(dense, tmp_path, name):
    source = dense
    if name in ("mlx4", "quanto4"):
        source = str(tmp_path / "even")
        tiny_llama(hidden=64).to(torch.bfloat16).save_pretrained(source)
    folder = quantized_folder(source, tmp_path / "q", METHODS[name])
    model = load_model(folder)
    total = sum(la.packed_bytes() for la in packed_layers(model).values())
    for same, falls, held in run_ranks(2, _load_quantized, folder, model_digest(model)):
        assert same and falls and held < 0.75 * total


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory) -> dict[str, str]:
    """Quantized models by what they are: written here in the default layouts (safetensors), and by
    upstream's tools as torch, npz and GGUF files."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_llama(hidden=64).to(torch.bfloat16).save_pretrained(folder / "even")
    out = {}
    for name in ("nf4", "fp4", "int8", "hqq4", "hqq4-axis0", "hqq8", "mlx4", "mxfp4", "quanto4"):
        even = name in ("mlx4", "mxfp4", "quanto4")
        source = str(folder / "even") if even else dense  # 72 columns: groups cross rows
        out[name] = quantized_folder(source, folder / name, FORMS[name])
    for name in ("gguf/tiny-q4_1.gguf", "hqq-pt-3bit-axis0", "mlx-npz", "quanto-float8"):
        out[name] = str(GOLDEN / "checkpoints" / name)
    return out


def _rows_of_packed(rank: int, world: int, folders: dict[str, str]) -> dict:
    asked: dict[str, tuple] = {}
    real = _core.CheckpointReader.read_layer_rows

    def noted(reader, name, rows, stat_rows):
        asked[name] = rows, stat_rows
        return real(reader, name, rows, stat_rows)

    def refused(reader, name):
        raise AssertionError(f"{name} is read whole")

    out = {}
    for name, folder in folders.items():
        expected = packed_bytes(load_model(folder))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_core.CheckpointReader, "read_layer_rows", noted)
            patch.setattr(_core.CheckpointReader, "read_layer", refused)
            for storage in (None, torch.float32):
                asked.clear()
                model = load_sharded(folder, storage_dtype=storage)
                same = same_bytes(whole_bytes(model), expected)
                layers = packed_layers(model).items()
                rows = {
                    n: (*asked[n], _core.layout(la._spec), la._rows)
                    for n, la in layers
                    if n in asked  # not the second of two that share a weight
                }
                out[f"{name} as {storage}"] = same, rows
    return out


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_rank_reads_its_rows_of_packed_layers(packed, world):
    """Every dialect and container; ranks with fewer rows or none; flat views of odd rows."""
    results = run_ranks(world, _rows_of_packed, packed, timeout=300.0)
    for name in results[0]:
        assert all(found[name][0] for found in results), name
        for layer, (*_, layout, rows) in results[0][name][1].items():
            for part, size in ((0, rows), (1, layout["stats"][0])):
                held = [found[name][1][layer][part] for found in results]
                spare = world if name.endswith("float32") else 0  # a row at a border is read twice
                assert held[0][0] == 0 and held[-1][1] == size, (name, layer, held)
                assert sum(end - begin for begin, end in held) <= size + spare
                assert max(end - begin for begin, end in held) <= -(-size // world) + spare


def _tied(rank: int, world: int, folder: str) -> tuple:
    model = load_sharded(folder, config=METHODS["nf4"])
    train_ready = model.lm_head.weight is model.model.embed_tokens.weight
    model(torch.arange(8)[None])
    return train_ready, model_digest(model)


def test_tied_embeddings(tmp_path):
    tiny_llama(tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    reference = _adapter(METHODS["nf4"]).quantize_model(load_model(tmp_path / "m"))
    for tied, digest in run_ranks(2, _tied, str(tmp_path / "m")):
        assert tied and digest == model_digest(reference)


def _tied_packed(rank: int, world: int, path: str, expected: str) -> tuple:
    model = load_sharded(path)
    same = model_digest(model) == expected  # before FSDP has gathered anything
    loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.item()
    return same, model_digest(model) == expected, round(loss, 4)


def test_a_packed_embedding_that_is_the_output_layer(tmp_path):
    """Two modules, one weight, packed once in the file."""
    path = str(tmp_path / "tied")
    model = tiny_llama(tied=True)
    head = PackedLinear.from_linear(model.lm_head, METHODS["mlx4"])
    parts = head._spec, head.codes, head.stats, head.shared
    model.lm_head = head
    model.model.embed_tokens = QuantizedEmbedding.from_packed(*parts)
    save_model(_adapter(METHODS["mlx4"]).quantize_model(model), path)
    model = load_model(path)
    assert model.lm_head.codes is model.model.embed_tokens.codes
    loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.item()
    for found in run_ranks(3, _tied_packed, path, model_digest(model)):
        assert found == (True, True, round(loss, 4))


def _options(rank: int, world: int, dense: str) -> list:
    out = []
    expected = packed_bytes(_adapter(METHODS["nf4"]).quantize_model(load_model(dense)))
    for kwargs in (
        {"mixed_precision": torch.bfloat16, "storage_dtype": torch.bfloat16},
        {"offload": True, "reshard_after_forward": False},
        {"model": tiny_llama(hidden=72, bias=True)},
        {"model": tiny_llama(hidden=72, bias=True).config},
    ):
        model = load_sharded(dense, config=METHODS["nf4"], attach=attach(), **kwargs)
        train(model, rank, world, 1)
        out.append(same_bytes(whole_bytes(model), expected))

    def with_head(model):
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        return get_peft_model(model, config)

    model = load_sharded(dense, config=METHODS["nf4"], attach=with_head)
    head = whole_tensor(model.base_model.model.lm_head.modules_to_save["default"].weight)
    out.append(torch.equal(head.float(), load_model(dense).lm_head.weight.float()))
    return out


def test_options(dense):
    """Views in bfloat16, offload, a model or a config of the caller's, PEFT's modules_to_save."""
    for result in run_ranks(2, _options, dense):
        assert result == [True] * 5


def _attentions(rank: int, world: int, dense: str) -> list:
    """The attention that a call leads to, or the error."""
    found = []
    for kwargs in (
        {"attach": attach(), "mixed_precision": torch.bfloat16},
        {"mixed_precision": torch.bfloat16},
        {"attach": attach(), "mixed_precision": torch.float32},
        {"attn_implementation": "eager"},
        {"attn_implementation": "quantal"},
        {"model": tiny_llama(hidden=72, bias=True)},
        {"model": tiny_llama(hidden=72, bias=True), "attn_implementation": "quantal"},
        {"attn_implementation": "no such thing"},
    ):
        try:
            model = load_sharded(dense, config=METHODS["nf4"], **kwargs)
            found.append(model.config._attn_implementation)
        except ConfigError as error:
            found.append(str(error))
    return found


def test_attention_is_chosen(dense):
    """By the rule of load_model, for the dtype that parameters are gathered in."""

    def auto(dtype, training):
        return "sdpa" if _core.attention_gain_refusal(4, 2, 18, dtype, training) else "quantal"

    expected = [auto("bf16", True), auto("bf16", False), auto("f32", True)]
    expected += ["eager", "quantal", "sdpa", "quantal"]
    for *names, error in run_ranks(2, _attentions, dense):
        assert names == expected
        assert "load_sharded: attn_implementation is 'no such thing'" in error
    with pytest.raises(TypeError, match="load_sharded: attn_implementation is 3"):
        load_sharded(dense, attn_implementation=3)


def _replicas(rank: int, world: int, dense: str) -> tuple:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = load_sharded(dense, config=METHODS["nf4"], mesh=mesh, attach=attach())
    expected = packed_bytes(_adapter(METHODS["nf4"]).quantize_model(load_model(dense)))
    held = local_base_bytes(model)
    losses = train(model, rank, world, 2)
    return same_bytes(whole_bytes(model), expected), losses[1] < losses[0], held


def test_replicas_of_shards(dense):
    """A 2-D mesh: two replicas, each cut in two."""
    results = run_ranks(4, _replicas, dense)
    model = _adapter(METHODS["nf4"]).quantize_model(load_model(dense))
    total = sum(la.packed_bytes() for la in packed_layers(model).values())
    assert all(same and falls and held < 0.75 * total for same, falls, held in results)


# ---------------------------------------------------------------------- errors


def _refused(rank: int, world: int, folder: str, what: str) -> str:
    config = METHODS["nf4"]
    start = time.monotonic()
    try:
        if what == "missing on one rank":
            folder = folder if rank == 0 else folder + "/nothing"
            load_sharded(folder, config=config)
        elif what == "unlike configs":
            load_sharded(folder, config=METHODS["nf4" if rank else "hqq4"])
        elif what == "pissa":
            load_sharded(
                folder,
                config=config,
                attach=lambda m: get_peft_model(
                    m, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
                ),
            )
        elif what == "attach":
            load_sharded(folder, config=config, attach=lambda m: None)
        else:
            load_sharded(folder, config=hqq() if what == "hqq" else config)
    except QuantalError as error:
        assert time.monotonic() - start < 30
        return f"{type(error).__name__}: {error}"
    return "no error"


def _errors(folder: str, what: str) -> list[str]:
    found = Ranks(2, _refused, folder, what, timeout=60.0).join(60)
    assert [kind for kind, _ in found] == ["value"] * 2, found
    return [text for _, text in found]


def test_errors_reach_every_rank(dense):
    said = _errors(dense, "missing on one rank")
    assert all(s.startswith("NotFoundError") and "nothing" in s for s in said)
    assert "on rank 1" in said[0]
    assert all("form of model.layers.0" in s for s in _errors(dense, "unlike configs"))
    assert all("init_lora_weights" in s for s in _errors(dense, "pissa"))
    assert all("attach returned NoneType" in s for s in _errors(dense, "attach"))


def _damaged(dense: str, folder: pathlib.Path, change) -> str:
    folder.mkdir()
    for name in os.listdir(dense):
        if name.endswith(".json"):
            (folder / name).write_bytes(pathlib.Path(dense, name).read_bytes())
    for path in pathlib.Path(dense).glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("what", ["nf4", "hqq"])
def test_a_weight_that_is_not_finite_stops_all_ranks(dense, tmp_path, what):
    """Only the rank that has the row sees it; the others are inside an exchange."""

    def change(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        if name in tensors:
            tensors[name][-1, 5] = float("nan")

    folder = _damaged(dense, tmp_path / "nan", change)
    said = _errors(folder, what)
    assert all("nan, expected finite" in s for s in said), said


def test_missing_tensors_and_files(dense, tmp_path):
    def change(tensors):
        tensors.pop("model.layers.1.mlp.up_proj.weight", None)

    said = _errors(_damaged(dense, tmp_path / "lost", change), "nf4")
    assert all("model.layers.1.mlp.up_proj.weight" in s for s in said), said
    folder = pathlib.Path(_damaged(dense, tmp_path / "file", lambda tensors: None))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = sorted(set(index["weight_map"].values()))[1]
    (folder / lost).unlink()
    said = _errors(str(folder), "nf4")
    assert all(lost in s for s in said), said


def test_no_process_group(dense):
    with pytest.raises(ConfigError, match="torchrun"):
        load_sharded(dense, config=nf4())
