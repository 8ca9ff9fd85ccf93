"""The commands that the campaign kills, starves of disk and feeds damaged files, with what each must keep.

job = JOBS["corpus"]
job.begin(folder, tools)                       # its inputs
run_command(job.module, job.arguments(folder, tools), environment=job.environment(folder))
job.finished(folder)                           # name -> digest of each finished thing, also after a kill
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ruler.layout import write_dataset
from tests.support import fake_server
from tests.support.tiny import write_checkpoint
from utils.checkpoint.layout import LCLM
from utils.compress.latent_cache import LatentCache
from utils.compress.prompt_embeds import load_prompt_embeds
from utils.corpus.reader import EncodedCorpus
from utils.errors import DatasetError
from utils.files import sha256_file
from utils.model.config import CompressionConfig
from utils.model.markers import wrap
from utils.training.checkpoints import load_trained, newest_checkpoint

# Finished things: digests of their bytes, or tensors.
Finished = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What all jobs use.

    Attributes:
        checkpoint: A tiny checkpoint folder.
        server_url: An OpenAI-compatible server that answers by prompt.
    """

    checkpoint: Path
    server_url: str


@contextlib.contextmanager
def running_tools(folder: Path) -> Iterator[Tools]:
    """Write the checkpoint, and serve until the block ends."""
    checkpoint = write_checkpoint(folder / "tiny", CompressionConfig(chunk_size=4, window=32), layout=LCLM)
    with fake_server.running(fake_server.by_prompt) as server:
        server.keeps_requests = False
        yield Tools(checkpoint=checkpoint, server_url=server.url)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command with one folder of work.

    Attributes:
        module: It has `main(argv)`.
        begin: Writes the inputs into an empty folder.
        arguments: Argv of the command.
        finished: What is finished in a folder, at any time, by name. After a kill all of it must be the
            undisturbed run's.
        outputs: Shell patterns of the files that the command makes and reads again, to be damaged.
        unchecked: Patterns of those in a published format without a checksum: another letter is another answer.
        read: Reads the outputs as their user would: damage must not change that without an error.
    """

    module: str
    begin: Callable[[Path, Tools], None]
    arguments: Callable[[Path, Tools], list[str]]
    finished: Callable[[Path], Finished]
    outputs: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    read: Callable[[Path], Any] | None = None

    def environment(self, folder: Path) -> dict[str, str]:
        """Where the command may write besides."""
        (folder / "tmp").mkdir(exist_ok=True)
        return {
            "CODE_LLAVA_CACHE_DIR": str(folder / "cache"),
            "CODE_LLAVA_CHECKPOINTS": str(folder / "checkpoints"),
            "TMPDIR": str(folder / "tmp"),
        }


def files_of(folder: Path) -> set[str]:
    """Files below a folder, without locks, and without what others may be writing into the latent cache."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)) for path in found if not path.name.startswith(".put-")}


def is_same(one: Any, other: Any) -> bool:
    """Whether two finished things are the same; latents may round otherwise in another batch."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)
    return bool(one == other) and type(one) is type(other)


def _digest(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _files(folder: Path, pattern: str) -> Finished:
    return {path.name: sha256_file(path) for path in folder.glob(pattern) if path.is_file()}


def _code(number: int, lines: int) -> str:
    return "".join(f"value_{number}_{line} = {line * 7919 % 10007}\n" for line in range(lines))


# Compressing one prompt: an array with its sidecar, and the latent cache.


def _begin_compress(folder: Path, tools: Tools) -> None:
    spans = [wrap(_code(number, 6)) for number in range(4)]
    (folder / "prompt.txt").write_text("Say " + " then ".join(spans) + " at last.")


def _compress_arguments(folder: Path, tools: Tools) -> list[str]:
    prompt, output = str(folder / "prompt.txt"), str(folder / "rows.npy")
    return ["--input-file", prompt, "--output", output, "--checkpoint", str(tools.checkpoint), "--device", "cpu"]


def _compressed(folder: Path) -> Finished:
    return ({"rows": _read_rows(folder)} if (folder / "rows.npy").exists() else {}) | _cache(folder)


def _read_rows(folder: Path) -> torch.Tensor:
    embeds = load_prompt_embeds(folder / "rows.npy")
    if not embeds.spans:
        raise DatasetError("the array has no sidecar")
    return embeds.values_TD


def _cache(folder: Path) -> Finished:
    # Not its bytes: after a kill other batches are encoded, which may round otherwise.
    with LatentCache.open(folder / "cache") as cache:
        entries, corrupt = cache.verify()
    if corrupt:
        raise DatasetError(f"{corrupt} of {entries} cache entries are corrupt")
    return {name: "whole" for name in files_of(folder) if name.startswith("cache/")}


# Encoding a corpus: shards and an index.


def _begin_corpus(folder: Path, tools: Tools) -> None:
    (folder / "src").mkdir()
    for number in range(14):
        (folder / "src" / f"part_{number:02}.py").write_text(_code(number, 4 + 5 * (number % 4)))


def _corpus_arguments(folder: Path, tools: Tools) -> list[str]:
    where = ["--output", str(folder / "out"), "--shard-size", "400"]
    return [str(folder / "src"), *where, "--checkpoint", str(tools.checkpoint), "--device", "cpu"]


def _encoded(folder: Path) -> Finished:
    done = _files(folder / "out", "latents-*.safetensors")
    if (folder / "out" / "index.sqlite").exists():
        with sqlite3.connect(folder / "out" / "index.sqlite") as db:
            done["index"] = _digest(db.execute("SELECT * FROM documents ORDER BY position").fetchall())
    return done


def _read_corpus(folder: Path) -> str:
    with EncodedCorpus.open(folder / "out") as corpus:
        return _digest([[row.id, row.num_tokens, corpus.latents(row.id).tolist()] for row in corpus])


def _to_cache_arguments(folder: Path, tools: Tools) -> list[str]:
    return [str(folder / "src"), "--to-cache", "--checkpoint", str(tools.checkpoint), "--device", "cpu"]


# Training the toy pair: checkpoints, from which a killed run goes on bit for bit.


def _begin_training(folder: Path, tools: Tools) -> None:
    rates = dict.fromkeys(("adapter", "markers", "encoder", "decoder"), 1e-3)
    values = {
        "name": "tiny",
        "output": str(folder / "run"),
        "pair": {"checkpoint": "toy"},
        "threads": 1,
        "log_every": 1,
        "save_minutes": 0.0,
        "keep_checkpoints": 100,
        "data": {
            "folder": str(folder / "data"),
            "source": "symbols",
            "chars_per_token": 1,
            "memory_tokens": [4, 12],
            "tasks": {"copy_symbols": 40, "find_symbol": 40},
        },
        "decoder_tuning": {"method": "lora", "rank": 4, "alpha": 8},
        "stages": [
            {"preset": "align", "steps": 2, "row_tokens": 128},
            {"preset": "decoder", "steps": 10, "row_tokens": 128, "chunk_sizes": {1: 1, 2: 1}, "learning_rates": rates},
        ],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def _training_arguments(folder: Path, tools: Tools) -> list[str]:
    return ["--config", str(folder / "run.yaml"), "--device", "cpu", "--no-export"]


def _trained(folder: Path) -> Finished:
    steps = (folder / "run" / "checkpoints").glob("step_*")
    done = {step.name: sha256_file(step / "trained.safetensors") for step in steps}
    return done | {f"data/{name}": digest for name, digest in _files(folder / "data", "*.jsonl").items()}


def _read_checkpoint(folder: Path) -> list[torch.Tensor]:
    newest = newest_checkpoint(folder / "run")
    if newest is None:
        raise DatasetError("no checkpoint")
    return [tensor for _, tensor in sorted(load_trained(newest).items())]


# RULER: datasets in units, answers row by row.


def _begin_nothing(folder: Path, tools: Tools) -> None:
    """Needs no inputs."""


def _prepare_arguments(folder: Path, tools: Tools) -> list[str]:
    what = [
        "--tasks",
        "niah_single_1,niah_multikey_1,cwe",
        "--lengths",
        "2400,3200",
        "--num-samples",
        "6",
        "--workers",
        "1",
    ]
    tokenizer = ["--tokenizer-path", str(tools.checkpoint / "decoder")]
    return ["prepare", "--output", str(folder / "data"), *tokenizer, "--mode", "balanced", *what]


def _prepared(folder: Path) -> Finished:
    rows = (folder / "data").rglob("validation.jsonl")
    return {str(path.relative_to(folder)): sha256_file(path) for path in rows if ".validation" not in str(path.parent)}


def _begin_answers(folder: Path, tools: Tools) -> None:
    for task in ("niah_single_1", "vt"):
        rows = [
            {
                "index": number,
                "input": f"What is {task} {number}?",
                "outputs": [str(number)],
                "length": 8,
                "answer_prefix": "",
            }
            for number in range(40)
        ]
        write_dataset(folder / "data" / "1024" / task, rows, {"mode": "compat", "max_seq_length": 1024})


def _answer_arguments(folder: Path, tools: Tools) -> list[str]:
    server = ["--backend", "server-text", "--server-url", tools.server_url, "--model", "tiny", "--concurrency", "3"]
    return ["predict", "--data-dir", str(folder / "data"), "--output", str(folder / "run"), *server]


def _answers(folder: Path) -> Finished:
    done = {}
    for path in (folder / "run").rglob("*.jsonl"):
        if path.name.startswith(".") or ".failed" in path.name:
            continue
        # Its last line may be half of one until the next run.
        for line in path.read_bytes().split(b"\n")[:-1]:
            done[f"{path.stem} {json.loads(line)['others']['row']}"] = _digest(line)
    return done


# Converting a checkpoint, and assembling the default one: whole folders.


def _convert_arguments(folder: Path, tools: Tools) -> list[str]:
    return [str(tools.checkpoint), str(folder / "converted"), "--layout", "code-llava", "--overwrite"]


def _converted(folder: Path) -> Finished:
    root = folder / "converted"
    return (
        {"converted": _digest(sorted((name, sha256_file(root / name)) for name in files_of(root)))}
        if root.exists()
        else {}
    )


def _assembled(folder: Path) -> Finished:
    root = folder / "checkpoints" / "code-llava-smollm2"
    if not root.exists():
        return {}
    files = sorted(name for name in files_of(root) if not name.endswith("assembled.json"))
    return {"assembled": _digest([(name, sha256_file(root / name)) for name in files])}


JOBS: dict[str, Job] = {
    "compress": Job(
        module="general.step1_raw_text",
        begin=_begin_compress,
        arguments=_compress_arguments,
        finished=_compressed,
        outputs=("cache/v*/**/*", "rows.*"),
        read=_read_rows,
    ),
    "corpus": Job(
        module="utils.corpus.__main__",
        begin=_begin_corpus,
        arguments=_corpus_arguments,
        finished=_encoded,
        outputs=("out/*",),
        read=_read_corpus,
    ),
    "corpus to cache": Job(
        module="utils.corpus.__main__",
        begin=_begin_corpus,
        arguments=_to_cache_arguments,
        finished=_cache,
        outputs=("cache/v*/**/*",),
    ),
    "train": Job(
        module="utils.training.train",
        begin=_begin_training,
        arguments=_training_arguments,
        finished=_trained,
        # The last checkpoint: others are not read again.
        outputs=("run/checkpoints/step_00000012/*", "run/*.json*", "data/*.tokens/**/*", "data/*.json"),
        read=_read_checkpoint,
    ),
    "ruler prepare": Job(
        module="ruler.__main__",
        begin=_begin_nothing,
        arguments=_prepare_arguments,
        finished=_prepared,
        outputs=("data/**/*",),
    ),
    "ruler predict": Job(
        module="ruler.__main__",
        begin=_begin_answers,
        arguments=_answer_arguments,
        finished=_answers,
        outputs=("run/**/*", "data/**/*"),
        unchecked=("run/**/*.jsonl",),
    ),
    "convert": Job(
        module="utils.checkpoint.convert.__main__",
        begin=_begin_nothing,
        arguments=_convert_arguments,
        finished=_converted,
    ),
    "assemble": Job(
        module="utils.checkpoint.describe",
        begin=_begin_nothing,
        arguments=lambda folder, tools: [],
        finished=_assembled,
    ),
}


def complaints(job: Job, folder: Path, reference: Finished, *, at_end: bool) -> Iterator[str]:
    """What is not as in the undisturbed run: things that are finished but different, and in the end what is missing."""
    try:
        done = job.finished(folder)
    except Exception as error:  # whatever a reader meets in a half file is what is looked for
        yield f"cannot be read: {type(error).__name__}: {error}"
        return
    for name, digest in done.items():
        if not is_same(reference.get(name), digest):
            yield f"{name} is {'another' if name in reference else 'unknown'}"
    if at_end:
        yield from (f"{name} is missing" for name in sorted(reference.keys() - done.keys()))
