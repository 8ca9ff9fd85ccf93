"""Smoke test: is everything here, and does it compress? Also the list of commands.

    uv run python main.py

Exit code 1 with the reason when something is missing.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

from utils.cli import EXIT_OK, make_parser, run_command
from utils.errors import ConfigError
from utils.files import package_version
from utils.model.markers import wrap

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "openai", "tqdm", "nltk", "wonderwords")
COMMANDS = (
    ("general/step1.py", "compress a chat prompt into an embeddings file"),
    ("general/step1_raw_text.py", "compress a text prompt, or whole source files"),
    ("general/generation_test.py", "send an embeddings file to a vLLM server"),
    ("-m utils.inference.inference", "answer prompts about code from a checkpoint"),
    ("-m utils.corpus", "encode a folder or a JSONL file ahead of its use"),
    ("-m utils.compress.latent_cache", "show, prune, verify or clear the latent cache"),
    ("-m utils.checkpoint.describe", "check and describe a checkpoint"),
    ("-m utils.checkpoint.convert", "trainers' states and LCLM's layout into checkpoints, and back"),
    ("-m utils.serving.gateway", "OpenAI-compatible server that compresses, with a page"),
    ("-m utils.serving.mcp", "a gateway's memories as tools for coding agents"),
    ("-m utils.training.train", "train a pair in stages, resumably"),
    ("-m utils.training.data", "make training data from Python sources"),
    ("-m utils.training.evaluate", "measure what a checkpoint answers from compressed memory"),
    ("-m utils.training.pack", "write a run's trained part as small files"),
    ("-m utils.benchmark", "speed beside its limit"),
    ("-m utils.harness", "lm-evaluation-harness with a checkpoint as its model"),
    ("-m ruler", "RULER: prepare, predict, score, report"),
    ("ruler_minimal/prepare_dataset.py", "small needle, variable and word-count data sets"),
)


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    return make_parser("Check the installation with one small compression, and list the commands.", prog="main.py")


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(_: argparse.Namespace) -> int:
    print(f"code-llava {package_version('code-llava') or '(not installed)'}, Python {platform.python_version()}")
    _print_versions()
    _print_device()
    _compress_something()
    print("\ncommands (uv run python … --help):")
    for command, purpose in COMMANDS:
        print(f"  {command:<34}{purpose}")
    return EXIT_OK


def _print_versions() -> None:
    versions = {name: package_version(name) for name in PACKAGES}
    if missing := [name for name, version in versions.items() if version is None]:
        raise ConfigError(f"not installed: {', '.join(missing)}; run `uv sync`")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))


def _print_device() -> None:
    import torch

    if torch.cuda.is_available():
        print(f"device: cuda, {torch.cuda.get_device_name()}")
    else:
        print(f"device: cpu, {torch.get_num_threads()} threads")


def _compress_something() -> None:
    from utils.checkpoint.default.recipe import is_trained
    from utils.compress.compressor import Compressor

    began = time.perf_counter()
    compressor = Compressor.load()
    loaded = time.perf_counter()
    trained = "trained" if is_trained() else "its adapter is UNTRAINED: shapes and speed are real, answers are not"
    print(f"default checkpoint: {compressor.files.root} ({trained}), loaded in {loaded - began:.1f} s")
    source = Path(__file__).read_text(encoding="utf-8")
    text = f"{wrap(source)}What does this program check?"
    embeds = compressor.compress([compressor.parse_raw(text)])[0]
    seconds = time.perf_counter() - loaded
    stats = embeds.stats
    print(
        f"compressed main.py: {stats.memory_tokens} tokens → {stats.num_latents} latents (ratio {stats.ratio:.1f}), "
        f"prompt embeddings {list(embeds.values_TD.shape)}, {seconds:.2f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
