"""`python -m utils.benchmark NAME`: one thing measured beside its limit; a table, and one JSON line last.

Compare the ratios inside one run, not seconds between runs: machines are shared and noisy. A benchmark is a row of
`BENCHMARKS` and a module of the same name with `run(args)`, which returns a table and the figures of its result.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import EXIT_OK, make_parser, print_json, run_command
from utils.files import write_json, write_text
from utils.flags import add_checkpoint_flags

_CONFIGS = "utils/training/configs"
Value = int | float | str | list[int] | None


class Flag(NamedTuple):
    """A flag, its default, what it means, and its default with `--quick` where that is another."""

    name: str
    default: Value
    help: str
    quick: Value = None


class Benchmark(NamedTuple):
    """What a benchmark measures, its own flags, and whether it takes those of a checkpoint."""

    description: str
    flags: Sequence[Flag]
    takes_checkpoint: bool = True


_TOKENS = Flag("--tokens", 16384, "memory tokens", quick=1024)
_REPEATS = Flag("--repeats", 3, "counted rounds", quick=1)
BENCHMARKS = {
    "encode": Benchmark(
        "encoder throughput for mixed spans, beside the bare encoder forward",
        [
            _TOKENS,
            Flag("--spans", [1, 20, 200, 2000], "numbers of spans that the tokens are cut into", quick=[1, 20]),
            Flag("--bare-batches", [1, 2, 4, 8], "windows of a bare forward pass", quick=[1, 2]),
            Flag("--repeats", 5, "counted rounds", quick=1),
        ],
    ),
    "ttft": Benchmark(
        "time to the first token, compressed beside full text",
        [
            Flag("--tokens", [1024, 2048, 4096, 8000], "memory tokens", quick=[256, 512]),
            Flag("--also-chunk-sizes", [8, 16, 32], "further chunk sizes at the first length", quick=[]),
            Flag("--spans", 1, "spans that the memory is cut into"),
            _REPEATS,
        ],
    ),
    "memory": Benchmark(
        "peak memory of encoding long memories",
        [
            Flag(
                "--tokens",
                [16384, 65536, 262144],
                "memory tokens; the first is what others are compared with",
                [512, 1024],
            )
        ],
    ),
    "cache": Benchmark(
        "cached prompts to embeddings, beside encoding them",
        [_TOKENS, Flag("--spans", 8, "files in the prompt", quick=3), _REPEATS],
    ),
    "load": Benchmark(
        "time from the command to its first output, beside bare imports and the encoder",
        [Flag("--repeats", 5, "counted rounds, after one to warm up", quick=1)],
    ),
    "generate": Benchmark(
        "generation for prompts of mixed lengths, batched in several ways",
        [
            Flag("--prompts", 8, "how many", quick=4),
            Flag("--shortest", 64, "memory tokens of the shortest"),
            Flag("--longest", 2048, "memory tokens of the longest", quick=256),
            Flag("--new-tokens", 16, "of each prompt", quick=3),
            Flag("--batch-size", 4, "prompts of a batch", quick=2),
            _REPEATS,
        ],
    ),
    "pooling": Benchmark(
        "tokens that a linear map reads back from a pooled vector, by kind of pooling",
        [
            Flag("--tokens", 65536, "tokens of source text", quick=4096),
            Flag("--chunk-sizes", [2, 4, 8, 16], "encoder tokens per latent", quick=[4]),
        ],
    ),
    "selection": Benchmark(
        "how often the answer is among the text that is selected, by policy and budget",
        [
            Flag("--tasks", "lookup,which_file,next_lines,needle", "of held-out code, with commas"),
            Flag(
                "--ruler-tasks",
                "niah_single_2,niah_multikey_3,vt,qa_2,code_where",
                "of RULER, those whose answer stands in the text, with commas; may be empty",
                quick="niah_single_2",
            ),
            Flag("--policies", "bm25,random,answer", "with commas"),
            Flag("--memory-tokens", [500, 4000], "shortest and longest memory of held-out code"),
            Flag("--ruler-lengths", "4k", "budgets of RULER rows in tokens", quick="1k"),
            Flag("--parts", [32, 16, 8, 4], "budgets: the memory's tokens divided by each"),
            Flag("--num-examples", 100, "of each task", quick=5),
            Flag("--seed", 1000, "of the examples"),
        ],
        takes_checkpoint=False,
    ),
    "training": Benchmark(
        "training steps beside the HF Trainer on plain text",
        [
            Flag("--config", f"{_CONFIGS}/cpu_default.yaml", "YAML file of the run", quick=f"{_CONFIGS}/toy.yaml"),
            Flag("--device", "auto", "auto or cpu"),
            Flag("--steps", 4, "counted steps of a process, after one more", quick=2),
            _REPEATS,
        ],
        takes_checkpoint=False,
    ),
    "ruler": Benchmark(
        "RULER rows a second",
        [
            Flag("--tokenizer-path", None, "tokenizer folder, file or hub id; default: the embedded decoder's"),
            Flag("--tasks", "all", "names with commas, or ruler, code, code-extra, all", quick="niah_single_1"),
            Flag("--lengths", "4k,32k,128k", "budgets in tokens", quick="1k"),
            Flag("--modes", "compat,balanced", "modes with commas", quick="compat"),
            Flag("--num-samples", 20, "rows of a run", quick=2),
            Flag("--data-dir", None, "folder of the data files; default: built-in data"),
            _REPEATS,
        ],
        takes_checkpoint=False,
    ),
    "gateway": Benchmark(
        "latency that a running gateway adds, at several numbers of clients",
        [
            Flag("--gateway-url", "http://127.0.0.1:8080", "the gateway"),
            Flag("--backend-url", "http://127.0.0.1:8000", "its backend"),
            Flag("--clients", [1, 16], "clients at once", quick=[1]),
            Flag("--requests", 4, "counted requests of a client and way", quick=1),
            Flag("--seconds", 0.0, "at least so long for each number of clients, both ways in turn"),
            Flag("--lines", 40, "lines of code in a client's memory", quick=4),
            Flag("--expand", None, "share of a memory that stays text in a third way, such as 1/16"),
        ],
    ),
}


def build_parser(quick: bool = False) -> argparse.ArgumentParser:
    """Flags of the command: one subcommand a benchmark.

    Args:
        quick: With the smaller defaults.
    """
    parser = make_parser(
        "Measure speed beside its limit.",
        examples="""\
  uv run python -m utils.benchmark encode
  uv run python -m utils.benchmark encode --tokens 4096 --spans 1,50 --repeats 3 --dtype float32
  uv run python -m utils.benchmark ttft --tokens 1024,4096 --json > ttft.json
  uv run python -m utils.benchmark memory --quick""",
        prog="python -m utils.benchmark",
    )
    subcommands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        sub = subcommands.add_parser(name, help=benchmark.description, description=benchmark.description)
        if benchmark.takes_checkpoint:
            add_checkpoint_flags(sub)
        group = sub.add_argument_group("benchmark")
        for flag in benchmark.flags:
            _add(group, flag, quick)
        group.add_argument("--quick", action="store_true", help="small sizes: does it work, not how fast it is")
        group.add_argument("--json", action="store_true", help="the result as JSON only, without the table")
        group.add_argument("--output", help="also write result.json and table.md to this folder")
    return parser


class _Numbers(argparse.Action):
    """`--spans 1,20`, and as it was once written, `--spans 1 20`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            numbers = [int(number) for word in values for number in word.split(",") if number]
        except ValueError:
            parser.error(f"argument {option_string}: expected whole numbers with commas, got {' '.join(values)}")
        setattr(namespace, self.dest, numbers)


def _add(group: Any, flag: Flag, quick: bool) -> None:
    default = flag.quick if quick and flag.quick is not None else flag.default
    if isinstance(default, list):
        shown, how = ",".join(map(str, default)), {"nargs": "*", "action": _Numbers, "metavar": "N,…"}
    else:
        shown, how = str(default), {"type": str if default is None else type(default)}
    note = "" if default is None else f"; default {shown}"
    group.add_argument(flag.name, help=flag.help + note, default=default, **how)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(build_parser("--quick" in argv), _run, argv)


def _run(args: argparse.Namespace) -> int:
    flags = {
        name: value for name, value in vars(args).items() if name not in ("benchmark", "verbose", "json", "output")
    }
    # After --help: these modules load torch.
    measure = importlib.import_module("utils.benchmark.measure")
    table, figures = importlib.import_module(f"utils.benchmark.{args.benchmark}").run(args)
    result = {"benchmark": args.benchmark, **figures, "flags": flags, "machine": measure.machine()}
    if args.output:
        write_text(Path(args.output) / "table.md", f"# {args.benchmark}\n\n{table}\n")
        write_json(Path(args.output) / "result.json", result)
    if not args.json:
        print(table)
    print_json(result)
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
