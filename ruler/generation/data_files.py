"""The data that samples are made of: essays, questions, words. From a folder of the real files, or built in.

A data folder has the files that the reference program uses, under its names; a missing one is an error that names the
command which fetches it. Without a folder the built-in data is used: text and questions of our own making that may be
given to anyone.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from ruler.generation.code_files import CodeFiles, read_code_folder, read_installed_code
from ruler.generation.humaneval import HUMAN_EVAL, Problems, load_problems
from ruler.generation.tasks.qa import QuestionSet, read_hotpotqa, read_squad
from ruler.generation.tasks.repoqa import FunctionPool
from ruler.generation.words import WordLists, load_word_lists
from ruler.registry import TaskConfig
from utils.errors import DatasetError
from utils.files import read_json, sha256_file

BUILTIN = Path(__file__).parents[1] / "builtin"
ESSAYS, SQUAD, HOTPOTQA, WORDS = "PaulGrahamEssays.json", "squad.json", "hotpotqa.json", "english_words.json"
FETCH_COMMAND = "python -m ruler.fetch_data --data-dir"
_QUESTIONS: dict[str, tuple[str, Callable[[Any], QuestionSet]]] = {
    "squad": (SQUAD, read_squad),
    "hotpotqa": (HOTPOTQA, read_hotpotqa),
}
_BUILTIN_NAMES = {ESSAYS: "haystack.json"}
_NUM_BUILTIN_WORDS = 100_000


class RulerData:
    """The data of one run, read when first asked for.

    Args:
        folder: Folder with the reference's data files, and the word lists if they are to be others; None = built in.
        code_folder: Source files for the code tasks; None = installed packages.

    Raises:
        DatasetError: A folder does not exist.
    """

    def __init__(self, folder: str | Path | None = None, code_folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder else None
        self.code_folder = Path(code_folder) if code_folder else None
        self._questions: dict[str, QuestionSet] = {}
        self._functions: dict[str, FunctionPool] = {}
        for given in (self.folder, self.code_folder):
            if given and not given.is_dir():
                raise DatasetError(f"the data folder {given} does not exist: fetch the data ({FETCH_COMMAND} {given})")

    def sources(self, task: TaskConfig) -> dict[str, Any]:
        """What the rows of a task are made of, for its manifest: file name → origin and sha256."""
        names = []
        if task.params.get("haystack") == "essay":
            names = [ESSAYS]
        elif task.family == "qa":
            names = [_QUESTIONS[task.params["dataset"]][0]]
        elif task.family == "common_words" and self.folder and (self.folder / WORDS).exists():
            names = [WORDS]  # only the longest prompts read it
        sources: dict[str, Any] = {name: self._source(name) for name in names}
        if task.family == "common_words" or task.params.get("key") == "words":
            sources["words"] = self.word_lists.provenance
        if task.family == "code":
            sources["code"] = self.code_files("python").provenance
        if task.family in ("repoqa", "humaneval"):
            files = self.code_files(task.params["language"])
            sources["code"] = {**files.provenance, "licences": files.licences}
        if task.family == "humaneval":
            sources[HUMAN_EVAL] = self.problems.origin
        return sources

    @cached_property
    def essay_words(self) -> list[str]:
        """The essays as words."""
        text = self._read(ESSAYS)
        if not isinstance(text, dict) or not isinstance(text.get("text"), str):
            raise DatasetError(f"{ESSAYS} must be an object with the field 'text'")
        return re.sub(r"\s+", " ", text["text"]).split(" ")

    def questions(self, dataset: str) -> QuestionSet:
        """Questions in the shape of SQuAD v2.0 (`squad`) or of HotpotQA's distractor setting (`hotpotqa`)."""
        if dataset not in self._questions:
            name, read = _QUESTIONS[dataset]
            try:
                self._questions[dataset] = read(self._read(name))
            except (KeyError, TypeError, ValueError) as error:
                raise DatasetError(f"{name} has another shape than expected: {type(error).__name__}: {error}") from None
        return self._questions[dataset]

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
        return list(dict.fromkeys(words))[:_NUM_BUILTIN_WORDS]

    @cached_property
    def word_lists(self) -> WordLists:
        """wonderwords' lists, or those in the data folder."""
        own = self.folder if self.folder and (self.folder / "nounlist.txt").exists() else None
        return load_word_lists(own)

    @cached_property
    def problems(self) -> Problems:
        """HumanEval's problems."""
        return load_problems(self.folder)

    def code_files(self, language: str) -> CodeFiles:
        """Source files of one language for the code tasks."""
        return self.functions(language).files

    def functions(self, language: str) -> FunctionPool:
        """The functions of the source files of one language."""
        if language not in self._functions:
            folder = self.code_folder
            files = read_code_folder(folder, language) if folder else read_installed_code(language)
            self._functions[language] = FunctionPool(files, language)
        return self._functions[language]

    def _source(self, name: str) -> dict[str, str]:
        return {"source": "data folder" if self.folder else "built in", "sha256": sha256_file(self._path(name))}

    def _path(self, name: str) -> Path:
        if not self.folder:
            return BUILTIN / f"{_BUILTIN_NAMES.get(name, name)}.gz"
        path = self.folder / name
        if not path.exists():
            raise DatasetError(f"{path} does not exist: fetch it ({FETCH_COMMAND} {self.folder})")
        return path

    def _read(self, name: str) -> Any:
        path = self._path(name)
        if path.suffix != ".gz":
            return read_json(path)
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            return json.load(stream)
