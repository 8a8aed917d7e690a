"""attn_implementation="quantal" in transformers' own models beside "sdpa": no further from float32
than sdpa is in bfloat16, in reading, generating, training, with padding and with other families."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

import quantal

#: Largest error beside that of sdpa, both from float32.
NO_WORSE = 1.2


def smol(layers: int = 4) -> LlamaConfig:
    """SmolLM2-135M with fewer layers and tokens."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=512,
        tie_word_embeddings=True,
        rope_theta=100000,
    )


def sides(config):
    """(float32 with sdpa, bfloat16 with sdpa, bfloat16 with quantal), one model."""
    torch.manual_seed(1)
    narrow = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    exact = copy.deepcopy(narrow).float()
    ours = copy.deepcopy(narrow)
    ours.set_attn_implementation("quantal")
    assert ours.config._attn_implementation == "quantal"
    return exact, narrow, ours


def tokens(batch: int, length: int, vocabulary: int = 500, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check_no_worse(exact, theirs, ours):
    assert distance(ours, exact) <= NO_WORSE * distance(theirs, exact), (
        distance(ours, exact),
        distance(theirs, exact),
    )


@pytest.mark.parametrize("shape", [(1, 7), (2, 64), (3, 131)], ids=str)
@torch.no_grad()
def test_logits(shape):
    ids = tokens(*shape)
    check_no_worse(*(model(ids).logits for model in sides(smol())))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing):
    ids = tokens(2, 96)
    grads = []
    for model in sides(smol()):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        projections = [p for name, p in model.named_parameters() if "_proj" in name]
        grads.append(torch.cat([p.grad.float().flatten() for p in projections]))
    check_no_worse(*grads)


@torch.no_grad()
def test_a_prompt_in_parts():
    """Queries behind a cache see all of it: sdpa gets a mask, quantal the same one."""
    logits = []
    for model in sides(smol()):
        first = model(tokens(2, 40), use_cache=True)
        more = model(tokens(2, 9, seed=4), past_key_values=first.past_key_values, use_cache=True)
        one = model(tokens(2, 1, seed=5), past_key_values=more.past_key_values)
        logits.append(torch.cat([more.logits, one.logits], 1))
    check_no_worse(*logits)


SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 128}
FAMILIES = {
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=32, sliding_window=16),
    "gpt2": lambda: GPT2Config(n_embd=128, n_head=4, n_layer=2, vocab_size=512),
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, head_dim=32, sliding_window=16),
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=128),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=32),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_padded_texts_of_other_families(name):
    """In float32, padded on the left: the tokens of sdpa."""
    torch.manual_seed(3)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[name](), attn_implementation="sdpa").eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("quantal")
    ids = tokens(3, 21)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, :1] = 0
    texts = [
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        for model in (theirs, ours)
    ]
    assert torch.equal(*texts)
    assert ours.config._attn_implementation == "quantal"


@torch.no_grad()
def test_smollm2(smollm2):
    """The real model, loaded by quantal, generates the text of sdpa in float32."""
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    texts = []
    for name in ("sdpa", "quantal"):
        model = quantal.load_model(smollm2, attn_implementation=name).float()
        assert model.config._attn_implementation == name
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
        )
        texts.append(text)
    assert torch.equal(*texts)
