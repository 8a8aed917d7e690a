"""The loss by chunks of tokens: the same loss and gradients, never the logits of a batch."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import quantal
from conftest import tiny_llama
from qlora_support import METHODS, lora, quantized, randomize_lora
from quantal import chunked_cross_entropy, chunked_loss, token_losses

#: float32 sums over 64 features in another order: 64 x 2^-24, and a vocabulary of 256 behind it.
BOUND = 2e-5


def batch(ignored: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    if ignored:
        labels[0, 4:9] = -100
        labels[2, :] = -100
    return ids, labels


def loss_and_gradients(model, loss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(a, b) -> None:
    assert torch.allclose(a[0], b[0], rtol=BOUND)
    assert a[1].keys() == b[1].keys() and a[1]
    for name, gradient in a[1].items():
        scale = gradient.abs().max()
        assert (gradient - b[1][name]).abs().max() <= BOUND * scale, name


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["adapters", "everything", "tied"])
def test_loss_and_gradients_are_those_of_the_model(kind, chunk):
    if kind == "adapters":
        model = get_peft_model(quantized(METHODS["nf4"]), lora())
        randomize_lora(model)
    else:
        model = tiny_llama(tied=kind == "tied").requires_grad_(True)
    ids, labels = batch()
    expected = loss_and_gradients(model, model(ids, labels=labels).loss)
    found = loss_and_gradients(model, chunked_loss(model, ids, labels, chunk_tokens=chunk))
    assert_close(expected, found)


def test_packed_output_layer():
    model = tiny_llama()
    model.lm_head = quantal.QuantizedLinear.from_linear(model.lm_head, METHODS["hqq4"])
    ids, labels = batch()
    assert torch.allclose(
        chunked_loss(model, ids, labels, chunk_tokens=5), model(ids, labels=labels).loss, rtol=BOUND
    )


@pytest.mark.parametrize("trained, passes", [(False, 1), (True, 2)])
def test_head_sees_a_chunk_at_a_time(trained, passes):
    model, seen = tiny_llama(), []
    model.lm_head.requires_grad_(trained)
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: seen.append(x[..., 0].numel()) or head(x)
    ids, labels = batch()
    chunked_loss(model, ids, labels, chunk_tokens=10).backward()
    assert max(seen) == 10 and sum(seen) == passes * ids.numel()
    assert model.lm_head.forward(torch.zeros(1, 64)).shape == (1, 256)  # put back


def test_accumulated_steps_weigh_tokens_alike():
    model = tiny_llama().requires_grad_(True)
    ids, labels = batch()
    total = int((labels[:, 1:] != -100).sum())
    whole = loss_and_gradients(model, chunked_loss(model, ids, labels))
    model.zero_grad()
    parts = [
        chunked_loss(model, ids[i : i + 1], labels[i : i + 1], num_items=total) for i in range(3)
    ]
    assert_close(whole, loss_and_gradients(model, sum(parts)))


def test_token_losses_are_in_place():
    model = tiny_llama()
    ids, labels = batch()
    losses = token_losses(model, ids, labels, chunk_tokens=4)
    logits = model(ids).logits
    assert losses.shape == ids.shape and losses.dtype == torch.float32
    assert torch.all(losses[:, -1] == 0) and torch.all(losses[2] == 0)
    one = nn.functional.cross_entropy(logits[0, 0], ids[0, 1])
    assert torch.allclose(losses[0, 0], one, rtol=BOUND)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast(trained):
    torch.manual_seed(1)
    head, hidden = nn.Linear(32, 50).requires_grad_(trained), torch.randn(20, 32)
    labels = torch.arange(20)
    results = []
    for chunk in (20, 6):
        rows = hidden.clone().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = chunked_cross_entropy(rows, head, labels, chunk_tokens=chunk).sum()
        loss.backward()
        results.append((loss.detach(), rows.grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_models_that_change_their_logits_are_refused():
    config = Gemma2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=64,
    )  # fmt: skip
    model, ids = Gemma2ForCausalLM(config), torch.arange(12)[None]
    with pytest.raises(quantal.UnsupportedError, match="soft cap"):
        chunked_loss(model, ids, ids)
    config.final_logit_softcapping = None
    plain = Gemma2ForCausalLM(config).eval()
    assert torch.allclose(chunked_loss(plain, ids, ids), plain(ids, labels=ids).loss, rtol=BOUND)


def test_bad_arguments():
    hidden, head = torch.zeros(2, 3, 4), nn.Linear(4, 5)
    with pytest.raises(quantal.ShapeError, match=r"labels have shape \[3, 2\], expected \[2, 3\]"):
        chunked_cross_entropy(hidden, head, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(quantal.ConfigError, match="chunk_tokens is 0, expected at least 1"):
        chunked_cross_entropy(hidden, head, torch.zeros(2, 3, dtype=torch.int64), chunk_tokens=0)
    with pytest.raises(quantal.UnsupportedError, match="output layer"):
        chunked_loss(nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64))
