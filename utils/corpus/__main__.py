"""Encode a whole corpus ahead of its use: a folder or a JSONL file → latents in shards, or in the latent cache.

    uv run python -m utils.corpus src --include "*.py" --output artifacts/corpus
    uv run --extra ray python -m utils.corpus src --output artifacts/corpus --workers 2

Run the same command again to resume what was interrupted, or to encode what changed. Formats, order, exactness and
limits: docs/corpus.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from utils.checkpoint.locate import find_checkpoint
from utils.cli import EXIT_FAILED_ROWS, EXIT_OK, make_parser, print_json, run_command
from utils.compress.latent_cache import default_cache_dir, parse_size
from utils.corpus.index import SKIPPED_FILE
from utils.corpus.source import MAX_TEXT_BYTES, FolderSource, JsonlSource, Source
from utils.errors import ConfigError
from utils.files import check_name
from utils.flags import add_checkpoint_flags, encoder_settings


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = make_parser(
        "Encode a folder of texts, or the lines of a JSONL file, into latents.",
        examples="""\
  uv run python -m utils.corpus src --include "*.py" --output artifacts/corpus
  uv run python -m utils.corpus corpus.jsonl --text-field content --id-field path --to-cache
  uv run --extra ray python -m utils.corpus src --output artifacts/corpus --workers 2""",
        prog="python -m utils.corpus",
    )
    _add_corpus_flags(parser)
    add_checkpoint_flags(parser)
    output = parser.add_argument_group("output")
    where = output.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", metavar="DIR", help="write shards and an index into this folder")
    where.add_argument("--to-cache", action="store_true", help="fill the latent cache: prompts over these texts hit it")
    output.add_argument("--cache-dir", help="default $CODE_LLAVA_CACHE_DIR, else ~/.cache/code-llava/latents")
    output.add_argument(
        "--shard-size", type=parse_size, default=1 << 20, help="text of a shard, what a kill can cost; default 1M"
    )
    output.add_argument("--prune", action="store_true", help="remove shards of which nothing is in the corpus any more")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, help="Ray Data workers; default: none, this process encodes")
    work.add_argument("--ray-address", help="run on this Ray cluster; default with --workers: on this machine")
    work.add_argument("--engine", choices=("ray",), help="ray: with Ray Data, one worker a GPU without --workers")
    work.add_argument("--threads", type=int, help="CPU threads of each worker; default: its share of the cores")
    work.add_argument(
        "--compile", action="store_true", help="compile the encoder (CUDA: captured graphs): for hours, not for minutes"
    )
    return parser


def _add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("corpus")
    group.add_argument("corpus", help="a folder, or a .jsonl file")
    group.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="names or paths to take; default all not hidden"
    )
    group.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="names or paths to leave out")
    group.add_argument("--text-field", help="JSONL: key of the text; default text")
    ids = group.add_mutually_exclusive_group()
    ids.add_argument("--id-field", help="JSONL: key of the unique id; default id")
    ids.add_argument("--line-ids", action="store_true", help="JSONL: the line's number is the id")
    group.add_argument(
        "--max-text-size",
        type=parse_size,
        default=MAX_TEXT_BYTES,
        metavar="SIZE",
        help="largest file or line of JSONL to take; default 16M",
    )
    group.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out, and list, what cannot be encoded; default: refuse, except for files that are no text",
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    for name in ("threads", "workers", "shard_size", "max_text_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.cache_dir and not args.to_cache:
        raise ConfigError("--cache-dir is for --to-cache: shards do not use the latent cache")
    if args.prune and not args.output:
        raise ConfigError("--prune is for --output: the latent cache makes room by itself")
    written = Path(args.output or args.cache_dir or default_cache_dir()).expanduser().absolute()
    if args.output:
        check_name(written)
    source = _source(args, written)
    files = find_checkpoint(args.checkpoint, args.chunk_size)
    files = replace(files, root=files.root.resolve())  # Ray's workers may stand in another folder

    from utils.corpus.encode import CorpusJob, encode_here
    from utils.corpus.ray import encode_with_ray
    from utils.corpus.run import encode_corpus
    from utils.corpus.shards import CorpusOutput

    job = CorpusJob(
        source=source,
        files=files,
        settings=encoder_settings(args, compiled=args.compile),
        output=CorpusOutput.of(written, source, files, args.dtype) if args.output else None,
        cache_dir=written if args.to_cache else None,
        threads=args.threads,
    )
    engine = encode_here
    if args.engine or args.workers or args.ray_address:
        engine = partial(encode_with_ray, workers=args.workers, address=args.ray_address)
    summary = encode_corpus(
        job,
        shard_bytes=args.shard_size,
        skip_unreadable=args.skip_unreadable,
        prune=args.prune,
        engine=engine,
    )
    if args.json:
        print_json(summary)
    else:
        sys.stdout.write(_for_a_person(summary))
    return EXIT_FAILED_ROWS if summary["missing"] else EXIT_OK


def _source(args: argparse.Namespace, written: Path) -> Source:
    """The corpus, without the folder that this run writes."""
    path = Path(args.corpus).expanduser().absolute()
    flag = "--output" if args.output else "--cache-dir"
    if path.is_dir():
        if args.text_field or args.id_field or args.line_ids:
            raise ConfigError(f"{path} is a folder: --text-field, --id-field and --line-ids are for JSONL files")
        own, root = PurePath(os.path.realpath(written)), PurePath(os.path.realpath(path))
        if own == root:
            raise ConfigError(f"{flag} {written} is the corpus itself: choose another folder")
        # What an earlier run wrote is no document of the next one.
        left_out = (own.relative_to(root).as_posix(),) if own.is_relative_to(root) else ()
        return FolderSource(str(path), tuple(args.include), tuple(args.exclude), left_out, args.max_text_size)
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give a folder, or a .jsonl file")
    if path.suffix != ".jsonl":
        raise ConfigError(f"{path} is neither a folder nor a .jsonl file: put single files into a folder")
    if args.include or args.exclude:
        raise ConfigError(f"{path} is a file: --include and --exclude are for folders")
    if args.output and (written / SKIPPED_FILE).exists() and (written / SKIPPED_FILE).samefile(path):
        raise ConfigError(f"{flag} {written} would write over the corpus itself: choose another folder")
    id_field = None if args.line_ids else args.id_field or "id"
    return JsonlSource(str(path), args.text_field or "text", id_field, args.max_text_size)


def _for_a_person(summary: dict[str, Any]) -> str:
    ratio = summary["memory_tokens"] / max(1, summary["num_latents"])
    lines = [
        f"corpus     {summary['documents']} documents, {summary['memory_tokens']} tokens → {summary['num_latents']} "
        f"latents, ratio {ratio:.1f}",
        f"in         {summary.get('output') or summary['cache']}"
        + (f", {summary['shards']} shards and an index" if "shards" in summary else ""),
        f"this run   {summary['encoded_documents']} documents, {summary['encoded_tokens']} tokens encoded, "
        f"{summary['tokens_per_second']} tokens/s, {summary['seconds']} s",
    ]
    for name, words in (
        ("empty", "documents are empty and have no latents"),
        ("problems", "documents were skipped, see skipped.jsonl"),
        ("missing", "documents vanished or changed meanwhile: run the same command again"),
        ("unused_shards", "shards hold nothing of the corpus any more: --prune removes them"),
    ):
        if summary.get(name):
            lines.append(f"note       {summary[name]} {words}")
    return "\n".join(lines) + "\n"


def _terminate(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    # As Ctrl-C does, so that temporary files are removed.
    signal.signal(signal.SIGTERM, _terminate)
    raise SystemExit(main())
