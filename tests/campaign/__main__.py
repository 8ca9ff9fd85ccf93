"""The standing campaign: whatever clients send, disks refuse, files hold and signals end, nothing is lost or hangs.

    uv run python -m tests.campaign                 # all of it, about half an hour
    uv run python -m tests.campaign kills --kills 500 --seed 7

Each part counts what was tried, what went through, what was refused as it should be, and what failed. What it draws
depends on the seed alone; when a signal strikes does not. `test_campaign.py` is a short run of every part.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from tests.campaign import damages, flat_memory, hostile_requests, kills, odd_clients
from tests.campaign.figures import Figures
from tests.campaign.jobs import JOBS, Tools, running_tools
from utils.cli import EXIT_ERROR, EXIT_OK, make_parser, print_json, run_command
from utils.files import provenance

PARTS = ("requests", "clients", "kills", "damages", "disks", "memory")


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m tests.campaign`."""
    parser = make_parser(
        "Attack the gateway, kill, starve and damage what commands write; print what was tried and what failed.",
        examples="""\
  uv run python -m tests.campaign
  uv run python -m tests.campaign kills damages --seed 7
  uv run python -m tests.campaign memory --minutes 60""",
        prog="python -m tests.campaign",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--requests", type=int, default=2000, help="hostile requests; default 2000")
    parser.add_argument("--clients", type=int, default=1000, help="odd clients; default 1000")
    parser.add_argument("--kills", type=int, default=20, help="kills of each command; default 20")
    parser.add_argument("--damages", type=int, default=60, help="damaged files of each command; default 60")
    parser.add_argument("--disks", type=int, default=15, help="full disks under each command; default 15")
    parser.add_argument("--minutes", type=float, default=10, help="of load on one gateway; default 10")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    parts = args.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        build_parser().error(f"unknown parts: {', '.join(sorted(unknown))}")
    all_figures = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="code-llava-campaign-") as folder, running_tools(Path(folder)) as tools:
        for figures in _figures(args, set(parts), Path(folder), tools):
            all_figures.append(figures)
            print(figures.line(), file=sys.stderr if args.json else sys.stdout, flush=True)
            for failure in figures.failures:
                print(f"  {failure}", file=sys.stderr, flush=True)
    failed = sum(len(figures.failures) for figures in all_figures)
    if args.json:
        seconds = round(time.monotonic() - began)
        figures_json = [figures.to_json() for figures in all_figures]
        print_json({"seed": args.seed, "seconds": seconds, "provenance": provenance(), "parts": figures_json})
    return EXIT_ERROR if failed else EXIT_OK


def _figures(args: argparse.Namespace, parts: set[str], folder: Path, tools: Tools) -> Iterator[Figures]:
    if "requests" in parts:
        yield from hostile_requests.run(folder / "requests", tools, args.requests // 2, args.seed)
    if "clients" in parts:
        yield odd_clients.run(folder / "clients", tools, args.clients, args.seed)
    for name, job in JOBS.items():
        if "kills" in parts:
            # Assembling the default checkpoint takes as long as everything else.
            count = args.kills if name != "assemble" else -(-args.kills // 4)
            yield kills.run(folder / "kills" / name, tools, name, count, args.seed)
        if "damages" in parts and job.outputs:
            yield damages.run(folder / "damages" / name, tools, name, args.damages, args.seed)
        if "disks" in parts and name != "assemble":
            yield damages.run_on_full_disks(folder / "disks" / name, tools, name, args.disks, args.seed)
    if "memory" in parts:
        yield flat_memory.run(folder / "memory", tools, args.minutes, args.seed)


if __name__ == "__main__":
    sys.exit(main())
