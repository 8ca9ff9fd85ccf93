"""Write the thirteen default datasets of the light toolkit, one file each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ruler_minimal.prepare_dataset import add_size_arguments, write_dataset
from ruler_minimal.samples import CommonWordsTask, NeedleTask, Task, VariableTask
from utils.cli import make_parser, run_command

CONFIGURATIONS: dict[str, Task] = {
    "niah_1_key_1_value": NeedleTask(),
    "niah_2_keys_1_value": NeedleTask(num_keys=2),
    "niah_4_keys_1_value": NeedleTask(num_keys=4),
    "niah_8_keys_1_value": NeedleTask(num_keys=8),
    "niah_1_key_2_values": NeedleTask(num_values=2),
    "niah_1_key_4_values": NeedleTask(num_values=4),
    "niah_4_keys_4_values": NeedleTask(num_keys=4, num_values=4),
    "variable_tracking_1_chain_2_hops": VariableTask(num_chains=1, num_hops=2),
    "variable_tracking_2_chains_4_hops": VariableTask(),
    "variable_tracking_4_chains_8_hops": VariableTask(num_chains=4, num_hops=8),
    "common_words_top_3": CommonWordsTask(top_k=3),
    "common_words_top_5": CommonWordsTask(),
    "common_words_top_10": CommonWordsTask(top_k=10, freq_common=12, freq_rare=3, vocab_size=60),
}
EXAMPLES = """\
  uv run python ruler_minimal/generate_all_data.py --num-samples 200 --output data/minimal
  uv run python ruler_minimal/generate_all_data.py --max-seq-length 32768 --tokenizer models/Qwen3-4B"""


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = make_parser(__doc__.strip(), EXAMPLES)
    add_size_arguments(parser)
    parser.add_argument(
        "--output", "--output-root", type=Path, default=Path("data"), help="folder for the files (default: data)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the datasets and print their paths."""
    for name, task in CONFIGURATIONS.items():
        path = args.output / f"{name}.jsonl"
        write_dataset(path, task, args)
        print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
