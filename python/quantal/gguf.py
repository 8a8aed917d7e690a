"""GGUF files as transformers models and tokenizers."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import nn

from . import _check, _core
from ._dtypes import bytes_of, dtype_name, parse_dtype
from ._errors import CorruptError, UnsupportedError
from ._loading import assign_tensor, dtype_keyword, parameters_on_meta

#: Values of tokenizer.ggml.token_type.
_CONTROL, _USER = 3, 4


@_check.arguments(path=_check.source, dtype=_check.dtype)
def load_gguf(
    path: str | os.PathLike, dtype: torch.dtype | str = torch.float32
) -> tuple[nn.Module, Any]:
    """``(LlamaForCausalLM, tokenizer)`` from a GGUF file of the llama architecture.

    Quantized tensors are decoded to `dtype` one at a time, straight into the model, so memory holds
    one copy. The tokenizer is None, with a warning, where its kind is not byte-level BPE. Raises
    IoError, CorruptError or UnsupportedError with the path.
    """
    dtype = parse_dtype(dtype)
    source = _core.ModelSource.open(os.fspath(path))
    model = _load_model(source, dtype, os.fspath(path))
    try:
        tokenizer = make_tokenizer(json.loads(source.tokenizer_json))
    except UnsupportedError as error:
        _check.warn(f"{error}; the model is loaded without a tokenizer")
        tokenizer = None
    return model, tokenizer


def _load_model(source: _core.ModelSource, dtype: torch.dtype, path: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(source.config_json)
    if "model_type" not in values:
        raise UnsupportedError(
            f"load_gguf: file is no GGUF model, expected one (quantal.load_model reads other "
            f"kinds) (file={path})",
            path,
        )
    values.pop("torch_dtype", None)  # that of the file; the caller's counts
    config = AutoConfig.for_model(**{**values, **dtype_keyword(dtype)})
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config)
    expected = model.state_dict(keep_vars=True)
    for name, shape, _, _ in source.tensors:
        if name not in expected:
            raise CorruptError(
                f"load_gguf: file has a tensor that the model lacks (file={path}, tensor={name})",
                path,
                name,
            )
        if list(expected[name].shape) != shape:
            raise CorruptError(
                f"load_gguf: tensor has shape {shape}, expected {list(expected[name].shape)} "
                f"(file={path}, tensor={name})",
                path,
                name,
            )
        tensor = torch.empty(shape, dtype=dtype)
        source.read(name, dtype_name(dtype), bytes_of(tensor))
        assign_tensor(model, name, tensor)
    model.tie_weights()
    missing = [n for n, t in model.state_dict(keep_vars=True).items() if t.device.type == "meta"]
    if missing:
        raise CorruptError(
            f"load_gguf: {len(missing)} tensors are missing: {', '.join(missing[:8])} "
            f"(file={path})",
            path,
            missing[0],
        )
    return model.eval()


def _pre_tokenizer(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("smollm", "starcoder", "refact", "command-r"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in ("", "default", "gpt-2"):
        return byte_level
    if name == "llama-bpe":
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, plain])
    raise UnsupportedError(
        f'load_gguf: pre-tokenizer is "{name}", expected one of smollm, starcoder, refact, '
        "command-r, gpt-2, default, llama-bpe"
    )


def _token(facts: dict[str, Any], key: str) -> str | None:
    index = facts.get(key)
    tokens = facts["tokens"]
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise CorruptError(f"load_gguf: {key} is {index}, expected 0 to {len(tokens) - 1}")
    return tokens[index]


def make_tokenizer(facts: dict[str, Any]) -> Any:
    """A fast tokenizer from the tokenizer facts of a GGUF; None where the file has none."""
    if not facts.get("tokens"):
        return None
    if facts.get("model") != "gpt2":
        raise UnsupportedError(
            f'load_gguf: tokenizer model is "{facts.get("model")}", expected "gpt2" '
            "(byte-level BPE)"
        )
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = facts["tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in facts.get("merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = _pre_tokenizer(facts.get("pre", ""))
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts.get("token_type", [])
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    special = {
        "bos_token": _token(facts, "bos_token_id"),
        "eos_token": _token(facts, "eos_token_id"),
        "unk_token": _token(facts, "unknown_token_id"),
        "pad_token": _token(facts, "padding_token_id"),
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{k: v for k, v in special.items() if v is not None}
    )
    if facts.get("chat_template"):
        fast.chat_template = facts["chat_template"]
    return fast
