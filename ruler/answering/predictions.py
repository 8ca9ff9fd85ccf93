"""The predictions of one task on disk: appended row by row, whole after a kill at any moment, never of another dataset.

    with PredictionFile("out/vt.jsonl", rows) as file:
        for row in file.missing:
            file.append(prediction_row(row, "answer", {}))

A finished row is one line, written with one system call, so a killed process leaves at most one half line at the end;
the next run cuts that off and goes on. On closing, the rows are put into the dataset's order.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import DatasetError
from utils.files import atomic_path, parse_json, sha256_bytes
from utils.locks import sole_writer

logger = logging.getLogger(__name__)

_FIELDS = ("index", "pred", "outputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRow:
    """One row of a dataset with its place in the file; `index` repeats in some datasets, the number does not."""

    number: int
    fields: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """What ties a prediction to its question: a hash of prompt and references."""
        parts = [self.fields["input"], self.fields.get("answer_prefix", ""), *self.fields["outputs"]]
        return sha256_bytes(json.dumps(parts).encode())[:16]


def prediction_row(row: DataRow, text: str, measured: Mapping[str, Any], *, keep_input: bool = False) -> dict[str, Any]:
    """Put an answer into the reference's prediction format.

    Args:
        row: The question.
        text: The model's answer.
        measured: Counts of this answer (tokens, latents, depths), kept under `others`.
        keep_input: Repeat the whole prompt, as the reference does; long datasets double their size by it.
    """
    fields = row.fields
    return {
        "index": fields["index"],
        "pred": text,
        **({"input": fields["input"]} if keep_input else {}),
        "outputs": fields["outputs"],
        "others": {**fields.get("others", {}), "row": row.number, "digest": row.digest, **measured},
        "truncation": fields.get("truncation", -1),
        "length": fields.get("length", -1),
    }


def read_predictions(path: str | Path, required: Sequence[str] = _FIELDS) -> Iterator[dict[str, Any]]:
    """Yield the predictions of a file; a half-written last line is passed over with a warning.

    Args:
        path: JSON lines.
        required: The fields that a line must have.

    Raises:
        DatasetError: The file is missing, or a line other than the last is not a prediction; file and line are named.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist: predict first") from None
    lines = data.split(b"\n")
    if not _is_whole(lines[-1]):
        torn = lines.pop()
        logger.warning("%s: the last line is only half written (%d bytes); its row counts as missing", path, len(torn))
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parse(line, f"{path}, line {number}", required)


def _is_whole(last_line: bytes) -> bool:
    """Whether what follows the last newline is nothing or a whole object: a torn one does not parse."""
    try:
        return not last_line.strip() or isinstance(parse_json(last_line, "it is"), dict)
    except DatasetError:
        return False


def _parse(line: bytes, where: str, required: Sequence[str] = _FIELDS) -> dict[str, Any]:
    try:
        row = parse_json(line, f"{where}:")
    except DatasetError as error:
        raise DatasetError(f"{error}: remove the line to have its row predicted again") from None
    if not isinstance(row, dict) or not row.keys() >= set(required) or not isinstance(row["pred"], str):
        raise DatasetError(f"{where}: expected a prediction with {', '.join(required)}, got {str(row)[:80]}")
    return row


class PredictionFile:
    """Opens, repairs, checks and extends the predictions of one task; use as a context manager.

    Attributes:
        path: The JSON-lines file.
        rows: The questions, in the dataset's order.

    Raises:
        ConfigError: On entering, when another process writes the file.
        DatasetError: On entering, when a line is broken, or a stored prediction answers another question than this
            dataset's.
    """

    def __init__(self, path: str | Path, rows: Sequence[DataRow]) -> None:
        self.path = Path(path)
        self.rows = rows
        self._lines: dict[int, bytes] = {}

    @property
    def missing(self) -> list[DataRow]:
        """The rows without a prediction, in order."""
        return [row for row in self.rows if row.number not in self._lines]

    def __enter__(self) -> PredictionFile:
        with contextlib.ExitStack() as stack:
            # The lock has a file of its own, for the predictions' may be replaced.
            stack.enter_context(sole_writer(self.path, lock=self.path.with_name(f".{self.path.name}.lock")))
            # Unbuffered: one append is one write call, so a kill cannot tear two rows.
            self._stream = stack.enter_context(self.path.open("a+b", buffering=0))
            self._repair()
            self._load()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._held:
            os.fsync(self._stream.fileno())
            wanted = b"".join(self._lines[row.number] for row in self.rows if row.number in self._lines)
            if self._stored() != wanted:
                with atomic_path(self.path) as temporary:
                    temporary.write_bytes(wanted)

    def append(self, prediction: dict[str, Any]) -> None:
        """Store one finished row; it survives whatever happens to this process afterwards."""
        # ASCII escapes: a model may answer with half a surrogate pair, which is no UTF-8.
        line = json.dumps(prediction).encode("ascii") + b"\n"
        if self._stream.write(line) != len(line):
            raise OSError(errno.ENOSPC, "a row could be written only in part; the next run repairs it", str(self.path))
        self._lines[prediction["others"]["row"]] = line

    def _stored(self) -> bytes:
        self._stream.seek(0)
        return self._stream.read()

    def _repair(self) -> None:
        data = self._stored()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        if _is_whole(data[end:]):
            self._stream.write(b"\n")
        else:
            logger.warning("%s: cut off a half-written last line (%d bytes)", self.path, len(data) - end)
            self._stream.truncate(end)

    def _load(self) -> None:
        by_number = {row.number: row for row in self.rows}
        by_index = {row.fields["index"]: row for row in self.rows}
        for number, line in enumerate(self._stored().split(b"\n")[:-1], start=1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            stored = _parse(line, where)
            # The reference's predictions carry neither number nor digest.
            others = stored.get("others") or {}
            row = by_number.get(others["row"]) if "row" in others else by_index.get(stored["index"])
            if (
                row is None
                or others.get("digest", row.digest) != row.digest
                or stored["outputs"] != row.fields["outputs"]
            ):
                raise DatasetError(
                    f"{where}: predicted for another dataset (row {others.get('row', stored['index'])} asks something "
                    "else here): choose another output folder, or remove this one"
                )
            self._lines[row.number] = line + b"\n"
