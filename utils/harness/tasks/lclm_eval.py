"""Documents for the task `memory_lclm_eval`: Parquet or JSON lines in the shape of latent-context/lclm-eval.

A row is a `prompt`, a whole chat as a template wrote it, with the memory between markers; a `category`, by which
scores are kept apart; and `extra_info`, which holds the wanted texts (`ground_truth.answers`) and the name of the rule
that judges by them (`scoring_function`). What else `extra_info` holds is passed over.

Source: huggingface.co/datasets/latent-context/lclm-eval, the dataset's card; its rules are those of RULER.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset

from ruler.registry import Metric
from ruler.scoring.metrics import postprocess, sample_value
from utils.errors import ConfigError, DatasetError, PromptError, first_line
from utils.files import read_jsonl
from utils.model.markers import split_spans

COLUMNS = ("prompt", "category", "extra_info")
# The rules that the dataset's card describes.
RULES: dict[str, Metric] = {"ruler_string_match_all": "all", "ruler_string_match_part": "part"}
_SUFFIXES = (".parquet", ".jsonl")
_PARQUET_ROWS = 64


def load(lclm_eval: str | None = None, categories: Sequence[str] | str = "*", **_: Any) -> dict[str, Dataset]:
    """Read the rows of files.

    Args:
        lclm_eval: A `.parquet` or `.jsonl` file, or a folder of them, with those in its folders.
        categories: Names or patterns (`niah_*_4096`) of the categories that are kept; no other row is looked at.

    Raises:
        ConfigError: No file is named.
        DatasetError: There is none, a file cannot be read, a row has another shape or a rule that is not known, or no
            row is of these categories; the message names file and row.
    """
    if lclm_eval is None:
        raise ConfigError("memory_lclm_eval needs its data: --metadata lclm_eval=FILE_OR_FOLDER of .parquet or .jsonl")
    patterns = [categories] if isinstance(categories, str) else list(categories)
    rows = [row for path in _files(Path(lclm_eval)) for row in _read(path, patterns)]
    if not rows:
        raise DatasetError(f"{lclm_eval} has no row of the categories {', '.join(patterns)}")
    return {"test": Dataset.from_list(rows)}


def score(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """The score of an answer by its row's rule, overall and by category."""
    value = sample_value(postprocess(answers[0]), document["answers"], RULES[document["rule"]])
    return {"score": value, document["category"]: value}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix not in _SUFFIXES:
            raise DatasetError(f"{path}: expected a file that ends in {' or '.join(_SUFFIXES)}, or a folder of them")
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    if not found:
        raise DatasetError(f"{path} holds no file that ends in {' or '.join(_SUFFIXES)}")
    return found


def _read(path: Path, patterns: Sequence[str]) -> Iterator[dict[str, Any]]:
    raw = _parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path)
    for number, row in enumerate(raw, start=1):
        where = f"{path}, row {number}"
        category = _text(row, "category", where)
        if any(fnmatch.fnmatchcase(category, pattern) for pattern in patterns):
            yield {"category": category, **_checked(row, where)}


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a few at a time: prompts may have megabytes."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                columns = ", ".join(file.schema_arrow.names)
                raise DatasetError(f"{path} has no column {missing[0]!r}: expected {', '.join(COLUMNS)}, got {columns}")
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(COLUMNS)):
                yield from batch.to_pylist()
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{path} is no Parquet file that can be read: {first_line(error)}") from None


def _checked(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Prompt, answers and rule of a row."""
    prompt = _text(row, "prompt", where)
    try:
        spans = [piece for piece in split_spans(prompt, "the prompt") if piece.is_memory]
    except PromptError as error:
        raise DatasetError(f"{where}: {error}") from None
    if not spans:
        raise DatasetError(f"{where}: the prompt has no memory markers")
    info = _mapping(row, "extra_info", where)
    answers = _mapping(info, "ground_truth", f"{where}, extra_info").get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one for one in answers):
        raise DatasetError(f"{where}: extra_info.ground_truth.answers must be texts, at least one, got {answers!r:.80}")
    rule = info.get("scoring_function")
    if rule not in RULES:
        raise DatasetError(
            f"{where}: extra_info.scoring_function is {rule!r}, known are {', '.join(RULES)}: leave such rows out with "
            "--metadata categories=[…]"
        )
    return {"prompt": prompt, "answers": answers, "rule": rule}


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise DatasetError(f"{where}: {name} must be a text, got {value!r:.80}")
    return value


def _mapping(row: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = row.get(name)
    if not isinstance(value, Mapping):
        raise DatasetError(f"{where}: {name} must be an object, got {value!r:.80}")
    return value
