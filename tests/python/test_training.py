"""Training as users run it: preparation, checkpointing, autocast, copies, Trainer. TRL's SFTTrainer
is in conformance/test_sft_trainer.py."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from transformers import Trainer, TrainingArguments

from conftest import hqq, nf4, tiny_llama
from qlora_support import (
    ALL,
    LLM_INT8,
    METHODS,
    gradients,
    lora,
    packed_bytes,
    packed_layers,
    quantized,
    randomize_lora,
    same_bytes,
)
from quantal import (
    QuantizedLinear,
    create_quantization_adapter,
    merge_report,
    prepare_model_for_training,
)


@pytest.fixture(params=list(METHODS))
def method(request):
    return METHODS[request.param]


# ---------------------------------------------------------------------- prepare


def flags(model) -> dict[str, tuple]:
    return {n: (p.requires_grad, p.dtype) for n, p in model.named_parameters()}


def test_prepare_freezes_the_base_and_is_idempotent(tokens):
    model = quantized(nf4())
    adapter = create_quantization_adapter("cpu", nf4())
    assert adapter.prepare_model_for_training(model) is model
    assert model.is_gradient_checkpointing and model.is_loaded_in_4bit
    assert not any(p.requires_grad for p in model.parameters())
    once = flags(model)
    assert adapter.prepare_model_for_training(model) is model
    assert flags(model) == once
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    peft_model = get_peft_model(model, lora(modules_to_save=["lm_head"])).train()
    trained = {n for n, p in peft_model.named_parameters() if p.requires_grad}
    assert len(trained) == 9
    prepare_model_for_training(peft_model)  # adapters that are there stay trainable
    assert {n for n, p in peft_model.named_parameters() if p.requires_grad} == trained
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    assert gradients(peft_model, tokens).keys() == trained


def test_prepare_after_peft_and_transformers_adds_no_second_hook():
    model = quantized(hqq())
    model.enable_input_require_grads()
    prepare_model_for_training(model)
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks
    prepare_model_for_training(model)
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("asked", [False, True])
def test_norms_become_float32_on_request(asked, tokens):
    model = create_quantization_adapter("cpu", hqq()).quantize_model(tiny_llama().bfloat16())
    prepare_model_for_training(model, norms_in_float32=asked)
    norms = {p.dtype for n, p in model.named_parameters() if "norm" in n}
    assert norms == {torch.float32 if asked else torch.bfloat16}
    assert model.model.embed_tokens.weight.dtype is torch.bfloat16
    peft_model = get_peft_model(model, lora()).train()
    assert all(g.isfinite().all() for g in gradients(peft_model, tokens).values())


def test_prepare_takes_any_module():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), hqq())
    model = nn.Sequential(layer, nn.LayerNorm(32).half())
    assert prepare_model_for_training(model, norms_in_float32=True) is model
    assert model[1].weight.dtype is torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert model.is_loaded_in_4bit and not model.is_loaded_in_8bit
    plain = prepare_model_for_training(nn.Linear(3, 3))
    assert not hasattr(plain, "is_loaded_in_4bit") and not plain.weight.requires_grad


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_flags_and_parameter_count_are_those_of_the_weights(name):
    dense = tiny_llama(tied=True)
    total = dense.num_parameters()
    without = dense.num_parameters(exclude_embeddings=True)
    adapter = create_quantization_adapter("cpu", METHODS[name])
    model = prepare_model_for_training(adapter.quantize_model(dense))
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (name == "nf4", name == "int8")
    assert model.num_parameters() == total
    assert model.num_parameters(exclude_embeddings=True) == without
    assert model.num_parameters(only_trainable=True) == 0
    peft_model = get_peft_model(model, lora(r=4))
    adapters = 2 * 4 * ((64 + 64) + (64 + 32))
    assert peft_model.num_parameters(only_trainable=True) == adapters
    total += adapters
    assert pickle.loads(pickle.dumps(model)).num_parameters() == total
    assert copy.deepcopy(model).num_parameters() == total


# ---------------------------------------------------------------------- checkpointing, autocast


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_checkpointing_changes_no_gradient(method, use_reentrant, dora, tokens):
    grads = []
    for checkpointing in (False, True):
        base = prepare_model_for_training(
            quantized(method), checkpointing, use_reentrant=use_reentrant
        )
        assert base.is_gradient_checkpointing == checkpointing
        model = get_peft_model(base, lora(use_dora=dora)).train()
        randomize_lora(model)
        grads.append(gradients(model, tokens))
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == (12 if dora else 8)
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_checkpointed_forward_keeps_no_activation_of_a_block(tokens):
    """Between blocks live their inputs; nothing of the weight's size and nothing inside a block."""
    base = prepare_model_for_training(quantized(nf4(), hidden=64))
    model = get_peft_model(base, lora()).train()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hidden = model.base_model.model.model(tokens).last_hidden_state
    packed = {t.data_ptr() for layer in packed_layers(model).values() for t in (layer.codes,)}
    assert not packed & {t.data_ptr() for t in saved}
    shapes = {tuple(t.shape) for t in saved if t.is_floating_point()}
    assert not any(64 * 128 in (a * b for a, b in zip(s, s[1:], strict=False)) for s in shapes)
    hidden.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_as_a_dense_layer_does(dtype):
    dense = nn.Linear(64, 32)
    layer = QuantizedLinear.from_linear(dense, hqq())
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert y.dtype is dense(x).dtype is dtype
        assert layer(x.double()).dtype is torch.float64
    torch.testing.assert_close(y, layer(x).to(dtype))  # the arithmetic is compute_dtype's
    y.sum().backward()
    expected = layer.dequantize_weights().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_autocast_trains(method, dtype, dora, tokens):
    model = get_peft_model(prepare_model_for_training(quantized(method)), lora(use_dora=dora))
    randomize_lora(model.train())
    exact = gradients(model, tokens)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype is torch.float32
            assert (p.grad - exact[name]).norm() < 0.1 * exact[name].norm() + 1e-4, name


# ---------------------------------------------------------------------- copies, casts, state


def casts(model):
    yield "half", model.half()
    yield "bfloat16", model.bfloat16()
    yield "double", model.double()
    yield "to(dtype)", model.to(torch.float16)
    yield "to(device, dtype)", model.to("cpu", torch.float32)
    yield "float", model.float()


def test_casts_never_change_codes(method, tokens):
    model = get_peft_model(quantized(method), lora()).eval()
    before = packed_bytes(model)
    expected = model(tokens).logits
    for what, cast in casts(model):
        assert same_bytes(packed_bytes(cast), before), what
        if what != "double":
            assert cast(tokens).logits.isfinite().all(), what
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0.05, atol=0.05)


def test_copies_of_a_prepared_peft_model(method, tokens):
    model = get_peft_model(prepare_model_for_training(quantized(method)), lora(use_dora=True))
    randomize_lora(model.eval())
    expected = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bytes(packed_bytes(twin), packed_bytes(model))
        assert torch.equal(twin(tokens).logits, expected)
        assert gradients(twin.train(), tokens).keys() == gradients(model, tokens).keys()
        twin.merge_adapter()
        assert len(merge_report(twin).layers) == 4
    assert not merge_report(model).layers


def test_state_dict_is_strict_in_both_directions(method, tokens):
    model, other = quantized(method), quantized(method)
    for layer in packed_layers(other).values():
        layer.quantize_weights(torch.randn(layer.out_features, layer.in_features))
    state = model.state_dict()
    result = other.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    extra = {**state, "model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(extra, strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in state.items() if not k.endswith("stats")})
    third = quantized(METHODS["hqq4" if method is not METHODS["hqq4"] else "nf4"])
    with pytest.raises(RuntimeError, match="another form"):
        third.load_state_dict(state, strict=True)


# ---------------------------------------------------------------------- LLM.int8


def int8_layer(rows: int = 16, cols: int = 64, seed: int = 0) -> QuantizedLinear:
    torch.manual_seed(seed)
    layer = QuantizedLinear.from_linear(nn.Linear(cols, rows), LLM_INT8)
    assert layer.int8_threshold == 1.5
    return layer


def test_int8_gradient_passes_straight_through():
    layer = int8_layer()
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ layer.dequantize_weights(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, g.sum(0))
    with torch.no_grad():
        assert torch.equal(layer(x), y)  # training sees the forward of inference
    exact = x.detach() @ layer.dequantize_weights().T + layer.bias
    assert 0 < (y - exact).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore:.*double precision.*")
def test_int8_gradcheck_through_the_outlier_columns():
    """Columns with an entry of at least the threshold are multiplied as they are, so there the
    gradient is the true one; the others are constant between two steps of their rounding."""
    layer = int8_layer()
    torch.manual_seed(1)
    base = torch.rand(4, 64) - 0.5
    columns = torch.tensor([3, 17, 40])
    values = (2.5 + torch.rand(4, 3)).requires_grad_()

    def product(v):
        return layer(base.index_copy(1, columns, v))

    assert torch.autograd.gradcheck(product, values, eps=0.25, atol=2e-3, rtol=1e-2)
    assert torch.autograd.gradgradcheck(product, values, eps=0.25, atol=2e-3, rtol=1e-2)

    def rest(v):
        return layer(base.index_copy(1, columns, v - 2.5))  # below the threshold: rounded

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(rest, values, eps=1e-4, atol=2e-3, rtol=1e-2)


# ---------------------------------------------------------------------- trainers


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) * 7 + i % 4) % 256
        return {"input_ids": ids, "labels": ids}


def arguments(tmp_path, **kwargs) -> dict:
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "disable_tqdm": True,
        **kwargs,
    }


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_trains_checkpoints_and_resumes(name, tmp_path, tokens):
    options = {"gradient_checkpointing": name == "nf4", "bf16": name in ("hqq4", "int8")}

    def trainer(folder):
        torch.manual_seed(0)
        base = prepare_model_for_training(quantized(METHODS[name]), name == "nf4")
        model = get_peft_model(base, lora(ALL))
        return Trainer(
            model=model,
            args=TrainingArguments(**arguments(folder, **options)),
            train_dataset=Rows(),
        )

    first = trainer(tmp_path / "a")
    before = packed_bytes(first.model)
    first.train()
    losses = [row["loss"] for row in first.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert same_bytes(packed_bytes(first.model), before)
    checkpoint = tmp_path / "a" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert sum(f.stat().st_size for f in checkpoint.iterdir()) < 200_000  # no base in there
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(checkpoint))
    resumed = dict(again.model.named_parameters())
    for n, p in first.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(resumed[n], p, rtol=1e-5, atol=1e-6)
