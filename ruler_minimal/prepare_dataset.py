"""Write a light long-context dataset: needles, variable tracking or common words, as text and as memory.

Each row has `index`, `input` (the whole prompt as text), `outputs` (the separate right answers),
`input_memory_instruction` and `input_memory_content` (the part to compress, wrapped in the memory markers).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ruler.generation.tokenizers import load_tokenizer
from ruler_minimal.samples import CommonWordsTask, Counter, NeedleTask, Task, VariableTask, count_words
from utils.cli import make_parser, run_command
from utils.errors import ConfigError
from utils.files import write_jsonl

TASKS = ("niah", "variable_tracking", "common_words")
EXAMPLES = """\
  uv run python ruler_minimal/prepare_dataset.py --task niah --num-samples 50 --max-seq-length 8192 --output data
  uv run python ruler_minimal/prepare_dataset.py --task niah --num-keys 4 --tokenizer models/Qwen3-4B"""


def generate_rows(
    task: Task, num_samples: int, max_length: int, seed: int, length_of: Counter
) -> Iterator[dict[str, Any]]:
    """Yield dataset rows; each sample has a random stream of its own, so a longer dataset begins like a shorter one.

    Args:
        task: What to make.
        num_samples: Rows.
        max_length: Of a whole prompt, in the counter's unit.
        seed: Of the dataset.
        length_of: Counts tokens or words.

    Raises:
        DatasetError: Not even the smallest sample fits.
    """
    for index in range(num_samples):
        yield task.make(random.Random(f"{seed}/{task}/{max_length}/{index}"), length_of, max_length).row(index)


@cache
def make_counter(tokenizer: str | None) -> Counter:
    """Tokens of a named tokenizer (folder, `tokenizer.json` or hub id), or words without one."""
    if tokenizer is None:
        return count_words
    loaded = load_tokenizer("hf", tokenizer)
    return lambda text: loaded.count([text])[0]


def build_task(args: argparse.Namespace) -> Task:
    """The task that the flags describe.

    Raises:
        ConfigError: A count is not positive.
    """
    for name in ("num_samples", "max_seq_length", "num_keys", "num_values", "num_chains", "num_hops"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.task == "niah":
        return NeedleTask(num_keys=args.num_keys, num_values=args.num_values)
    if args.task == "variable_tracking":
        return VariableTask(num_chains=args.num_chains, num_hops=args.num_hops)
    return CommonWordsTask(
        top_k=args.top_k_common, freq_common=args.freq_common, freq_rare=args.freq_rare, vocab_size=args.vocab_size
    )


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that all datasets have."""
    parser.add_argument("--num-samples", type=int, default=20, help="rows a dataset (default: 20)")
    parser.add_argument("--max-seq-length", type=int, default=2048,
                        help="longest prompt, in tokens of --tokenizer or else in words (default: 2048)")  # fmt: skip
    parser.add_argument("--tokenizer", "--tokenizer-path", metavar="PATH",
                        help="folder, tokenizer.json or hub id (default: count words)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="of the samples (default: 42)")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that describe a dataset; the evaluation commands have them too."""
    parser.add_argument("--task", choices=TASKS, default="niah", help="(default: niah)")
    add_size_arguments(parser)
    group = parser.add_argument_group("task parameters")
    group.add_argument("--num-keys", type=int, default=1, help="niah: keys asked for (default: 1)")
    group.add_argument("--num-values", type=int, default=1, help="niah: values a key (default: 1)")
    group.add_argument("--num-chains", type=int, default=2, help="variable_tracking: chains (default: 2)")
    group.add_argument("--num-hops", type=int, default=4, help="variable_tracking: steps a chain (default: 4)")
    group.add_argument("--top-k-common", type=int, default=5, help="common_words: words asked for (default: 5)")
    group.add_argument("--freq-common", type=int, default=8, help="common_words: times a common word (default: 8)")
    group.add_argument("--freq-rare", type=int, default=2, help="common_words: times a rare word (default: 2)")
    group.add_argument("--vocab-size", type=int, default=20, help="common_words: different words (default: 20)")


def build_parser() -> argparse.ArgumentParser:
    """Declare the published flags, and `--tokenizer`."""
    parser = make_parser("Write a light long-context dataset of one task.", EXAMPLES)
    add_task_arguments(parser)
    parser.add_argument("--output", "--output-dir", type=Path, default=Path("data"), help="folder (default: data)")
    parser.add_argument("--filename", default="niah.jsonl", help="file in it (default: niah.jsonl)")
    return parser


def write_dataset(path: Path, task: Task, args: argparse.Namespace) -> None:
    """Write a dataset of the sizes that the flags give."""
    length_of = make_counter(args.tokenizer)
    write_jsonl(path, generate_rows(task, args.num_samples, args.max_seq_length, args.seed, length_of))


def run(args: argparse.Namespace) -> int:
    """Write the dataset and print its path."""
    path = args.output / args.filename
    write_dataset(path, build_task(args), args)
    print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
