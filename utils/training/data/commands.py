"""What `python -m utils.training.data` does: each command makes its report."""

from __future__ import annotations

import argparse
from typing import Any

from utils.checkpoint.load import load_tokenizers
from utils.checkpoint.locate import find_checkpoint
from utils.errors import ConfigError
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.processor import Processor
from utils.training.config import DataConfig, PairConfig, load_config
from utils.training.data.build import build_examples
from utils.training.data.cache import TokenCache
from utils.training.data.chat import replayed_answers
from utils.training.data.folder import open_caches, tokenize_folder
from utils.training.data.tasks.chat import CHAT
from utils.training.pairs import DEFAULT, starting_pair


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Write the examples of some tasks."""
    try:
        shortest, longest = (int(part) for part in args.memory_tokens.split("-"))
    except ValueError:
        raise ConfigError(f"--memory-tokens {args.memory_tokens}: expected two numbers such as 64-256") from None
    data = DataConfig(
        folder=str(args.output),
        tasks=_numbers("--tasks", args.tasks),
        memory_tokens=(shortest, longest),
        lengths=args.lengths,
        source=args.source,
        max_files=args.max_files,
        package_weights=_numbers("--package-weights", args.package_weights) if args.package_weights else {},
        chars_per_token=args.chars_per_token,
        question_first=args.question_first,
        scattered=args.scattered,
        seed=args.seed,
    )
    asked = CHAT in data.tasks
    return build_examples(
        data, replayed_answers(data, *_load(PairConfig(checkpoint=args.checkpoint or DEFAULT))) if asked else {}
    )


def tokenize(args: argparse.Namespace) -> dict[str, Any]:
    """Tokenise a folder of JSONL files, where that is not done yet."""
    files = find_checkpoint(args.checkpoint)
    processor = Processor(tokenizers=load_tokenizers(files), chunk_size=files.config.chunk_size)
    caches = tokenize_folder(args.folder, processor)
    if not caches:
        raise ConfigError(f"{args.folder} has no JSONL files: build some first")
    return _report(caches)


def config(args: argparse.Namespace) -> dict[str, Any]:
    """Build and tokenise what a run's configuration asks for."""
    run = load_config(args.path)
    return _report(open_caches(run, *_load(run.pair, run.seed)))


def _report(caches: dict[str, TokenCache]) -> dict[str, Any]:
    return {"tasks": {task: dict(cache.meta) for task, cache in caches.items()}}


def _numbers(flag: str, text: str) -> dict[str, int]:
    """`name=number,name=number` as a dictionary."""
    try:
        return {name: int(number) for name, number in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(f"{flag} {text}: expected NAME=NUMBER,… such as lookup=1000,needle=500") from None


def _load(pair: PairConfig, seed: int = 0) -> tuple[CodeLLaVAModel, Processor]:
    model, tokenizers = starting_pair(pair, seed)
    return model, Processor(tokenizers=tokenizers, chunk_size=model.config.chunk_size)
