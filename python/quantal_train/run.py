"""One run: everything from the flags to the adapter folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

import quantal
from quantal import ConfigError

from . import data, plots
from . import model as models
from .cli import fixed_settings, settle_batches
from .monitor import Monitor, resident_bytes
from .scaler import LossScaler
from .world import World, join, peers


@dataclasses.dataclass
class Run:
    """All that a step needs."""

    args: argparse.Namespace
    world: World
    tokenizer: Any
    rows: list[data.Row]
    held_out: list[data.Row]
    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: LossScaler
    checkpoints: quantal.TrainingCheckpoints
    settings: dict[str, Any]
    steps: int

    @property
    def trained(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id or 0


# ---------------------------------------------------------------------- making it


def make_optimizer(args: argparse.Namespace, model: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    common: dict[str, Any] = {"lr": args.lr, "weight_decay": args.wd}
    if args.optimizer == "sgd":
        return torch.optim.SGD(trained, momentum=0.9, **common)
    if args.optimizer == "adadelta":
        return torch.optim.Adadelta(trained, **common)
    if args.optimizer == "adam":
        return torch.optim.Adam(trained, **common)
    return torch.optim.AdamW(trained, fused=args.optimizer == "fused_adamw" or None, **common)


def load_rows(args: argparse.Namespace, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """(training rows, held-out rows)."""
    make = lambda paths: data.make_rows(  # noqa: E731
        data.read_documents(paths, tokenizer), args.context_length, args.packing
    )
    rows, held_out = data.split_rows(make(args.data), args.eval_fraction)
    if args.eval_data:
        held_out = make(args.eval_data)
    return rows, held_out


def count_steps(args: argparse.Namespace, rows: int) -> int:
    return args.max_steps or max(1, math.ceil(rows * args.num_epochs / args.global_batch))


def build(args: argparse.Namespace, world: World) -> Run:
    from transformers import get_scheduler

    tokenizer = models.load_tokenizer(args)
    rows, held_out = load_rows(args, tokenizer)
    steps = count_steps(args, len(rows))
    model = models.load(args, world)
    if args.compile:
        models.compile_blocks(model)
    base = quantal.base_identity(model, args.model, group=world.group)
    optimizer = make_optimizer(args, model)
    scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=steps
    )
    checkpoints = quantal.TrainingCheckpoints(
        os.path.join(args.output_dir, "checkpoints"),
        base,
        keep_last=args.keep_checkpoints,
        asynchronous=not args.sync_save,
        group=world.group,
    )
    settings = {**fixed_settings(args), "rows": len(rows), "data": data.rows_digest(rows)}
    scaler = LossScaler(args.precision == "fp16_autocast")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    world.say(
        f"{len(rows)} rows of up to {args.context_length} tokens, {len(held_out)} held out; "
        f"{steps} steps of {args.global_batch} rows = {world.size} ranks x "
        f"{args.gradient_accumulation_steps} x {args.micro_batch}; {trained / 1e6:.2f} million "
        f"trained parameters; base {base.digest[:12]}"
    )
    return Run(
        args, world, tokenizer, rows, held_out, model, optimizer, scheduler, scaler, checkpoints,
        settings, steps,
    )  # fmt: skip


def resume(run: Run) -> int:
    """Loads the checkpoint that --resume names; returns the steps that are done."""
    choice = run.args.resume
    latest = run.checkpoints.latest()
    if choice == "none":
        if latest is not None:
            raise ConfigError(
                f"--resume is none and {latest} exists, expected --resume auto or another "
                "--output_dir"
            )
        return 0
    if choice == "auto" and latest is None:
        return 0
    restored = run.checkpoints.load(
        run.model,
        run.optimizer,
        scheduler=run.scheduler,
        scaler=run.scaler,
        path=None if choice == "auto" else choice,
    )
    for name, value in restored.settings.items():
        if run.settings.get(name) != value:
            raise ConfigError(
                f"resume: {name} is {run.settings.get(name)}, expected {value} as in "
                f"{restored.path} (or another --output_dir for a new run)"
            )
    run.world.say(
        f"going on from {restored.path}: step {restored.step} of {run.steps}, written by "
        f"{restored.world_size} ranks, now {run.world.size}"
    )
    return restored.step


# ---------------------------------------------------------------------- one step


@contextlib.contextmanager
def _forward(run: Run) -> Iterator[None]:
    """Autocast and the offload of activations."""
    kind = {"bf16_autocast": torch.bfloat16, "fp16_autocast": torch.float16}
    dtype = kind.get(run.args.precision)
    with contextlib.ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast(run.world.device.type, dtype))
        if run.args.use_activation_cpu_offload:
            pinned = run.world.device.type == "cuda"
            stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=pinned))
        yield


def loss_sum(run: Run, rows: list[data.Row]) -> torch.Tensor:
    """Sum of the losses of the tokens that are predicted in `rows`."""
    batch = data.collate(rows, run.pad, run.world.device)
    with _forward(run):
        if run.args.loss_chunk:
            return quantal.token_losses(run.model, chunk_tokens=run.args.loss_chunk, **batch).sum()
        labels = batch.pop("labels")
        logits = run.model(use_cache=False, **batch).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
        )


def _parts(rows: list[data.Row], size: int) -> list[list[data.Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _synchronize(run: Run, last: bool) -> None:
    """FSDP exchanges gradients in the last pass of a step only."""
    if run.args.sharding_strategy != "ddp":
        run.model.set_requires_gradient_sync(last)


def _add_gradients(run: Run) -> None:
    """Sums gradients over ranks where nothing is sharded."""
    if run.args.sharding_strategy == "ddp" and run.world.size > 1:
        for parameter in run.trained:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)


def _clip(run: Run) -> float:
    limit = run.args.grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(run.trained, limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def train_step(run: Run, step: int, order: data.Order, stop: bool) -> dict[str, float]:
    """One optimizer step. Losses come back exactly as one rank alone would sum them: each pass has
    its own place in what the ranks add."""
    args, world = run.args, run.world
    first = step * args.global_batch
    rows = [run.rows[order[first + i]] for i in range(args.global_batch)]
    parts, tokens = _parts(rows, args.micro_batch), data.predicted_tokens(rows)
    factor = 1.0 if args.sharding_strategy == "ddp" else float(world.size)  # FSDP takes the mean
    facts = torch.zeros(len(parts) + world.size + 1, dtype=torch.float64)
    mine = range(world.rank, len(parts), world.size)
    for number in mine:
        _synchronize(run, number == mine[-1])
        torch.manual_seed((args.seed * 1_000_003 + step) * 65_537 + number)  # dropout of this pass
        loss = loss_sum(run, parts[number])
        (loss * (factor * run.scaler.scale / tokens)).backward()
        facts[number] = loss.detach().double()
    _add_gradients(run)
    facts[len(parts) + world.rank] = resident_bytes()[1]
    facts[-1] = float(stop)
    dist.all_reduce(facts)
    good = run.scaler.unscale(run.trained, world)
    norm = _clip(run) if good else math.nan
    rate = run.optimizer.param_groups[0]["lr"]
    if good:
        run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "loss": sum(facts[: len(parts)].tolist()) / tokens,
        "lr": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "peak_bytes": max(facts[len(parts) : -1].tolist()),
        "stop": facts[-1].item(),
    }


# ---------------------------------------------------------------------- now and then


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss over the held-out rows; every rank takes its part of them."""
    parts = _parts(run.held_out, run.args.micro_batch)
    sums = torch.zeros(len(parts), dtype=torch.float64)
    run.model.eval()
    for begin in range(0, len(parts), run.world.size):
        number = begin + run.world.rank
        value = loss_sum(run, parts[min(number, len(parts) - 1)])  # all ranks gather together
        if number < len(parts):
            sums[number] = value.double()
    run.model.train()
    dist.all_reduce(sums)
    return sum(sums.tolist()) / data.predicted_tokens(run.held_out)


@torch.no_grad()
def sample(run: Run) -> str:
    """A greedy continuation of the prompt; every rank computes it."""
    run.model.eval()
    ids = run.tokenizer(run.args.sample_prompt, return_tensors="pt")["input_ids"]
    ids = ids.to(run.world.device)
    for _ in range(run.args.sample_tokens):  # through the module itself: FSDP's root is here
        logits = run.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        word = logits[:, -1].argmax(-1, keepdim=True)
        if word.item() == run.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, word], 1)
    run.model.train()
    return run.tokenizer.decode(ids[0], skip_special_tokens=True)


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def reports(run: Run, monitor: Monitor, done: int) -> None:
    """Evaluation and sample, when they are due."""
    if run.held_out and _due(done, run.args.eval_steps, run.steps):
        loss = evaluate(run)
        values = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
        text = f"held-out loss {loss:.4f}, perplexity {values['eval_perplexity']:.3f}"
        monitor.note(done, values, text)
    if run.args.sample_steps and done % run.args.sample_steps == 0:
        text = sample(run)
        monitor.note(done, {"sample": text}, f"sample: {text!r}")


def save(run: Run, done: int) -> None:
    run.checkpoints.save(
        done,
        run.model,
        run.optimizer,
        scheduler=run.scheduler,
        scaler=run.scaler,
        position={"rows": done * run.args.global_batch},
        settings=run.settings,
    )


# ---------------------------------------------------------------------- the loop


class _Stop:
    """Whether SIGTERM or SIGINT asked the run to end; the step is finished and saved first."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def loop(run: Run, done: int, monitor: Monitor) -> int:
    """Steps until the end or a signal; returns the steps that are done."""
    order, stop = data.Order(len(run.rows), run.args.seed), _Stop()
    run.model.train()
    saved = done
    while done < run.steps:
        started = time.monotonic()
        with peers(run.world, f"step {done + 1}"):
            values = train_step(run, done, order, stop.asked)
        done += 1
        asked = values.pop("stop") > 0
        monitor.step(done, {**values, "seconds": time.monotonic() - started})
        with peers(run.world, f"after step {done}"):
            reports(run, monitor, done)
        if asked or _due(done, run.args.save_steps, run.steps):
            save(run, done)
            saved = done
        if asked:
            run.world.say(f"asked to stop: step {saved} is saved, the same command goes on")
            break
    run.checkpoints.close()
    return done


def finish(run: Run) -> None:
    """The adapter folder and the figure."""
    folder = run.args.output_dir
    path = os.path.join(folder, "adapter")
    quantal.save_adapter(run.model, path, run.checkpoints.base, group=run.world.group)
    run.world.say(f"adapter: {path}")
    if run.world.main and not run.args.no_plots:
        picture = os.path.join(folder, "training.png")
        title = f"{run.args.train_type}, {run.args.quantize}, {os.path.basename(run.args.model)}"
        drawn = plots.draw(os.path.join(folder, "metrics.jsonl"), picture, title)
        print(f"figure: {picture}" if drawn else "no figure: matplotlib is not installed")


def run(args: argparse.Namespace) -> None:
    """The whole run on this rank."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    world = join(args.device, args.timeout, args.threads)
    args.precision = args.precision or ("bf16" if world.device.type == "cuda" else "fp32")
    if args.dry_run:
        from .dry_run import make_plan

        text = make_plan(args, args.ranks or world.size, world.device.type).to_text()
        world.say(text)
        dist.destroy_process_group()
        return
    settle_batches(args, world.size)
    if args.use_activation_cpu_offload and args.gradient_checkpointing == "non_reentrant":
        raise ConfigError(
            "--gradient_checkpointing is non_reentrant, expected reentrant or none beside "
            "--use_activation_cpu_offload: torch's other kind keeps block inputs where they are"
        )
    job = build(args, world)
    done = resume(job)
    if world.main:
        os.makedirs(args.output_dir, exist_ok=True)
        with open(os.path.join(args.output_dir, "args.json"), "w", encoding="utf-8") as file:
            json.dump(vars(args), file, indent=1)
    monitor = Monitor(args, world.main, done, job.steps)
    try:
        done = loop(job, done, monitor)
    finally:
        monitor.close()
    if done == job.steps:
        with peers(world, "end"):
            finish(job)
    dist.destroy_process_group()
