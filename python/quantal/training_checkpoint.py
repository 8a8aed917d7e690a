"""Checkpoints of adapter training: small, atomic, written in the background, for any world size.

torch.distributed.checkpoint writes the adapters, the optimizer and the states of the random
generators; a manifest holds the rest. The frozen base is never written: its identity is stored
once beside the checkpoints, and the base of the run that goes on has to have the same bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import _check
from ._checkpoint_store import (
    FORMAT,
    STATE,
    Store,
    check_files,
    checkpoint_name,
    hash_file,
    read_json,
    write_file,
)
from ._core import version as __version__
from ._errors import ConfigError, CorruptError, IoError, QuantalError
from ._training_state import (
    adopt_optimizer,
    check_names,
    load_rng,
    model_tensors,
    optimizer_facts,
    optimizer_templates,
    rng_tensors,
    staged,
    tensor_facts,
)
from .base_identity import BaseIdentity

#: File beside the checkpoints that says which base they belong to.
BASE = "base.json"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What ``load`` brought back beside the tensors.

    path       the checkpoint folder
    step       optimizer steps that were done
    position   what ``save`` was given: where in the data the run was
    settings   what ``save`` was given: arguments of the run
    world_size ranks that wrote it
    """

    path: str
    step: int
    position: dict[str, Any]
    settings: dict[str, Any]
    world_size: int


class TrainingCheckpoints:
    """The checkpoints of one run, in one folder.

    folder        holds ``step-XXXXXXXX`` folders, ``latest`` and ``base.json``; every rank must see
                  it (a shared file system on several nodes)
    base          identity of the base in memory (``base_identity(model)``)
    keep_last     how many are kept; 0: all
    asynchronous  ``save`` returns as soon as the state is copied; a thread writes it. An error of
                  the thread is raised by the next ``save``, ``wait`` or ``close``
    group         a process group that moves CPU tensors (gloo), used by nothing else; made where a
                  process group is initialized and none is given

    Works on models that are plain, replicated or sharded by ``fully_shard``. Every rank calls every
    method; errors are the same on all ranks.
    """

    @_check.arguments(
        "TrainingCheckpoints",
        folder=_check.path,
        base=_check.is_a(BaseIdentity, "a BaseIdentity"),
        keep_last=_check.integer,
        asynchronous=_check.flag,
    )
    def __init__(
        self,
        folder: str | os.PathLike,
        base: BaseIdentity,
        *,
        keep_last: int = 3,
        asynchronous: bool = True,
        group: Any = None,
    ) -> None:
        if keep_last < 0:
            raise ConfigError(f"keep_last is {keep_last}, expected at least 0 (0 keeps all)")
        self.store, self.base = Store(os.fspath(folder)), base
        self.keep_last, self.asynchronous = keep_last, asynchronous
        self.distributed = dist.is_available() and dist.is_initialized()
        if self.distributed and group is None:
            group = dist.new_group(backend="gloo")
        self.group = group
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.world_size = dist.get_world_size(group) if self.distributed else 1
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "quantal-checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:  # a peer may be gone: nobody waits for it
            self._executor.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ saving

    @_check.arguments(
        "TrainingCheckpoints.save",
        step=_check.size,
        model=_check.module,
        optimizer=_check.is_a(torch.optim.Optimizer, "a torch.optim.Optimizer"),
        position=_check.optional(_check.mapping),
        settings=_check.optional(_check.mapping),
    )
    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Any = None,
        scaler: Any = None,
        position: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Writes the checkpoint of a step; the tensors may change as soon as this returns.

        Parameters that ask for gradients and all tensors of the optimizer are written;
        ``scheduler`` and ``scaler`` by their ``state_dict`` (JSON). A save that fails leaves the
        last good checkpoint as it was and raises IoError with the rank and the reason.
        """
        self.wait()
        tensors = model_tensors(model) | optimizer_facts(model, optimizer).tensors
        rng = rng_tensors(self.rank)
        manifest = {
            "format": FORMAT,
            "step": int(step),
            "world_size": self.world_size,
            "base": {"digest": self.base.digest, "path": self.base.path},
            "position": position or {},
            "settings": settings or {},
            "optimizer": optimizer_facts(model, optimizer).groups,
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "tensors": tensor_facts(tensors),
            "versions": {"quantal": __version__, "torch": torch.__version__},
        }
        copies = staged(tensors) | rng
        self._pending = self._executor.submit(self._write, checkpoint_name(step), copies, manifest)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint in the background is on disk; raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """``wait``, then ends the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown(wait=False)

    def _write(self, name: str, tensors: dict[str, Any], manifest: dict[str, Any]) -> None:
        with self._said(name):
            failure = self._agree(self._begin(name) if self.rank == 0 else None)
            if failure is not None:
                raise failure
            try:
                self._write_tensors(name, tensors)
            except QuantalError as error:  # the same on every rank
                failure = error
            files = self._collect(name, failure)
            if self.rank == 0:
                failure = self._commit(name, manifest, files)
            failure = self._agree(failure)
            if failure is not None:
                raise failure

    def _begin(self, name: str) -> QuantalError | None:
        try:
            with _typed("write", self.store.folder):
                self._keep_base()
                self.store.begin(name)
        except QuantalError as error:
            return self._last_good(error)
        return None

    def _last_good(self, error: QuantalError) -> QuantalError:
        last = next(reversed(self.store.names()), None)
        return type(error)(f"{error}; last good checkpoint: {last}", error.path or "")

    def _write_tensors(self, name: str, tensors: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        folder = os.path.join(self.store.temporary(name), STATE)
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        with warnings.catch_warnings(), _typed("write", folder):
            warnings.simplefilter("ignore")  # that torch.distributed is not initialized
            dcp.save(
                tensors,
                storage_writer=writer,
                process_group=self.group,
                no_dist=not self.distributed,
            )

    def _collect(self, name: str, failure: QuantalError | None) -> list[Any]:
        """[{file: (bytes, SHA-256)} or an error] of every rank, on rank 0."""
        mine: Any = failure
        if failure is None:
            try:
                mine = self._own_files(name)
            except OSError as error:
                mine = IoError(f"checkpoint: rank {self.rank} cannot read what it wrote: {error}")
        if not self.distributed:
            return [mine]
        gathered: list[Any] = [None] * self.world_size
        dist.gather_object(
            mine, gathered if self.rank == 0 else None, group=self.group, group_dst=0
        )
        return gathered

    def _own_files(self, name: str) -> dict[str, tuple[int, str]]:
        folder = os.path.join(self.store.temporary(name), STATE)
        own = [n for n in sorted(os.listdir(folder)) if n.startswith(f"__{self.rank}_")]
        if self.rank == 0:
            own.append(".metadata")
        paths = {f"{STATE}/{n}": os.path.join(folder, n) for n in own}
        return {n: (os.path.getsize(p), hash_file(p)) for n, p in paths.items()}

    def _commit(self, name: str, manifest: dict[str, Any], files: list[Any]) -> QuantalError | None:
        failure = next((f for f in files if isinstance(f, QuantalError)), None)
        if failure is None:
            manifest["files"] = {n: list(facts) for part in files for n, facts in part.items()}
            try:
                self.store.commit(name, manifest, self.keep_last)
            except (OSError, TypeError, ValueError) as error:
                failure = IoError(f"checkpoint: cannot write {self.store.path(name)}: {error}")
        if failure is not None:
            self.store.abandon(name)
            failure = self._last_good(failure)
        return failure

    def _agree(self, failure: QuantalError | None) -> QuantalError | None:
        """Rank 0's error, on every rank."""
        if not self.distributed:
            return failure
        box = [failure]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def _keep_base(self) -> None:
        """Writes the identity of the base, the first time."""
        path = self.store.path(BASE)
        if os.path.exists(path):
            stored = BaseIdentity.from_dict(read_json(path, "checkpoint"), path)
            if stored.digest != self.base.digest:
                raise ConfigError(
                    f"checkpoint: {self.store.folder} belongs to another base: "
                    f"{stored.compare(self.base)}, expected another folder (file={path})",
                    path,
                )
            return
        os.makedirs(self.store.folder, exist_ok=True)
        write_file(path, json.dumps(self.base.to_dict(), indent=1) + "\n")

    @contextlib.contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """What gloo says of a rank that is gone, in words."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, QuantalError):
                raise
            raise IoError(
                f"checkpoint: rank {self.rank} of {self.world_size} cannot finish {name}: another "
                f"rank ended or does not answer ({_first_line(error)}); the last good checkpoint "
                f"is untouched (folder={self.store.folder})"
            ) from error

    # ------------------------------------------------------------------ loading

    def latest(self) -> str | None:
        """Path of the last good checkpoint; None where there is none yet."""
        name = self.store.latest()
        return None if name is None else self.store.path(name)

    @_check.arguments(
        "TrainingCheckpoints.load",
        model=_check.module,
        optimizer=_check.is_a(torch.optim.Optimizer, "a torch.optim.Optimizer"),
        path=_check.optional(_check.source),
    )
    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Any = None,
        scaler: Any = None,
        path: str | os.PathLike | None = None,
    ) -> Restored:
        """Puts a checkpoint (default: the last good one) into model, optimizer and the rest.

        Any number of ranks, any device, any storage dtype of the base. Before anything changes,
        the base is compared, every file is hashed, and names, shapes and dtypes are checked;
        CorruptError and ConfigError name file or tensor, what is there and what was expected. The
        random generators go on where they were if the number of ranks is the same.
        """
        folder = os.fspath(path) if path is not None else self.latest()
        if folder is None:
            raise IoError(f"checkpoint: {self.store.folder} has no checkpoint", self.store.folder)
        manifest = self.store.read_manifest(folder)
        self._check_base(manifest, folder)
        self._check_files(folder, manifest["files"])
        targets = model_tensors(model)
        check_names(targets, manifest["tensors"], folder)
        moments = optimizer_templates(model, optimizer, manifest, folder)
        rng = rng_tensors(self.rank) if manifest["world_size"] == self.world_size else {}
        rng = self._read_tensors(folder, targets | moments, rng)
        adopt_optimizer(model, optimizer, manifest["optimizer"], moments)
        for target, key in ((scheduler, "scheduler"), (scaler, "scaler")):
            if target is not None and manifest.get(key) is not None:
                target.load_state_dict(manifest[key])
        load_rng(rng, self.rank)
        return Restored(
            folder,
            manifest["step"],
            manifest.get("position", {}),
            manifest.get("settings", {}),
            manifest["world_size"],
        )

    def _check_base(self, manifest: dict[str, Any], folder: str) -> None:
        expected = manifest["base"].get("digest")
        if expected == self.base.digest:
            return
        beside = os.path.join(os.path.dirname(os.path.abspath(folder)), BASE)
        what = "another base"
        if os.path.exists(beside):
            stored = BaseIdentity.from_dict(read_json(beside, "checkpoint"), beside)
            if stored.digest == expected:
                what = str(stored.compare(self.base))
        raise ConfigError(
            f"checkpoint: digest of the base is {self.base.digest}, expected {expected} of "
            f"{manifest['base'].get('path') or 'the base it was trained on'}: {what} "
            f"(file={folder})",
            folder,
        )

    def _check_files(self, folder: str, files: dict[str, list[Any]]) -> None:
        """Each rank hashes its part; all raise what one found."""
        error: QuantalError | None = None
        try:
            share = sorted(files)[self.rank :: self.world_size]
            check_files(folder, {n: files[n] for n in share})
        except QuantalError as found:
            error = found
        except (OSError, TypeError, ValueError) as found:
            error = CorruptError(
                f"checkpoint: files of {folder} cannot be checked: {found}", folder
            )
        if self.distributed:
            found_all: list[Any] = [None] * self.world_size
            dist.all_gather_object(found_all, error, group=self.group)
            error = next((e for e in found_all if e is not None), None)
        if error is not None:
            raise error

    def _read_tensors(
        self, folder: str, targets: dict[str, Any], rng: dict[str, Any]
    ) -> dict[str, Any]:
        """Fills `targets` and those of `rng` that are stored, which it returns."""
        import torch.distributed.checkpoint as dcp

        state = os.path.join(folder, STATE)
        with warnings.catch_warnings(), _typed("read", state):
            warnings.simplefilter("ignore")  # that torch.distributed is not initialized
            reader = dcp.FileSystemReader(state)
            stored = reader.read_metadata().state_dict_metadata
            rng = {name: tensor for name, tensor in rng.items() if name in stored}
            dcp.load(
                targets | rng,
                storage_reader=reader,
                process_group=self.group,
                no_dist=not self.distributed,
            )
        return rng


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason(verb: str, cause: BaseException) -> str:
    """torch hides the system's reason when a write is refused."""
    if verb == "write" and not isinstance(cause, OSError):
        return f"disk full, quota, or a limit of file sizes ({_first_line(cause)})"
    return _first_line(cause)


@contextlib.contextmanager
def _typed(verb: str, path: str) -> Iterator[None]:
    """torch's checkpoint errors as one of ours, with the rank's own reason."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise IoError(
            f"checkpoint: rank {rank} cannot {verb} {path}: {_reason(verb, cause)}", path
        ) from error
    except OSError as error:
        raise IoError(f"checkpoint: cannot {verb} {path}: {error}", path) from error


__all__ = ["Restored", "TrainingCheckpoints"]
