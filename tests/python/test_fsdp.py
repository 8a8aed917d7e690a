"""FSDP2 and FSDP1 over packed layers: bytes, losses, shares, errors. Ranks are forked processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
)

from conftest import nf4, tiny_llama
from fsdp_support import (
    FORMS,
    METHODS,
    Zoo,
    adapted,
    batch,
    lora_calls,
    plant_nans,
    train,
    whole_bytes,
)
from qlora_support import packed_bytes, packed_layers, quantized, randomize_lora, same_bytes
from quantal import (
    ConfigError,
    CorruptError,
    DtypeError,
    UnsupportedError,
    _core,
    load_model,
    model_digest,
    save_model,
)
from quantal.fsdp import (
    convert_storage_,
    count_gathers,
    decoder_blocks,
    gathered,
    load_sharded,
    local_base_bytes,
    shard_model,
    unit_bytes,
    verify_gathers,
    wrap_policy,
)
from ranks import run_ranks

#: Losses of the same steps on other world sizes differ by the order of float32 sums: gradients of
#: 12 sequences are added in another order (relative error of a few 2^-24), which AdamW can carry to
#: whole steps of single weights whose gradient is near zero. Twenty steps stay below this.
LOSS_BOUND = 2e-3


# ---------------------------------------------------------------------- FSDP2


def _share(model: nn.Module, rank: int, world: int) -> int:
    """Bytes that this rank should hold: its rows of codes and statistics, and the small tables."""
    total = 0
    for layer in packed_layers(model).values():
        layout = _core.layout(layer._spec)
        for part in ("codes", "stats"):
            rows, columns = layout[part]
            each = -(-rows // world)
            total += max(0, min(rows, (rank + 1) * each) - rank * each) * columns
        total += layout["shared"][0] + 8 * len(layer._spec)
    return total


def _train_every_form(rank: int, world: int) -> dict:
    out = {}
    for name, config in FORMS.items():
        for dora in (False, True) if world == 2 else (False,):
            model = adapted(config, dora)
            plant_nans(model)
            before = whole_bytes(model)
            share = _share(model, rank, world)
            shard_model(model, mixed_precision=torch.bfloat16)
            waiting = verify_gathers(model)
            losses = train(model, rank, world, 2)
            out[f"{name}{'-dora' if dora else ''}"] = (
                same_bytes(before, whole_bytes(model)),
                waiting == len(packed_layers(model)),
                local_base_bytes(model) == share,
                all(torch.isfinite(torch.tensor(losses))),
            )
    return out


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_bytes_survive_training(world):
    """Codes full of NaN patterns, in bfloat16 mixed precision: bits stay, every gather is verified,
    and a rank holds its rows."""
    for result in run_ranks(world, _train_every_form, timeout=300.0):
        assert {k for k, v in result.items() if v != (True,) * 4} == set()


def _forward_zoo(rank: int, world: int) -> tuple:
    ids = torch.arange(24).reshape(2, 12)
    expected = Zoo()(ids)
    before = packed_bytes(Zoo())
    results = []
    for offload in (False, CPUOffloadPolicy(pin_memory=False)):
        for reshard in (None, False):
            model = Zoo()
            assert len(decoder_blocks(model)) == len(model.blocks)
            shard_model(model, offload=offload, reshard_after_forward=reshard)
            verify_gathers(model)
            y = model(ids)
            y.square().mean().backward()
            results.append((torch.equal(y, expected), same_bytes(before, whole_bytes(model))))
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_every_dialect_and_width_computes_the_same(world):
    """Rows that ranks cannot share evenly, packed embeddings, every width, both offload policies:
    the same float32 results to the bit."""
    for result in run_ranks(world, _forward_zoo):
        assert result == [(True, True)] * 4


#: How a step is taken: checkpointing (whether re-entrant), offload, LoRA in one step or PEFT's.
STEPS = {
    "plain": (None, False, True),
    "non-reentrant": (False, False, True),
    "reentrant": (True, False, True),
    "offload": (False, True, True),
    "PEFT": (False, False, False),
}


def _one_step_lora(rank: int, world: int) -> dict:
    """Result without gradients, gradients of a step, and which calls were done in one step."""
    out = {}
    for name, (reentrant, offload, one_step) in STEPS.items():
        model = adapted(METHODS["nf4"])
        randomize_lora(model)
        model.config.use_cache = False  # checkpointing does so; attention is another one with it
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        shard_model(model.train(), mixed_precision=torch.bfloat16, offload=offload)
        tokens = batch(0).chunk(world)[rank]
        with lora_calls(one_step) as calls:
            with torch.no_grad():
                loss = model(input_ids=tokens, labels=tokens).loss.item()
            model(input_ids=tokens, labels=tokens).loss.backward()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        assert all(p.dtype == p.grad.dtype == torch.float32 for _, p in named)
        out[name] = set(calls), loss, {n: p.grad.full_tensor() for n, p in named}
    return out


def test_lora_is_done_in_one_step_under_mixed_precision():
    """bfloat16 adapters, as FSDP2 hands them over, in every mode; the same bits in all of them."""
    for result in run_ranks(2, _one_step_lora):
        _, loss, gradients = result["plain"]
        for name, (calls, other_loss, other) in result.items():
            assert calls == {STEPS[name][2]}, name
            exact = name != "PEFT"
            assert other_loss == loss if exact else other_loss == pytest.approx(loss, rel=2e-3)
            for n, gradient in gradients.items():
                assert gradient.norm() > 0
                difference = (other[n] - gradient).norm() / gradient.norm()
                assert difference == 0 if exact else difference < 0.05, (name, n)


def _train_losses(rank: int, world: int) -> dict:
    out = {}
    for name, config in METHODS.items():
        model = adapted(config)
        total = sum(layer.packed_bytes() for layer in packed_layers(model).values())
        if world:
            shard_model(model)
            assert local_base_bytes(model) <= total / world * 1.02 + 2048 * 14
        out[name] = train(model, rank, max(world, 1), 20)
    return out


def test_losses_do_not_depend_on_the_number_of_ranks():
    """20 steps, a global batch of 12, the same order of samples."""
    alone = run_ranks(0, _train_losses, timeout=300.0)[0]
    for world in (1, 2, 4):
        for name, losses in run_ranks(world, _train_losses, timeout=300.0)[0].items():
            assert losses[-1] < 0.95 * losses[0], name
            difference = max(abs(a - b) for a, b in zip(losses, alone[name], strict=True))
            assert difference <= LOSS_BOUND, (name, world, difference)


def _state(rank: int, world: int) -> dict:
    torch.manual_seed(0)
    reference = quantized(METHODS["nf4"])
    digest = model_digest(reference)
    model = quantized(METHODS["nf4"])
    shard_model(model)
    out = {"digest": model_digest(model) == digest}
    layer = packed_layers(model)["model.layers.0.mlp.up_proj"]
    out["shape"] = tuple(layer.weight.shape) == (128, 64) and layer.weight.dtype == torch.float32
    with pytest.raises(UnsupportedError, match="sharded"):
        layer.weight + 1
    with pytest.raises(UnsupportedError, match="gathered"):
        layer.dequantize_weights()
    with pytest.raises(ConfigError, match="sharded"):
        save_model(model, "/nonexistent/folder")
    with gathered(layer):
        whole = layer.dequantize_weights()
    expected = reference.model.layers[0].mlp.up_proj.dequantize_weights()
    out["gathered"] = torch.equal(whole, expected)
    out["sharded again"] = hasattr(layer.codes, "full_tensor")
    state = model.state_dict()
    out["state"] = all(hasattr(t, "full_tensor") for n, t in state.items() if n.endswith(".codes"))
    other = quantized(METHODS["nf4"])
    for p in other.parameters():
        p.data.zero_()
    shard_model(other)
    other.load_state_dict(state)
    out["loaded"] = model_digest(other) == digest
    return out


def test_state_of_a_sharded_model():
    for result in run_ranks(2, _state):
        assert {k for k, v in result.items() if not v} == set()


def _flip_byte(rank: int, world: int) -> str:
    model = quantized(METHODS["hqq4"])
    shard_model(model)
    verify_gathers(model)
    layer = packed_layers(model)["model.layers.1.self_attn.k_proj"]
    if rank == 1:
        layer.codes.to_local()[0, 0] ^= 1
    try:
        model(torch.arange(8)[None])
    except CorruptError as error:
        return str(error)
    return "no error"


def test_verify_gathers_sees_a_flipped_bit_on_every_rank():
    for text in run_ranks(2, _flip_byte):
        assert "model.layers.1.self_attn.k_proj" in text and "bytes of rank 1" in text


def _off(rank: int, world: int) -> int:
    model = quantized(METHODS["hqq4"])
    shard_model(model)
    assert verify_gathers(model) == 14
    assert verify_gathers(model, on=False) == 0
    packed_layers(model)["model.layers.1.self_attn.k_proj"].codes.to_local().fill_(3)
    model(torch.arange(8)[None])
    return sum(len(layer._forward_pre_hooks) for layer in packed_layers(model).values())


def test_verify_gathers_can_be_switched_off():
    assert run_ranks(2, _off) == [0, 0]


def _traffic(rank: int, world: int) -> list:
    out = []
    for name in ("nf4", "hqq4", "quanto4"):
        model = adapted(METHODS[name])
        packed = sum(la.codes.numel() + la.stats.numel() for la in packed_layers(model).values())
        dense = sum(la._rows * la._cols for la in packed_layers(model).values())
        shard_model(model, mixed_precision=torch.bfloat16)
        train(model, rank, world, 1)
        tokens = torch.arange(16)[None]
        with count_gathers() as traffic:
            model(input_ids=tokens, labels=tokens).loss.backward()
        root = unit_bytes(model, torch.bfloat16)
        blocks = sum(unit_bytes(b, torch.bfloat16) for b in decoder_blocks(model))
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad) * 2
        norms = sum(p.numel() for n, p in model.named_parameters() if "layernorm" in n) * 2
        out.append(
            {
                "measured": traffic.bytes == root + 2 * blocks,  # forward and backward; root once
                "packed only": blocks == packed + adapters + norms,
                "less than dense": packed < 0.6 * 2 * dense,
            }
        )
    return out


def test_all_gathers_move_packed_bytes_only():
    for result in run_ranks(2, _traffic):
        assert result == [{"measured": True, "packed only": True, "less than dense": True}] * 3


def _gathers_begun(rank: int, world: int) -> dict:
    """Gathers that have begun when each block computes, without gradients and in a step."""
    out = {}
    for name, (reentrant, _, _) in list(STEPS.items())[:3]:
        model = adapted(METHODS["nf4"])
        model.config.use_cache = False
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        shard_model(model.train(), mixed_precision=torch.bfloat16)
        begun: list[int] = []
        tokens = batch(0).chunk(world)[rank]
        with count_gathers() as traffic:
            for block in decoder_blocks(model):
                block.self_attn.register_forward_pre_hook(
                    lambda *_: begun.append(traffic.calls)  # noqa: B023
                )
            with torch.no_grad():
                model(input_ids=tokens, labels=tokens)
            forward = traffic.calls
            model(input_ids=tokens, labels=tokens).loss.backward()
        out[name] = begun[:2], forward, begun[2:4], traffic.calls
    return out


def test_the_next_block_is_gathered_while_one_computes():
    """Root and two blocks; the root stays gathered until a backward pass. Each block is gathered
    twice in a step, whether it is computed once more or not."""
    for result in run_ranks(2, _gathers_begun):
        assert list(result.values()) == [([3, 3], 3, [5, 5], 7)] * 3


class Skipping(Zoo):
    """Leaves blocks out."""

    skipped: tuple = ()

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block[1].bias.requires_grad_(True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        for number, block in enumerate(self.blocks):
            if number not in self.skipped:
                x = x + block(x)
        return x


def _left_out(rank: int, world: int) -> list:
    ids = torch.arange(24).reshape(2, 12)
    models = Skipping(), shard_model(Skipping())
    optimizers = [torch.optim.SGD([m.scale, *(b[1].bias for b in m.blocks)], 0.1) for m in models]
    last, found = len(models[0].blocks) - 1, []
    # In the middle, the first, the last one; with steps, or other values, in between.
    for skipped, trains in (
        ((4,), False),
        ((), True),
        ((0, 5, 6, last), True),
        ((1, 2), False),
        ((last,), True),
        ((), False),
    ):
        results = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model.skipped = skipped
            with torch.set_grad_enabled(trains):
                results.append(model(ids))
            if trains:
                results[-1].square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                with torch.no_grad():
                    for block in model.blocks:
                        block[1].bias.add_(0.01)
        held = [hasattr(p, "full_tensor") for b in models[1].blocks for p in b.parameters()]
        found.append((torch.equal(*results), all(held)))
    return found


def test_blocks_that_are_left_out():
    """What was gathered ahead for them is given back, and never stands for later values."""
    for result in run_ranks(2, _left_out):
        assert result == [(True, True)] * 6


# ---------------------------------------------------------------------- what is refused


def _unlike(rank: int, world: int) -> list[str]:
    said = []

    def refused(model: nn.Module, **kwargs) -> None:
        try:
            shard_model(model, **kwargs)
            said.append("no error")
        except (ConfigError, CorruptError) as error:
            said.append(f"{type(error).__name__}: {error}")

    refused(quantized(METHODS["nf4" if rank == 0 else "mlx4"]))  # two dialects
    model = quantized(METHODS["nf4"])
    if rank == 1:
        layer = packed_layers(model)["model.layers.0.mlp.down_proj"]
        layer.stats.data[5, 0] ^= 1
    refused(model)
    dense = tiny_llama()
    if rank == 1:
        dense.model.norm.weight.data[3] += 1
    dense.requires_grad_(False)
    refused(dense)
    refused(quantized(METHODS["nf4"]), mixed_precision="bf16")
    refused(quantized(METHODS["nf4"]), offload="yes")
    refused(
        convert_storage_(quantized(METHODS["nf4"]), torch.float32), mixed_precision=torch.bfloat16
    )
    return said


def test_models_that_differ_are_refused_on_all_ranks():
    for said in run_ranks(2, _unlike):
        assert "form of model.layers.0.self_attn.q_proj" in said[0] and said[0].startswith("Corr")
        assert "model.layers.0.mlp.down_proj.stats" in said[1] and "rank 1" in said[1]
        assert "model.norm.weight" in said[2]
        assert "mixed_precision is 'bf16'" in said[3]
        assert "offload is 'yes'" in said[4]
        assert "stored as torch.float32" in said[5] and "bfloat16" in said[5]


def _unlike_adapters(rank: int, world: int) -> bool:
    torch.manual_seed(rank)
    model = quantized(METHODS["nf4"])
    from peft import get_peft_model

    from qlora_support import lora

    torch.manual_seed(rank)
    model = get_peft_model(model, lora())
    torch.manual_seed(0)
    expected = get_peft_model(quantized(METHODS["nf4"]), lora()).state_dict()
    torch.manual_seed(rank)
    shard_model(model)
    state = {n: t.full_tensor() for n, t in model.state_dict().items() if "lora_A" in n}
    name = next(iter(state))
    return state[name].shape == expected[name].shape and all(
        torch.equal(a, b) for a, b in zip(*_both(state), strict=True)
    )


def _both(state):
    """Values here and those of the first rank."""
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, state)
    return list(state.values()), list(said[0].values())


def test_adapters_become_those_of_the_first_rank():
    assert run_ranks(2, _unlike_adapters) == [True, True]


def test_wrong_arguments():
    with pytest.raises(TypeError, match="shard_model: mesh is 2 .*expected a torch DeviceMesh"):
        shard_model(tiny_llama(), 2)
    with pytest.raises(TypeError, match="model is 'x' .*expected an nn.Module"):
        shard_model("x")
    with pytest.raises(TypeError, match="on is 1"):
        verify_gathers(tiny_llama(), 1)
    with pytest.raises(TypeError, match="load_sharded: attach is 3"):
        load_sharded("x", attach=3)


def test_no_process_group():
    with pytest.raises(ConfigError, match="torchrun"):
        shard_model(tiny_llama())


# ---------------------------------------------------------------------- views


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["nf4", "hqq4", "quanto4", "mxfp4", "int8"])
def test_storage_is_a_view(name, dtype, tmp_path):
    """Seen under another dtype and back: no bit moves, and moves and casts of the model reach
    bytes as bytes."""
    model = quantized(FORMS[name])
    plant_nans(model)
    before, digest = packed_bytes(model), model_digest(model)
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    assert convert_storage_(model, dtype) is model
    layers = packed_layers(model)
    assert all(la.codes.dtype is dtype and la.stats.dtype is dtype for la in layers.values())
    assert torch.equal(model(ids).logits, expected)
    assert model_digest(model) == digest
    state = model.state_dict()
    assert all(state[k].dtype is torch.uint8 for k in before)
    model.to(torch.float64).to(torch.float32)  # generic casts
    assert all(la.codes.dtype is dtype for la in layers.values())
    twin = convert_storage_(quantized(FORMS[name]), dtype)
    twin.load_state_dict(state)
    assert model_digest(twin) == digest
    save_model(model, tmp_path / "out")
    assert model_digest(load_model(tmp_path / "out")) == digest
    convert_storage_(model, torch.uint8)
    assert same_bytes(before, packed_bytes(model))


def test_a_cast_of_packed_bytes_is_an_error():
    model = convert_storage_(quantized(METHODS["nf4"]), "bfloat16")
    layer = packed_layers(model)["model.layers.0.mlp.up_proj"]
    layer.codes.data = layer.codes.data.float()  # what prepare_model_for_kbit_training does
    with pytest.raises(DtypeError, match="codes were converted to torch.float32"):
        model(torch.arange(8)[None])
    with pytest.raises(DtypeError, match="expected one of uint8, float16, bfloat16, float32"):
        convert_storage_(quantized(METHODS["nf4"]), torch.int32)


def test_tied_layers_stay_tied():
    layer = quantized(METHODS["nf4"]).model.layers[0].mlp.up_proj
    from quantal import PackedLinear

    pair = nn.ModuleList(
        [layer, PackedLinear.from_packed(layer._spec, layer.codes, layer.stats, layer.shared)]
    )
    convert_storage_(pair, torch.bfloat16)
    assert pair[0].codes is pair[1].codes and pair[0].stats is pair[1].stats


def _flat_views(rank: int, world: int) -> list:
    """FSDP2 over views, as torch 2.11 needs it."""
    out = []
    for name in ("nf4", "quanto4", "mxfp4"):
        model = adapted(FORMS[name])
        plant_nans(model)
        before = whole_bytes(model)
        convert_storage_(model, torch.bfloat16)
        shard_model(model, mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        verify_gathers(model)
        train(model, rank, world, 2)
        out.append(same_bytes(before, whole_bytes(model)))
    return out


def test_views_survive_fully_shard():
    for result in run_ranks(3, _flat_views):
        assert result == [True] * 3


# ---------------------------------------------------------------------- FSDP1


def _fsdp1(rank: int, world: int) -> dict:
    out = {}
    for name in ("nf4", "hqq4", "quanto4", "int8"):
        for dora in (False, True):
            for original in (True, False):
                for adapters in (torch.bfloat16, torch.float32):
                    model = adapted(METHODS[name], dora).to(torch.bfloat16)
                    plant_nans(model)
                    before = whole_bytes(model)
                    convert_storage_(model, torch.bfloat16)
                    for p in model.parameters():
                        if p.requires_grad:
                            p.data = p.data.to(adapters)
                    verify_gathers(model)
                    model = FullyShardedDataParallel(
                        model,
                        auto_wrap_policy=wrap_policy(model),
                        use_orig_params=original,
                        device_id=torch.device("cpu"),
                        mixed_precision=MixedPrecision(
                            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
                        ),
                    )
                    losses = train(model, rank, world, 3)
                    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
                        same = same_bytes(before, whole_bytes(model))
                    out[name, dora, original, adapters] = same and losses[-1] < losses[0]
    return out


def test_fsdp1_keeps_bytes_and_trains():
    """Views in bfloat16, adapters in units of their own in either dtype, both kinds of parameters;
    DoRA too."""
    for result in run_ranks(2, _fsdp1, timeout=300.0):
        assert {k for k, v in result.items() if not v} == set()


def test_wrap_policy_refuses_what_fsdp1_cannot_flatten():
    with pytest.raises(ConfigError, match="convert_storage_"):
        wrap_policy(quantized(METHODS["nf4"]))
    with pytest.raises(ConfigError, match="no decoder blocks"):
        wrap_policy(nn.Linear(2, 2))
    model = convert_storage_(quantized(METHODS["nf4"]), torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    with pytest.raises(ConfigError, match="trains bias"):
        wrap_policy(model)


def _other_dtype(rank: int, world: int) -> str:
    model = convert_storage_(quantized(nf4()).to(torch.float16), torch.float16)
    model.requires_grad_(False)
    model = FullyShardedDataParallel(
        model,
        auto_wrap_policy=wrap_policy(model),
        device_id=torch.device("cpu"),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16),
    )
    try:
        model(torch.arange(8)[None])
    except DtypeError as error:
        return str(error)
    return "no error"


def test_fsdp1_that_casts_views_is_an_error():
    for text in run_ranks(2, _other_dtype):
        assert "were converted to torch.bfloat16" in text and "param_dtype" in text
