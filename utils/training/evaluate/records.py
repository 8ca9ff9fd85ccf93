"""An evaluation's records, written as they come: one that was killed goes on where it stood.

output/settings.json     what is evaluated; only under the same settings does it go on
output/records.jsonl     a record a line
output/result.json       written last: with it the evaluation is whole, and the next one in the folder begins anew
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from utils.errors import ConfigError
from utils.files import json_text, parse_json, read_json, write_json, write_jsonl

SETTINGS, RECORDS, RESULT = "settings.json", "records.jsonl", "result.json"
# They change no record, or only its times.
_FREE = ("output", "json", "verbose", "threads", "batch_size")


class RecordsFile:
    """The records so far, and where further ones go.

    Args:
        output: Folder of the evaluation; None to keep the records in memory only.
        settings: As JSON.

    Raises:
        ConfigError: The folder has an unfinished evaluation with other settings.
    """

    def __init__(self, output: Path | None, settings: Mapping[str, Any]) -> None:
        self._output = output
        self._settings = {key: value for key, value in settings.items() if key not in _FREE}
        self._stream: TextIO | None = None
        self.all: list[dict[str, Any]] = []

    @property
    def done(self) -> set[tuple[str, int]]:
        """Condition and example of each record."""
        return {(record["condition"], record["number"]) for record in self.all}

    def __enter__(self) -> Self:
        if self._output is not None:
            if (self._output / SETTINGS).exists() and not (self._output / RESULT).exists():
                self.all = self._unfinished(self._output)
            (self._output / RESULT).unlink(missing_ok=True)
            write_json(self._output / SETTINGS, self._settings)
            write_jsonl(self._output / RECORDS, self.all)
            self._stream = (self._output / RECORDS).open("a", encoding="utf-8", newline="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def take(self, records: Iterable[dict[str, Any]]) -> None:
        """Keep records; each is on its way to the disk before the next one is made."""
        for record in records:
            self.all.append(record)
            if self._stream is not None:
                self._stream.write(json_text(record) + "\n")
                self._stream.flush()

    def _unfinished(self, output: Path) -> list[dict[str, Any]]:
        """The records of an evaluation that was interrupted, less what a kill left half written."""
        found = read_json(output / SETTINGS)
        for key in sorted(found.keys() | self._settings.keys()):
            if found.get(key) != self._settings.get(key):
                raise ConfigError(
                    f"{output} has an unfinished evaluation with {key} = {found.get(key)!r}, not "
                    f"{self._settings.get(key)!r}: go back to the old value, or choose another --output"
                )
        path = output / RECORDS
        *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
        return [parse_json(line, f"{path}:") for line in lines]
