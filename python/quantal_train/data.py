"""Text as rows of tokens: reading, packing, and the order in which rows are trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from quantal import ConfigError, CorruptError, IoError, UnsupportedError

IGNORE = -100


@dataclasses.dataclass
class Row:
    """One sample: token ids, what is to be predicted (-100: nothing), positions that start again
    with each document."""

    ids: list[int]
    labels: list[int]
    positions: list[int]


@dataclasses.dataclass
class Documents:
    """Tokenized documents: (ids, labels)."""

    items: list[tuple[list[int], list[int]]]


# ---------------------------------------------------------------------- reading


def _lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise CorruptError(
                    f"data: line {number} is no JSON: {error} (file={path})", path
                ) from error
            if not isinstance(value, dict):
                raise CorruptError(
                    f"data: line {number} is a {type(value).__name__}, expected an object "
                    f"(file={path})",
                    path,
                )
            yield number, value


class _Encoder:
    """Documents of a record, with the tokenizer's own templates."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def text(self, text: str) -> tuple[list[int], list[int]]:
        ids = [*self.tokenizer(text)["input_ids"], *self.end]
        return ids, list(ids)

    def completion(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """The loss is on the completion alone."""
        given = self.tokenizer(prompt)["input_ids"]
        rest = self.tokenizer(completion, add_special_tokens=False)["input_ids"] + self.end
        return given + rest, [IGNORE] * len(given) + rest

    def chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """The loss is on the assistant's turns."""
        ids: list[int] = []
        labels: list[int] = []
        for count in range(1, len(messages) + 1):
            whole = self.tokenizer.apply_chat_template(messages[:count], tokenize=True)
            if whole[: len(ids)] != ids:
                raise UnsupportedError(
                    "data: the chat template changes earlier turns when one is added, expected one "
                    'that appends (write the text out as {"prompt", "completion"})'
                )
            new = whole[len(ids) :]
            spoken = messages[count - 1].get("role") == "assistant"
            labels += new if spoken else [IGNORE] * len(new)
            ids = whole
        return ids, labels

    def record(self, value: dict[str, Any], where: str) -> tuple[list[int], list[int]]:
        if isinstance(value.get("text"), str):
            return self.text(value["text"])
        if isinstance(value.get("prompt"), str) and isinstance(value.get("completion"), str):
            return self.completion(value["prompt"], value["completion"])
        if isinstance(value.get("messages"), list):
            return self.chat(value["messages"])
        raise CorruptError(
            f"data: keys are {', '.join(sorted(value)) or 'none'}, expected text, or prompt and "
            f"completion, or messages ({where})"
        )


def read_documents(paths: Iterable[str], tokenizer: Any) -> Documents:
    """A text file is one document; a .jsonl file has one in each line: {"text"}, {"prompt",
    "completion"} (loss on the completion) or {"messages"} (loss on the assistant's turns)."""
    encoder = _Encoder(tokenizer)
    items = []
    for path in paths:
        try:
            if path.endswith((".jsonl", ".json")):
                for number, value in _lines(path):
                    items.append(encoder.record(value, f"file={path}, line={number}"))
            else:
                with open(path, encoding="utf-8") as file:
                    items.append(encoder.text(file.read()))
        except OSError as error:
            raise IoError(f"data: cannot read {path}: {error.strerror}", path) from error
        except UnicodeDecodeError as error:
            raise CorruptError(
                f"data: {path} is no UTF-8 at byte {error.start}", path, "", error.start
            ) from error
    return Documents(items)


# ---------------------------------------------------------------------- rows


def packed_rows(documents: Documents, length: int) -> list[Row]:
    """Rows of exactly `length` tokens: documents back to back, each with positions of its own, so
    that no token sees another document; what does not fill a row at the end is left out."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    rows: list[Row] = []
    for document, wanted in documents.items:
        start = 0
        while start < len(document):
            count = min(length - len(ids), len(document) - start)
            part = slice(start, start + count)
            ids += document[part]
            labels += [IGNORE, *wanted[part][1:]]  # nothing predicts the first token
            positions += range(count)
            start += count
            if len(ids) == length:
                rows.append(Row(ids, labels, positions))
                ids, labels, positions = [], [], []
    return rows


def document_rows(documents: Documents, length: int) -> list[Row]:
    """One row per document, cut at `length` tokens."""
    rows = []
    for document, wanted in documents.items:
        ids, labels = document[:length], wanted[:length]
        if len(ids) > 1 and any(y != IGNORE for y in labels[1:]):
            rows.append(Row(ids, [IGNORE, *labels[1:]], list(range(len(ids)))))
    return rows


def make_rows(documents: Documents, length: int, packing: str) -> list[Row]:
    """Rows with something to predict; ConfigError where there are none."""
    make = {"packed": packed_rows, "none": document_rows}[packing]
    rows = [row for row in make(documents, length) if any(y != IGNORE for y in row.labels)]
    if not rows:
        tokens = sum(len(ids) for ids, _ in documents.items)
        raise ConfigError(
            f"data: {tokens} tokens make no row of {length} tokens, expected more text or a "
            "smaller --context_length"
        )
    return rows


def rows_digest(rows: list[Row]) -> str:
    """SHA-256 over the tokens of all rows; a run goes on with the same data only."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(torch.tensor([len(row.ids), *row.ids, *row.labels]).numpy().tobytes())
    return digest.hexdigest()


def split_rows(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): every n-th row is held out."""
    if fraction == 0:
        return rows, []
    every = max(2, round(1 / fraction))
    held_out = rows[every - 1 :: every]
    return [row for i, row in enumerate(rows, 1) if i % every], held_out


class Order:
    """Which row is the n-th of a run: a new permutation for each epoch, the same for any number of
    ranks."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.count, generator=generator)
            self._epoch = epoch
        return int(self._permutation[index])


def collate(rows: list[Row], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and labels [rows, longest]. Where a row holds several documents or padding, also
    position_ids, which start again at each: transformers lets no token see past such a start."""
    longest = max(len(row.ids) for row in rows)
    ids, labels, positions = [], [], []
    for row in rows:
        missing = longest - len(row.ids)
        ids.append(row.ids + [pad] * missing)
        labels.append(row.labels + [IGNORE] * missing)
        positions.append(row.positions + list(range(missing)))
    batch = {"input_ids": ids, "labels": labels}
    if any(p != list(range(longest)) for p in positions):
        batch["position_ids"] = positions
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def predicted_tokens(rows: list[Row]) -> int:
    """Labels of `rows` that a token before them predicts."""
    return sum(sum(y != IGNORE for y in row.labels[1:]) for row in rows)
