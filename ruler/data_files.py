"""The data that samples are made of: essays, questions, words. From a folder of the real files, or built in.

A data folder has the files that the reference program uses, under its names; a missing one is an error that names the
command which fetches it. Without a folder the built-in data is used: text and questions of our own making that may be
given to anyone. What was read is remembered for the manifest.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from ruler.tasks.qa import QuestionSet, read_hotpotqa, read_squad
from ruler.words import WordLists, load_word_lists
from utils.errors import DatasetError
from utils.files import read_json, sha256_bytes, sha256_file

BUILTIN = Path(__file__).parent / "builtin"
ESSAYS, SQUAD, HOTPOTQA, WORDS = "PaulGrahamEssays.json", "squad.json", "hotpotqa.json", "english_words.json"
FETCH_COMMAND = "python -m ruler.fetch_data --data-dir"
_NUM_BUILTIN_WORDS = 100_000


class RulerData:
    """The data of one run, read when first asked for.

    Attributes:
        folder: The user's data folder; None = built in.
        used: File name → what was read (source and sha256), for the manifest.
    """

    def __init__(self, folder: str | Path | None = None, code_folder: str | Path | None = None) -> None:
        """Args:
        folder: Folder with the reference's data files, and the word lists if they are to be others.
        code_folder: Source files for the code tasks; installed packages without it.

        Raises:
            DatasetError: A folder does not exist.
        """
        self.folder = Path(folder) if folder else None
        self.code_folder = Path(code_folder) if code_folder else None
        for given in (self.folder, self.code_folder):
            if given and not given.is_dir():
                raise DatasetError(f"the data folder {given} does not exist: fetch the data ({FETCH_COMMAND} {given})")
        self.used: dict[str, Any] = {}

    @cached_property
    def essay_words(self) -> list[str]:
        """The essays as words."""
        text = self._read(ESSAYS)
        if not isinstance(text, dict) or not isinstance(text.get("text"), str):
            raise DatasetError(f"{ESSAYS} must be an object with the field 'text'")
        return re.sub(r"\s+", " ", text["text"]).split(" ")

    @cached_property
    def squad(self) -> QuestionSet:
        """Questions in the shape of SQuAD v2.0."""
        return self._questions(SQUAD, read_squad)

    @cached_property
    def hotpotqa(self) -> QuestionSet:
        """Questions in the shape of HotpotQA's distractor setting."""
        return self._questions(HOTPOTQA, read_hotpotqa)

    @cached_property
    def english_words(self) -> list[str]:
        """A long list of words, for samples that need more than wonderwords has."""
        if self.folder:
            return [str(word) for word in self._read(WORDS).values()]
        nouns, adjectives = self.word_lists.nouns, self.word_lists.adjectives
        # Compounds such as "quietriver": the noun moves on by one, the adjective too, so that no pair comes twice soon.
        words = (
            adjectives[number % len(adjectives)] + nouns[(number + number // len(nouns)) % len(nouns)]
            for number in range(2 * _NUM_BUILTIN_WORDS)
        )
        found = list(dict.fromkeys(words))[:_NUM_BUILTIN_WORDS]
        self.used[WORDS] = {"source": "built in", "sha256": sha256_bytes("\n".join(found).encode())}
        return found

    @cached_property
    def word_lists(self) -> WordLists:
        """wonderwords' lists, or those in the data folder."""
        own = self.folder if self.folder and (self.folder / "nounlist.txt").exists() else None
        lists = load_word_lists(own)
        self.used["words"] = lists.provenance
        return lists

    def _questions(self, name: str, read: Any) -> QuestionSet:
        try:
            questions: QuestionSet = read(self._read(name))
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{name} has another shape than expected: {type(error).__name__}: {error}") from None
        return questions

    def _read(self, name: str) -> Any:
        if self.folder:
            path = self.folder / name
            if not path.exists():
                raise DatasetError(f"{path} does not exist: fetch it ({FETCH_COMMAND} {self.folder})")
            self.used[name] = {"source": "data folder", "sha256": sha256_file(path)}
            return read_json(path)
        path = BUILTIN / f"{name}.gz"
        self.used[name] = {"source": "built in", "sha256": sha256_file(path)}
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            return json.load(stream)
