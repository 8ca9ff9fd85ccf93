"""`python -m ruler.fetch_data`: fetch the real data files of RULER into a folder, each checked by its sha256.

SQuAD and HotpotQA are CC BY-SA 4.0, the word list comes with the reference program. The essays are under their author's
copyright and are offered by nobody as one file: the reference program's own script collects them, and `--essays` takes
the result.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ruler.generation.data_files import ESSAYS, HOTPOTQA, SQUAD, WORDS
from ruler.registry import REFERENCE_COMMIT
from utils.cli import make_parser, run_command
from utils.errors import DatasetError
from utils.files import atomic_path, sha256_file

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python -m ruler.fetch_data --data-dir ruler_data
  python -m ruler.fetch_data --data-dir ruler_data --essays PaulGrahamEssays.json"""

_KNOWN_ESSAYS = "58e352531a80cef2d22c205dbebfbfd64a8afe55a32434de845f200718756c65"
_TIMEOUT_S = 60.0


# File name → (URL, sha256) of the places where it can be had; the first one that answers is taken.
Places = Sequence[tuple[str, str]]
SOURCES: dict[str, Places] = {
    SQUAD: [
        (
            "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
            "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
        )
    ],
    HOTPOTQA: [
        (
            "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json",
            "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
        ),
        # The same questions in another JSON layout, pinned by its revision.
        (
            "https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/7e54db4656209750ff487f6fdf8e39a66dba136b/"
            "hotpot_dev_distractor_v1.json",
            "e3da074df24e8369009918aa5cdbdd254dadcde4c63f7569d36afd6f2268caa8",
        ),
    ],
    WORDS: [
        (
            f"https://raw.githubusercontent.com/NVIDIA/RULER/{REFERENCE_COMMIT}/"
            "scripts/data/synthetic/json/english_words.json",
            "affcd6d45fdf3cc843d585c99c97ad615094e760e6c4756b654bab6c73bc2eca",
        )
    ],
}


def fetch(target: Path, places: Places) -> bool:
    """Fetch a file unless it is there already.

    Returns:
        Whether it was fetched.

    Raises:
        DatasetError: No place gives the file with its sha256, or another file has its name.
    """
    if target.exists():
        found = sha256_file(target)
        if found in {digest for _, digest in places}:
            return False
        raise DatasetError(f"{target} is another file than RULER's (sha256 {found[:16]}…): move it away first")
    import httpx  # takes half a second

    failures = []
    for url, digest in places:
        logger.info("fetching %s", url)
        try:
            with atomic_path(target) as temporary:
                with (
                    temporary.open("wb") as stream,
                    httpx.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT_S) as response,
                ):
                    response.raise_for_status()
                    for block in response.iter_bytes():
                        stream.write(block)
                if (found := sha256_file(temporary)) != digest:
                    raise DatasetError(f"it has sha256 {found[:16]}…, expected {digest[:16]}…")
        except (httpx.HTTPError, DatasetError) as error:
            failures.append(f"{url}: {error}")
        else:
            return True
    raise DatasetError(f"{target.name} could not be fetched: {'; '.join(failures)}")


def take_essays(path: Path, folder: Path) -> None:
    """Copy an essay file made by the reference's script.

    Raises:
        DatasetError: There is no such file.
    """
    if not path.is_file():
        raise DatasetError(f"{path} does not exist: make it with the reference's script (see ruler/RULER/README.md)")
    digest = sha256_file(path)
    if digest != _KNOWN_ESSAYS:
        # The pages change now and then; the manifest of each dataset says which text it used.
        logger.warning("%s has sha256 %s…, a known copy has %s…", path, digest[:16], _KNOWN_ESSAYS[:16])
    with atomic_path(folder / ESSAYS) as temporary:
        shutil.copyfile(path, temporary)


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = make_parser(
        "Fetch RULER's data files, each checked by its sha256.", EXAMPLES, "python -m ruler.fetch_data"
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder for the files")
    parser.add_argument("--essays", type=Path, help="PaulGrahamEssays.json as the reference's script made it")
    return parser


def run(args: argparse.Namespace) -> int:
    """Fetch what is missing."""
    args.data_dir.mkdir(parents=True, exist_ok=True)
    if args.essays:
        take_essays(args.essays, args.data_dir)
    for name, places in SOURCES.items():
        state = "fetched" if fetch(args.data_dir / name, places) else "there already"
        print(f"{args.data_dir / name}: {state}")
    if not (args.data_dir / ESSAYS).exists():
        logger.warning("%s is missing: collect it (ruler/RULER/README.md) and pass --essays", args.data_dir / ESSAYS)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
