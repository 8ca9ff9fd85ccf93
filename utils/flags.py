"""Command-line flags that several commands share: checkpoint, how it runs, memory files, what of them stays text, the
cache.

Knows no torch, so that `--help` stays fast.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checkpoint.settings import DTYPE_NAMES, EncoderSettings
from utils.compress.latent_cache import LatentCache
from utils.errors import ConfigError, DatasetError, PromptError
from utils.files import decode_text
from utils.model.markers import Marked, Piece
from utils.notebooks import memory_text

if TYPE_CHECKING:
    from utils.compress.select import Expansion
    from utils.model.prompt import MemoryLimit

logger = logging.getLogger(__name__)


def add_checkpoint_flags(parser: argparse.ArgumentParser, per_span_chunk_size: bool = False) -> None:
    """Add the flags that choose a checkpoint and how it runs.

    Args:
        parser: Where to add them.
        per_span_chunk_size: `args.chunk_size` is then a list, one number for all spans or one a span.
    """
    group = parser.add_argument_group("checkpoint")
    group.add_argument(
        *_spellings("--checkpoint", "--model-path"), help="folder, run folder or hub id; default: the embedded one"
    )
    group.add_argument(
        *_spellings("--chunk-size"),
        type=_numbers if per_span_chunk_size else int,
        help="encoder tokens per latent"
        + (" (or one a span: 4,16)" if per_span_chunk_size else "")
        + "; default: the checkpoint's own",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>; default auto")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPE_NAMES,
        help="default auto: as stored, float32 on a CPU without bfloat16",
    )
    group.add_argument(
        *_spellings("--attn-implementation"), help="transformers name (eager, sdpa, …); default: packed encoding"
    )
    group.add_argument("--batch-tokens", type=int, help="tokens of one encoder pass; default: by device")


def add_memory_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Add the limit on a span's length."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        *_spellings("--max-memory-tokens", "--max-code-length"),
        dest="max_code_length",
        type=int,
        help="most encoder tokens of one span; longer is an error; default: no limit",
    )
    group.add_argument(
        "--truncate-memory", action="store_true", help="keep the beginning of a longer span, and report it"
    )


def add_expand_flags(parser: argparse.ArgumentParser) -> None:
    """Add what decides which part of the memory stays text; `expansion(args)` reads them."""
    group = parser.add_argument_group("memory that stays text")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--expand", metavar="SHARE", help="share of the memory tokens that stays text, the rest is latents: 1/16"
    )
    budget.add_argument("--expand-tokens", type=int, metavar="N", help="the same in tokens; default 0")
    group.add_argument("--expand-query", metavar="TEXT", help="select by this; default: what the prompt asks")
    group.add_argument(
        "--expand-policy", metavar="NAME", help="bm25, latents (by similarity), random, all, none; default bm25"
    )


def add_memory_files_flag(group: argparse._ArgumentGroup) -> None:
    """Add `--memory`; `read_memory_files(args.memory)` reads what it names."""
    group.add_argument(
        "--memory", nargs="+", default=[], metavar="FILE", help="plain files, each a span of its own before the prompt"
    )


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """Add the latent cache's flags."""
    group = parser.add_argument_group("latent cache")
    group.add_argument("--no-cache", action="store_true", help="encode everything, store nothing")
    group.add_argument("--cache-dir", help="default $CODE_LLAVA_CACHE_DIR, else ~/.cache/code-llava/latents")


def encoder_settings(args: argparse.Namespace, **changes: Any) -> EncoderSettings:
    """The settings that the flags of `add_checkpoint_flags` describe; `changes` win over them."""
    names = ("device", "dtype", "attn_implementation", "batch_tokens")
    return EncoderSettings(**{**{name: getattr(args, name) for name in names}, **changes})


def memory_limit(args: argparse.Namespace) -> MemoryLimit:
    """The limit that the flags describe."""
    from utils.model.prompt import MemoryLimit

    return MemoryLimit(max_tokens=args.max_code_length, truncate=args.truncate_memory)


def expansion(args: argparse.Namespace) -> Expansion | None:
    """What the flags of `add_expand_flags` say; None where they say nothing.

    Raises:
        ConfigError: They do not go together, or a value is out of range.
    """
    from utils.compress.select import Expansion, read_share

    if args.expand is None and args.expand_tokens is None and args.expand_policy is None:
        if args.expand_query is not None:
            raise ConfigError("--expand-query needs a budget: --expand-tokens 256, or --expand 1/16")
        return None
    share = None
    if args.expand is not None and (share := read_share(args.expand)) is None:
        raise ConfigError(f"--expand must be a share of the memory from 0 to 1, as 1/16 or 0.0625, got {args.expand!r}")
    return Expansion(
        tokens=args.expand_tokens,
        share=share,
        policy=args.expand_policy or "bm25",
        query=args.expand_query,
    )


def open_cache(args: argparse.Namespace) -> LatentCache | None:
    """The cache that the flags describe; None with --no-cache, and (with a warning) where it cannot be used."""
    return None if args.no_cache else LatentCache.open_if_usable(args.cache_dir)


def read_memory_files(paths: Sequence[str]) -> Marked:
    """Files as marked spans, in order, a line end after each; empty ones among others are passed over.

    A notebook is its cells, see `utils.notebooks`.

    Raises:
        PromptError: All files are empty, or one is not text or no notebook.
    """
    texts = {path: _memory_text(path) for path in paths}
    if empty := [path for path, text in texts.items() if not text]:
        if len(empty) == len(texts):
            raise PromptError(f"{', '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty: nothing to compress")
        logger.warning("passed over, for there is nothing in it: %s", ", ".join(empty))
    spans = (Piece(texts[path], True) for path in paths if texts[path])
    return Marked(piece for span in spans for piece in (span, Piece("\n", False)))


def _memory_text(path: str) -> str:
    text = read_text(path)
    try:
        return memory_text(path, text)
    except DatasetError as error:
        raise PromptError(f"{path}: {error}") from None


def read_text(path: str | Path) -> str:
    """Read a text file, every character as it is (line ends included), without its byte order mark.

    Raises:
        PromptError: It is not UTF-8, has no byte order mark of UTF-16 or -32, or holds a zero byte; or is a folder.
    """
    try:
        return decode_bytes(Path(path).read_bytes(), path)
    except IsADirectoryError:
        advice = "name its text files, or encode all of them with python -m utils.corpus"
        raise PromptError(f"{path} is a folder: {advice}") from None


def decode_bytes(data: bytes, where: str | Path) -> str:
    """What `read_text` does with a file's bytes."""
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        wrong = f"{where} is not {error.encoding.upper()} text (byte {error.start}): convert it first"
        raise PromptError(wrong) from None
    if "\0" in text:
        raise PromptError(f"{where} is not text: it holds a zero (character {text.index(chr(0))})")
    return text


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _spellings(*flags: str) -> list[str]:
    """Each flag with hyphens, and the published spelling with underscores as an alias."""
    both = [(flag, "--" + flag[2:].replace("-", "_")) for flag in flags]
    return list(dict.fromkeys(spelling for pair in both for spelling in pair))
