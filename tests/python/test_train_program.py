"""The training program: runs, is killed, goes on with other numbers of ranks, names errors."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import quantal
from fsdp_support import lora_calls
from qlora_support import METHODS
from quantal import _core
from quantal_train import cli, data
from quantal_train.monitor import Monitor, read_lines
from quantal_train.run import run as run_program
from ranks import Ranks

WORDS = "the cat sat on a mat and saw that dog run far into one big green field".split()
LENGTH = 32


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and an end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<end>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>",
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer and text."""
    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=260, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    lines = []
    for _ in range(120):
        picked = torch.randint(0, len(WORDS), (10,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(WORDS[i] for i in picked)}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return folder


def flags(place, output, *more) -> list[str]:
    """Those of all runs: 12 rows a step."""
    given = f"--model {place}/model --data {place}/data.jsonl --output_dir {output} --quantize hqq"
    given += " --q_group_size 32 --precision fp32 --global_batch 12 --lora_rank 4 --lr 1e-2"
    given += f" --context_length {LENGTH} --max_steps 8 --save_steps 3 --threads 1 --no_plots"
    return given.split() + [str(m) for m in more]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _rank(rank, world, port, arguments):
    """One rank, as torchrun starts it."""
    if world:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
            MASTER_ADDR="localhost", MASTER_PORT=str(port),
        )  # fmt: skip
    run_program(cli.parse(arguments))


class Program:
    """Ranks of the program; a process group of their own."""

    def __init__(self, ranks: int, arguments: list[str]) -> None:
        port, count = free_port(), max(1, ranks)
        self.ranks = [Ranks(0, _as_rank, r, ranks, port, arguments) for r in range(count)]

    def join(self, seconds: float = 900) -> list:
        return [r.join(seconds)[0] for r in self.ranks]

    def kill(self, number: int = signal.SIGKILL, only: int | None = None) -> None:
        for index, r in enumerate(self.ranks):
            if only in (None, index):
                r.kill(0, number)


def _as_rank(_rank_of_test, _world_of_test, rank, world, port, arguments):
    return _rank(rank, world, port, arguments)


def run(ranks: int, arguments: list[str]) -> None:
    found = Program(ranks, arguments).join()
    assert [kind for kind, _ in found] == ["value"] * max(1, ranks), found


def wait_for_step(output, step: int) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        path = output / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in read_lines(str(path))):
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}")


def adapter(output) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def distance(a, b) -> float:
    """Largest relative distance of an adapter's product B A."""
    worst = 0.0
    for name in a:
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            one, two = a[other] @ a[name], b[other] @ b[name]
            worst = max(worst, float((one - two).norm() / one.norm()))
    return worst


def losses(output) -> list[float]:
    return [line["loss"] for line in read_lines(str(output / "metrics.jsonl")) if "loss" in line]


@pytest.fixture(scope="module")
def uninterrupted(place):
    run(2, flags(place, place / "whole"))
    return place / "whole"


def test_a_run_leaves_what_it_promises(place, uninterrupted):
    assert sorted(os.listdir(uninterrupted)) == [
        "adapter", "args.json", "checkpoints", "metrics.jsonl",
    ]  # fmt: skip
    lines = read_lines(str(uninterrupted / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 9))
    found = losses(uninterrupted)
    assert found[-1] < 0.95 * found[0]
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_bytes"} <= lines[0].keys()
    assert sorted(os.listdir(uninterrupted / "checkpoints")) == [
        "base.json", "latest", "step-00000003", "step-00000006", "step-00000008",
    ]  # fmt: skip


#: Other numbers of ranks add 12 gradients in another order: 2^-24 of their size each, and AdamW
#: divides by their root mean square, so that elements near zero move by up to the learning rate.
#: Measured: 2e-6 after 8 steps.
BOUND = 1e-4


@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_killed_and_gone_on_with_other_ranks(place, uninterrupted, tmp_path, ranks):
    program = Program(2, flags(place, tmp_path))
    wait_for_step(tmp_path, 5)
    program.kill()
    assert all(kind == "died" for kind, _ in program.join())
    run(ranks, flags(place, tmp_path))
    assert [line["step"] for line in read_lines(str(tmp_path / "metrics.jsonl"))] == list(
        range(1, 9)
    )
    assert distance(adapter(uninterrupted), adapter(tmp_path)) < BOUND
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=1e-5)


def test_same_ranks_give_the_same_bytes(place, uninterrupted, tmp_path):
    program = Program(2, flags(place, tmp_path))
    wait_for_step(tmp_path, 4)
    program.kill()
    program.join()
    run(2, flags(place, tmp_path))
    a, b = adapter(uninterrupted), adapter(tmp_path)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert losses(tmp_path) == losses(uninterrupted)


def test_first_losses_do_not_depend_on_ranks(place, uninterrupted, tmp_path):
    """Equal weights give equal bits, dropout included."""
    run(3, flags(place, tmp_path, "--max_steps", 8, "--save_steps", 0))
    assert losses(tmp_path)[0] == losses(uninterrupted)[0]


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_the_others_say_that_a_rank_is_gone(place, tmp_path, how):
    more = ("--timeout", 10, "--max_steps", 100000)
    program = Program(3, flags(place, tmp_path, *more))
    wait_for_step(tmp_path, 4)
    program.kill(getattr(signal, how), only=1)
    found = [r.join(300)[0] for i, r in enumerate(program.ranks) if i != 1]
    program.kill(signal.SIGKILL, only=1)
    for (kind, error), rank in zip(found, (0, 2), strict=True):
        assert kind == "error" and isinstance(error, quantal.QuantalError), (kind, error)
        assert "another rank ended" in str(error) and f"rank {rank} of 3" in str(error)
    run(2, flags(place, tmp_path, "--max_steps", 8))  # goes on, or is past it


def test_sigterm_saves_and_stops(place, tmp_path):
    program = Program(2, flags(place, tmp_path, "--max_steps", 100000, "--save_steps", 0))
    wait_for_step(tmp_path, 2)
    program.kill(signal.SIGTERM, only=0)
    assert [kind for kind, _ in program.join(300)] == ["value", "value"]
    (name,) = [n for n in os.listdir(tmp_path / "checkpoints") if n.startswith("step-")]
    assert int(name.removeprefix("step-")) == max(
        line["step"] for line in read_lines(str(tmp_path / "metrics.jsonl"))
    )
    assert not (tmp_path / "adapter").exists()


# ---------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    "more",
    [
        "--train_type dora --lora_dropout 0",
        "--sharding_strategy ddp",
        "--sharding_strategy shard_grad_op",
        "--gradient_checkpointing reentrant --use_activation_cpu_offload",
        "--gradient_checkpointing none",
        "--use_cpu_offload",
        "--loss_chunk 0",
        "--precision bf16",
        "--precision bf16_autocast --optimizer sgd",
        "--precision fp16_autocast",
        "--packing none --batch_size 2 --eval_fraction 0.1 --eval_steps 1",
        "--sample_steps 1 --sample_tokens 4 --lr_scheduler linear --warmup_steps 1",
        "--quantize none --train_type lora --optimizer adam --grad_norm 0 --wd 0.1",
        "--optimizer adadelta --lora_target_modules q_proj,v_proj --sync_save",
    ],
)
def test_modes(place, tmp_path, more):
    run(2, flags(place, tmp_path, "--max_steps", 2, *more.split()))
    found = losses(tmp_path)
    assert len(found) == 2 and all(4 < loss < 7 for loss in found)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_modes_that_change_memory_alone_change_no_loss(place, tmp_path):
    expected = None
    for number, more in enumerate(
        ["", "--sharding_strategy ddp", "--gradient_checkpointing none", "--use_cpu_offload"]
    ):
        run(2, flags(place, tmp_path / str(number), "--max_steps", 3, *more.split()))
        found = losses(tmp_path / str(number))
        expected = expected or found
        assert found == pytest.approx(expected, rel=1e-5), more


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_attention_is_chosen_and_kept(place, tmp_path, precision):
    """By the rule, for the type that queries have; documents share rows, so masks are in play."""
    refusal = _core.attention_gain_refusal(
        4, 2, 16, {"fp32": "f32"}.get(precision, precision), True
    )
    expected = {"auto": f"sdpa ({refusal})" if refusal else "quantal", "sdpa": "sdpa"}
    found = []
    for name in expected:
        more = "--max_steps", 2, "--precision", precision, "--attn_implementation", name
        run(0, flags(place, tmp_path / name, *more))
        kept = json.loads((tmp_path / name / "args.json").read_text())
        assert (kept["attn_implementation"], kept["attention"]) == (name, expected[name])
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def _counted_rank(_rank_of_test, _world_of_test, rank, world, port, arguments):
    with lora_calls() as calls:
        _rank(rank, world, port, arguments)
    return len(calls), set(calls)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "bf16_autocast"])
def test_lora_is_done_in_one_step(place, tmp_path, precision):
    """On sharded models too, in training, evaluation and sampling."""
    more = "--precision", precision, "--max_steps", 2, "--eval_fraction", 0.1, "--sample_steps", 2
    port, arguments = free_port(), flags(place, tmp_path, *more)
    ranks = [Ranks(0, _counted_rank, r, 2, port, arguments) for r in range(2)]
    for kind, (count, ways) in [r.join()[0] for r in ranks]:
        assert kind == "value" and count > 0 and ways == {True}


def test_each_dialect(place, tmp_path):
    """The base of every dialect trains; a quantized folder is taken as it is."""
    for name in ("bnb_nf4", "bnb_int8", "mlx_int4", "quanto_int4"):
        out = tmp_path / name
        run(0, flags(place, out, "--quantize", name, "--max_steps", 2, "--q_group_size", 32))
        assert losses(out)[1] < losses(out)[0] * 1.02
    from quantal import create_quantization_adapter

    model = LlamaForCausalLM.from_pretrained(place / "model")
    packed = create_quantization_adapter("cpu", METHODS["mlx4"]).quantize_model(model)
    quantal.save_model(packed, tmp_path / "packed", tokenizer=make_tokenizer())
    given = flags(place, tmp_path / "out", "--max_steps", 2, "--quantize", "none")
    run(0, [str(tmp_path / "packed") if a == f"{place}/model" else a for a in given])
    base = json.loads((tmp_path / "out" / "adapter" / "quantal_base.json").read_text())
    assert "mlx 4-bit" in base["tensors"]["model.layers.0.mlp.up_proj.weight"]["codec"]


def test_by_torchrun(place, tmp_path):
    """As a user starts it; the figure is drawn, the adapter loads in PEFT."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    arguments = [a for a in flags(place, tmp_path) if a != "--no_plots"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), os.path.join(root, "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 rows = 2 ranks x 6 x 1" in done.stdout and "adapter: " in done.stdout
    assert "tok/s" in done.stderr and "8/8" in done.stderr
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_dry_run_prints_the_plan(place, tmp_path, capfd):
    from quantal_train.dry_run import make_plan

    given = flags(place, tmp_path, "--dry-run", "--ranks", 2, "--memory_gb", 1)
    ((kind, error),) = Program(0, given).join()
    assert kind == "value", error
    args = cli.parse(given)
    args.precision = "fp32"
    plan = make_plan(args, 2, "cpu")
    assert capfd.readouterr().out.strip() == plan.to_text().strip()
    assert (
        plan.fits and "hqq 4-bit" in plan.to_text() and not tmp_path.joinpath("args.json").exists()
    )
    trained = 4 * sum(64 + n for n in (64, 32, 32, 64, 128, 128)) + 4 * (128 + 64)
    assert plan.adapter_parameters == 2 * trained


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = cli.parse(["--model", "m", "--data", "d", "--output_dir", str(tmp_path)])
    monitor = Monitor(args, True, 0, 1)
    monitor.step(1, {"loss": 2.0, "tokens": 10, "seconds": 1.0, "peak_bytes": 1e9})
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == [2.0]


# ---------------------------------------------------------------------- data


def test_packed_documents_do_not_see_each_other():
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    first, second = list(range(10, 17)), list(range(30, 39))
    documents = data.Documents([(first, first), (second, second)])
    (row,) = data.packed_rows(documents, 16)
    assert row.positions == [*range(7), *range(9)]
    assert row.labels[0] == row.labels[7] == -100 and row.labels[8:] == second[1:]
    batch = data.collate([row], 0, torch.device("cpu"))
    whole = quantal.token_losses(model, **batch)[0]
    for begin, document in ((0, first), (7, second)):
        ids = torch.tensor([document])
        alone = quantal.token_losses(model, ids, ids)[0]
        found = whole[begin : begin + len(document)]
        assert torch.allclose(found[:-1], alone[:-1], rtol=1e-4, atol=1e-5)
        assert found[-1] == 0


def test_padding_changes_nothing():
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    items = [(list(range(5, 12)), list(range(5, 12))), (list(range(20, 40)), list(range(20, 40)))]
    rows = data.document_rows(data.Documents(items), 16)
    assert [len(r.ids) for r in rows] == [7, 16]
    both = quantal.token_losses(model, **data.collate(rows, 0, torch.device("cpu")))
    for row, found in zip(rows, both, strict=True):
        ids = torch.tensor([row.ids])
        alone = quantal.token_losses(model, ids, ids)[0]
        assert torch.allclose(found[: len(row.ids)], alone, rtol=1e-4, atol=1e-5)
    assert data.predicted_tokens(rows) == 6 + 15


def test_what_the_loss_is_on(tmp_path):
    tokenizer = make_tokenizer()
    lines = [
        {"text": "ab"},
        {"prompt": "ab", "completion": "cd"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yz"}]},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    text, completion, chat = data.read_documents([str(path)], tokenizer).items
    end = tokenizer.eos_token_id
    assert text[0] == text[1] and text[0][-1] == end and len(text[0]) == 3
    assert completion[1][:2] == [-100, -100] and completion[1][2:] == completion[0][2:]
    spoken = [i for i, y in zip(*chat, strict=True) if y != -100]
    assert tokenizer.decode(spoken) == "<assistant>yz\n"
    (tmp_path / "plain.txt").write_text("ab")
    assert data.read_documents([str(tmp_path / "plain.txt")], tokenizer).items == [text]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\n{"text"', "line 2 is no JSON"),
        (b"[1]\n", "line 1 is a list, expected an object"),
        (b'{"txt": "a"}\n', "keys are txt, expected text, or prompt and completion, or messages"),
        (b'{"text": 5}\n', "keys are text, expected text, or prompt"),
        (b"\xff\xfe", "is no UTF-8 at byte 0"),
    ],
)
def test_bad_data(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(quantal.CorruptError, match=message):
        data.read_documents([str(path)], make_tokenizer())
    with pytest.raises(quantal.IoError, match="cannot read .*none.txt"):
        data.read_documents([str(tmp_path / "none.txt")], make_tokenizer())


def test_order_covers_every_row_each_epoch():
    order = data.Order(10, 3)
    epochs = [[order[i] for i in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] and [order[i] for i in range(10)] == epochs[0]
    assert [data.Order(10, 4)[i] for i in range(10)] != epochs[0]


# ---------------------------------------------------------------------- wrong flags


@pytest.mark.parametrize(
    "more, message",
    [
        ("--global_batch 7 --batch_size 2", "--global_batch is 7, expected a multiple of 2"),
        ("--gradient_accumulation_steps 5", "expected 12 .--global_batch 12"),
        ("--quantize none", "--train_type is qlora and the base is dense"),
        ("--lora_target_modules nothing", "--lora_target_modules is nothing: "),
        ("--context_length 5000000", "make no row of 5000000 tokens"),
        ("--use_activation_cpu_offload", "expected reentrant or none"),
        ("--sharding_strategy ddp --use_cpu_offload", "--use_cpu_offload needs sharding"),
        ("--device cuda", "--device is cuda, expected cpu"),
        ("--tokenizer /nowhere", "/nowhere is no folder or GGUF file"),
        ("--model /nowhere/model --tokenizer", "/nowhere/model"),
        ("--tensorboard on", "tensorboard is not installed"),
    ],
)
def test_what_does_not_fit(place, tmp_path, more, message):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("has CUDA")
    if "tensorboard" in more and importlib.util.find_spec("tensorboard"):
        pytest.skip("has tensorboard")
    words = more.split()
    if words[-1] == "--tokenizer":
        words.append(f"{place}/model")
    ((kind, error),) = Program(0, flags(place, tmp_path, *words)).join()
    assert kind == "error" and isinstance(error, quantal.QuantalError | OSError), (kind, error)
    assert message.replace("expected 12 .", "expected 12 (") in str(error)


@pytest.mark.parametrize(
    "more, message",
    [
        ("--lr -1", "--lr is -1.0, expected at least 0"),
        ("--eval_fraction 0.9", "--eval_fraction is 0.9, expected 0 to 0.5"),
        ("--lora_dropout 1", "--lora_dropout is 1.0, expected 0 to below 1"),
        ("--quantize int3", "invalid choice: 'int3'"),
        ("--lr nan", "--lr is nan"),
    ],
)
def test_wrong_values_end_the_program(capsys, more, message):
    with pytest.raises(SystemExit) as end:
        cli.parse(["--model", "m", "--data", "d", *more.split()])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        ("--lora_rank 8", "float32 [4, 64], expected float32 [8, 64]"),
        ("--seed 1", "resume: seed is 1, expected 42"),
        ("--global_batch 6", "resume: global_batch is 6, expected 12"),
        ("--context_length 16", "resume: context_length is 16, expected 32"),
        ("--q_bits 8", "same model, other codec"),
        ("--quantize mlx_int4", "same model, other codec"),
        ("--resume none", "--resume is none and"),
    ],
)
def test_another_run_does_not_go_on(place, uninterrupted, more, message):
    given = flags(place, uninterrupted, "--max_steps", 9, *more.split())
    ((kind, error),) = Program(0, given).join()
    assert kind == "error" and message in str(error), error
    assert len(losses(uninterrupted)) == 8  # nothing was changed


def test_help_names_every_flag():
    text = cli.make_parser().format_help()
    for name in ("--quantize", "--q_bits", "--q_group_size", "--q_compute_dtype",
                 "--q_skip_modules", "--q_double_quant", "--resume", "--dry-run"):  # fmt: skip
        assert name in text
    assert "(default: 64)" in text and "None" not in text
    done = subprocess.run(
        [sys.executable, "-m", "quantal_train", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--gradient_checkpointing" in done.stdout
