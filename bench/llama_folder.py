"""Writes a Llama-shaped folder of random bfloat16 weights, as large as asked for.

    python bench/llama_folder.py FOLDER [--shape 7b] [--layers 32]

Weights are normal numbers of standard deviation 0.02, drawn once (8 million of them) and repeated
with a shift, so that writing is as fast as the disk. Nothing larger is held in memory.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import struct

import torch

SHAPES = {
    "tiny": dict(hidden=256, inter=688, heads=8, kv=8, vocab=1000, layers=4),
    "7b": dict(hidden=4096, inter=11008, heads=32, kv=32, vocab=32000, layers=32),
    "70b": dict(hidden=8192, inter=28672, heads=64, kv=8, vocab=32000, layers=80),
}
POOL = 1 << 23
FILE_BYTES = 5_000_000_000


def tensors(s: dict) -> list[tuple[str, list[int]]]:
    hidden, inter = s["hidden"], s["inter"]
    kv = hidden // s["heads"] * s["kv"]
    out = [("model.embed_tokens.weight", [s["vocab"], hidden])]
    for i in range(s["layers"]):
        block = f"model.layers.{i}."
        out += [
            (block + "self_attn.q_proj.weight", [hidden, hidden]),
            (block + "self_attn.k_proj.weight", [kv, hidden]),
            (block + "self_attn.v_proj.weight", [kv, hidden]),
            (block + "self_attn.o_proj.weight", [hidden, hidden]),
            (block + "mlp.gate_proj.weight", [inter, hidden]),
            (block + "mlp.up_proj.weight", [inter, hidden]),
            (block + "mlp.down_proj.weight", [hidden, inter]),
            (block + "input_layernorm.weight", [hidden]),
            (block + "post_attention_layernorm.weight", [hidden]),
        ]
    return [*out, ("model.norm.weight", [hidden]), ("lm_head.weight", [s["vocab"], hidden])]


def config(s: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": s["hidden"],
        "intermediate_size": s["inter"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv"],
        "vocab_size": s["vocab"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def numel(shape: list[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def write_file(path: pathlib.Path, part: list[tuple[str, list[int]]], pool: memoryview) -> None:
    header, at = {}, 0
    for name, shape in part:
        size = 2 * numel(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (_, shape) in enumerate(part):
            left, start = 2 * numel(shape), 2 * ((i * 7919) % POOL)
            while left:
                piece = pool[start : start + min(left, len(pool) - start)]
                file.write(piece)
                left, start = left - len(piece), 0


def write(folder: pathlib.Path, shape: str, layers: int = 0) -> None:
    sizes = dict(SHAPES[shape])
    sizes["layers"] = layers or sizes["layers"]
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    normal = 0.02 * torch.randn(POOL, generator=generator)
    pool = memoryview(normal.to(torch.bfloat16).view(torch.uint8).numpy())
    files: list[list] = [[]]
    size = 0
    for name, dims in tensors(sizes):
        if size and size + 2 * numel(dims) > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append((name, dims))
        size += 2 * numel(dims)
    weight_map = {}
    for i, part in enumerate(files, 1):
        name = f"model-{i:05}-of-{len(files):05}.safetensors"
        write_file(folder / name, part, pool)
        weight_map.update({tensor: name for tensor, _ in part})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(sizes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, default=0, help="fewer blocks than the shape has")
    args = parser.parse_args()
    write(args.folder, args.shape, args.layers)


if __name__ == "__main__":
    main()
