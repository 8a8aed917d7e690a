"""GGUF files as models and tokenizers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import quantal
from conftest import GOLDEN, tiny_llama
from gguf_writer import write_gguf
from quantal import CorruptError, UnsupportedError
from quantal.gguf import make_tokenizer

IDS = torch.tensor([[1, 5, 200, 37, 99, 255, 0, 64, 128, 3, 77, 11]])
TINY = GOLDEN / "checkpoints" / "gguf"


@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_golden_files_give_the_golden_logits(name):
    with pytest.warns(UserWarning, match="without a tokenizer"):  # SentencePiece
        model, tokenizer = quantal.load_gguf(TINY / f"tiny-{name}.gguf")
    assert tokenizer is None
    golden = load_file(GOLDEN / "vectors" / "checkpoint_logits.safetensors")
    key = f"gguf/tiny-{name}.gguf"
    torch.testing.assert_close(model(IDS).logits[0], golden[key], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_dtype_of_the_weights():
    model, _ = quantal.load_gguf(TINY / "tiny-q4_1.gguf", "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------- tokenizer

TEXT = "def f(x):\n    return 2026 + x  # naïve café ☕\n"


def byte_level_facts(pre="smollm") -> dict:
    """A byte-level vocabulary of 3 special tokens, 256 bytes and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges = ["r e", "t u", "re tu", "r n", "retu rn", "Ġ retu", "2 0"]
    tokens = ["<|end|>", "<|start|>", "<user>", *alphabet]
    tokens += [m.replace(" ", "") for m in merges]
    kinds = [3, 3, 4] + [1] * (len(tokens) - 3)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "chat_template": "{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}",
    }


def test_tokenizer_round_trip_and_digits():
    tokenizer = make_tokenizer(byte_level_facts())
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert "retu" in "".join(pieces) and "20" not in pieces  # digits stand alone
    assert "20" in make_tokenizer(byte_level_facts("gpt-2")).tokenize("2026")


def test_special_tokens_and_chat_template():
    tokenizer = make_tokenizer(byte_level_facts())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
    ids = tokenizer("a<|start|>b<user>c")["input_ids"]
    assert ids[1] == 1 and ids[3] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<user>c"
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|start|>hi"


def test_unknown_tokenizers_are_refused():
    with pytest.raises(UnsupportedError, match="pre-tokenizer"):
        make_tokenizer(byte_level_facts("tekken"))
    with pytest.raises(UnsupportedError, match="gpt2"):
        make_tokenizer({**byte_level_facts(), "model": "llama"})
    with pytest.raises(CorruptError, match="bos_token_id"):
        make_tokenizer({**byte_level_facts(), "bos_token_id": 10**6})
    assert make_tokenizer({}) is None


# ---------------------------------------------------------------------- whole files


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face order of rotary rows to that of GGUF."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write_model(path, model, **changes):
    """The tiny model as GGUF; `changes` replaces metadata and, by "tensor:", tensors."""
    c = model.config
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tensors = {}
    for name, p in model.named_parameters():
        value = p.detach()
        if "q_proj" in name:
            value = permute(value, c.num_attention_heads)
        if "k_proj" in name:
            value = permute(value, c.num_key_value_heads)
        name = name.replace("model.layers.", "blk.")
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = value.numpy()
    facts = byte_level_facts()
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "llama.rope.freq_base": float(c.rope_theta),
        "llama.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": facts["model"],
        "tokenizer.ggml.pre": facts["pre"],
        "tokenizer.ggml.tokens": facts["tokens"],
        "tokenizer.ggml.token_type": facts["token_type"],
        "tokenizer.ggml.merges": facts["merges"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": facts["chat_template"],
    }
    metadata.update({k: v for k, v in changes.items() if not k.startswith("tensor:")})
    for key, value in changes.items():
        name = key.removeprefix("tensor:")
        if key.startswith("tensor:") and value is None:
            del tensors[name]
        elif key.startswith("tensor:"):
            tensors[name] = value
    write_gguf(path, metadata, tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_a_written_model_comes_back_bit_for_bit(tied, tmp_path, tokens):
    model = tiny_llama(tied=tied)
    write_model(tmp_path / "m.gguf", model)
    loaded, tokenizer = quantal.load_gguf(tmp_path / "m.gguf")
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    model = tiny_llama()
    path = tmp_path / "m.gguf"
    cases = {
        "norm.weight": {"tensor:output_norm.weight": None},
        "extra": {"tensor:blk.0.extra.weight": np.zeros(4)},
        "o_proj": {"tensor:blk.0.attn_output.weight": np.zeros((32, 64))},
        "blk.0.ffn_up.weight": {"tensor:blk.0.ffn_up.weight": np.zeros((64, 64))},
    }
    for named, changes in cases.items():
        write_model(path, model, **changes)
        with pytest.raises(quantal.QuantalError, match=named) as error:
            quantal.load_gguf(path)
        assert error.value.path == str(path)


@pytest.mark.parametrize(
    "key", ["block_count", "embedding_length", "attention.head_count", "attention.head_count_kv"]
)
def test_sizes_that_the_tensors_contradict_are_refused(key, tmp_path):
    for value in (1, 2**31):
        write_model(tmp_path / "m.gguf", tiny_llama(), **{f"llama.{key}": value})
        with pytest.raises(quantal.QuantalError) as error:
            quantal.load_gguf(tmp_path / "m.gguf")
        assert error.value.path == str(tmp_path / "m.gguf")


def test_inspect_describes_a_file():
    text = quantal.inspect(TINY / "tiny-q4_0.gguf")
    assert "llama" in text and "Q4_0" in text
    from quantal import _core

    assert json.loads(_core.inspect_json(str(TINY / "tiny-q4_0.gguf")))
