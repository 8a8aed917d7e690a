"""Folders of training checkpoints on disk: each appears whole or not at all.

A checkpoint is written to ``.saving-NAME``, synced, renamed to ``NAME``, and only then does the
file ``latest`` name it. Whatever moment a process dies at, ``latest`` names a whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from typing import Any

from ._errors import CorruptError, IoError

FORMAT = "quantal training checkpoint 1"
MANIFEST = "checkpoint.json"
STATE = "state"
LATEST = "latest"
_NAME = re.compile(r"step-\d{8,}(\.\d+)?")
_TEMPORARY = (".saving-", ".deleting-")


def checkpoint_name(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:08d}"


def sync_folder(folder: str) -> None:
    """Makes the names in a folder permanent."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: str, text: str) -> None:
    """Replaces a file by a rename, so that it has the old content or the new."""
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(os.path.dirname(path) or ".")


def hash_file(path: str) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str, what: str) -> Any:
    """A JSON file; IoError where it cannot be read, CorruptError where it is no JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise IoError(f"{what}: cannot read {path}: {error.strerror}", path) from error
    except ValueError as error:
        raise CorruptError(f"{what}: {path} is no JSON: {error}", path) from error


class Store:
    """The folder that holds the checkpoints of one run. Only one rank writes through it."""

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def temporary(self, name: str) -> str:
        return self.path(_TEMPORARY[0] + name)

    def names(self) -> list[str]:
        """Whole checkpoints, oldest first by the time they were written at."""
        if not os.path.isdir(self.folder):
            return []
        found = [n for n in os.listdir(self.folder) if _NAME.fullmatch(n)]
        return sorted(found, key=self._written)

    def _written(self, name: str) -> tuple[int, str]:
        try:
            return os.stat(os.path.join(self.path(name), MANIFEST)).st_mtime_ns, name
        except OSError:
            return 0, name

    def latest(self) -> str | None:
        """Name of the last good checkpoint, None where there is none yet."""
        pointer = self.path(LATEST)
        if not os.path.exists(pointer):
            return next(reversed(self.names()), None)  # died before the very first pointer
        with open(pointer, encoding="utf-8") as file:
            name = file.read(4096).strip()
        if not _NAME.fullmatch(name) or name not in self.names():
            raise CorruptError(
                f"checkpoint: {pointer} names {name!r}, expected one of "
                f"{', '.join(self.names()) or 'no checkpoint'}",
                pointer,
            )
        return name

    def begin(self, name: str) -> str:
        """An empty folder to write into; what an interrupted save left is removed."""
        os.makedirs(self.folder, exist_ok=True)
        for entry in os.listdir(self.folder):
            if entry.startswith(_TEMPORARY):
                shutil.rmtree(self.path(entry), ignore_errors=True)
        folder = self.temporary(name)
        os.makedirs(os.path.join(folder, STATE))
        return folder

    def abandon(self, name: str) -> None:
        shutil.rmtree(self.temporary(name), ignore_errors=True)

    def commit(self, name: str, manifest: dict[str, Any], keep_last: int) -> None:
        """Makes what was written under ``begin`` the last good checkpoint."""
        folder = self.temporary(name)
        write_file(os.path.join(folder, MANIFEST), json.dumps(manifest, indent=1) + "\n")
        sync_folder(os.path.join(folder, STATE))
        sync_folder(folder)
        final = self._free(name)
        os.rename(folder, self.path(final))
        sync_folder(self.folder)
        write_file(self.path(LATEST), final + "\n")
        older = [n for n in self.names() if n != final]
        replaced = [n for n in older if n.split(".")[0] == name]
        older = [n for n in older if n not in replaced]
        many = max(0, len(older) - keep_last + 1) if keep_last > 0 else 0
        for each in [*replaced, *older[:many]]:
            self._delete(each)

    def _free(self, name: str) -> str:
        """`name`, or with a number where a run that went on from an older checkpoint passes the
        same step: what ``latest`` may name is not touched."""
        count, free = 0, name
        while os.path.exists(self.path(free)):
            count += 1
            free = f"{name}.{count}"
        return free

    def _delete(self, name: str) -> None:
        """First out of sight, then away: a folder of that name is never half there."""
        hidden = self.path(_TEMPORARY[1] + name)
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(self.path(name), hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def read_manifest(self, path: str) -> dict[str, Any]:
        """The manifest of a checkpoint folder, its format checked."""
        file = os.path.join(path, MANIFEST)
        manifest = read_json(file, "checkpoint")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = (
                manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            )
            raise CorruptError(
                f'checkpoint: format is {found!r}, expected "{FORMAT}" (file={file})', file
            )
        for key, kind in (("step", int), ("files", dict), ("tensors", dict), ("base", dict)):
            if not isinstance(manifest.get(key), kind):
                raise CorruptError(
                    f"checkpoint: {key} is {type(manifest.get(key)).__name__}, expected "
                    f"{kind.__name__} (file={file})",
                    file,
                )
        return manifest


def check_files(path: str, files: dict[str, list[Any]]) -> None:
    """Raises CorruptError for the first file that is missing or has another size or other bytes."""
    for relative, (size, digest) in files.items():
        file = os.path.join(path, relative)
        try:
            actual = os.path.getsize(file)
        except OSError as error:
            raise CorruptError(
                f"checkpoint: {file} is missing, expected {size} bytes ({error.strerror}); "
                "another checkpoint of the run may be whole",
                file,
            ) from error
        if actual != size:
            raise CorruptError(
                f"checkpoint: {file} has {actual} bytes, expected {size}; another checkpoint of "
                "the run may be whole",
                file,
            )
        found = hash_file(file)
        if found != digest:
            raise CorruptError(
                f"checkpoint: SHA-256 of {file} is {found}, expected {digest}; another checkpoint "
                "of the run may be whole",
                file,
            )
