"""The tasks: RULER's thirteen configurations and the code tasks, as data.

A task is a family (the module in `ruler/generation/tasks/` that generates it), the family's prompt template and scoring
rule, and the parameters that set it apart from its siblings. This module knows no generator, no tokenizer and no file.

    TASKS["niah_single_2"].params        # {'haystack': 'essay', 'key': 'words', 'value': 'numbers', …}

Source: RULER, arXiv 2404.06654; github.com/NVIDIA/RULER (templates, parameters and token counts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.errors import ConfigError

Metric = Literal["all", "part", "function"]

# Of github.com/NVIDIA/RULER; manifests name the first twelve digits.
REFERENCE_COMMIT = "c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a"


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """One task.

    Attributes:
        name: The name in commands, folders and reports.
        family: The module of `ruler/generation/tasks/` that generates it.
        tokens_to_generate: Tokens of the budget kept free for the answer.
        metric: `all` = mean share of the references found; `part` = any reference found; `function` = the answer is
            the wanted function more than any other one of the context (`ruler/scoring/similarity.py`).
        template: The prompt with `{context}` and the family's own fields, without chat template.
        answer_prefix: What the model's answer starts with; it follows the prompt.
        params: The family's parameters.
    """

    name: str
    family: str
    tokens_to_generate: int
    metric: Metric
    template: str
    answer_prefix: str
    params: Mapping[str, Any] = field(default_factory=dict)


_NIAH_TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
)
_NIAH_PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
_QA_RULE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_QA_TEMPLATE = f"{_QA_RULE}\n\nThe following are given documents.\n\n{{context}}\n\n{_QA_RULE}\n\nQuestion: {{query}}"
_VT_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{num_v} variables are assigned the value {query}, they are: "
)
_CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_CODE_TEMPLATE = "The following are source files of one project. Read them, then answer.\n\n{context}\n\nQuestion: "
_FUNCTIONS_TEMPLATE = (
    "The following are functions of source files, each under the path of its file. Read them, then answer.\n\n"
    "{context}\n\nQuestion: "
)
_NAME_QUESTION = "What is the name of the function that this describes?\n{description}"
_CODE_QUESTION = "Repeat the function that this describes, exactly, without the path of its file.\n{description}"
_NAME_PREFIX, _CODE_PREFIX = " Answer: The name of the function is", " Answer: Here is the function:\n"


def _niah(
    name: str, haystack: str, key: str, value: str, keys: int = 1, values: int = 1, queries: int = 1
) -> TaskConfig:
    params = {"haystack": haystack, "key": key, "value": value}
    counts = {"num_keys": max(keys, queries), "num_values": values, "num_queries": queries}
    return TaskConfig(name, "niah", 128, "all", _NIAH_TEMPLATE, _NIAH_PREFIX, {**params, **counts})


def _code(name: str, tokens_to_generate: int, question: str, prefix: str) -> TaskConfig:
    params = {"kind": name.removeprefix("code_")}
    return TaskConfig(name, "code", tokens_to_generate, "all", _CODE_TEMPLATE + question, f" Answer: {prefix}", params)


def _repoqa(answer: str, language: str) -> TaskConfig:
    name = f"repoqa_{answer}" if language == "python" else f"repoqa_{answer}_{language}"
    params = {"answer": answer, "language": language}
    if answer == "name":
        return TaskConfig(name, "repoqa", 32, "all", _FUNCTIONS_TEMPLATE + _NAME_QUESTION, _NAME_PREFIX, params)
    return TaskConfig(name, "repoqa", 256, "function", _FUNCTIONS_TEMPLATE + _CODE_QUESTION, _CODE_PREFIX, params)


_RULER = (
    _niah("niah_single_1", "noise", "words", "numbers"),
    _niah("niah_single_2", "essay", "words", "numbers"),
    _niah("niah_single_3", "essay", "words", "uuids"),
    _niah("niah_multikey_1", "essay", "words", "numbers", keys=4),
    _niah("niah_multikey_2", "needle", "words", "numbers"),
    _niah("niah_multikey_3", "needle", "uuids", "uuids"),
    _niah("niah_multivalue", "essay", "words", "numbers", values=4),
    _niah("niah_multiquery", "essay", "words", "numbers", queries=4),
    TaskConfig("vt", "variable_tracking", 30, "all", _VT_TEMPLATE, _VT_PREFIX, {"num_hops": 4}),
    TaskConfig("cwe", "common_words", 120, "all", _CWE_TEMPLATE, _CWE_PREFIX,
               {"num_common": 10, "freq_common": 30, "freq_rare": 3}),
    TaskConfig("fwe", "freq_words", 50, "all", _FWE_TEMPLATE, _FWE_PREFIX, {"word_length": 6}),
    TaskConfig("qa_1", "qa", 32, "part", _QA_TEMPLATE, " Answer:", {"dataset": "squad"}),
    TaskConfig("qa_2", "qa", 32, "part", _QA_TEMPLATE, " Answer:", {"dataset": "hotpotqa"}),
)  # fmt: skip

_CODE = (
    _code("code_lookup", 32, "What constant does the function {function} of the file {path} return?",
          "The function {function} returns"),
    _code("code_where", 64, "Which file defines the function {function}? Give its path as shown above.",
          "The function {function} is defined in the file"),
    _code("code_copy", 192, "Repeat the function {function} of the file {path} exactly, character for character.",
          "Here is the function {function}:\n"),
)  # fmt: skip

_REPOQA = tuple(
    _repoqa(answer, language) for language in ("python", "cpp", "javascript") for answer in ("name", "code")
)
_HUMANEVAL = TaskConfig("humaneval_haystack", "humaneval", 32, "all", _FUNCTIONS_TEMPLATE + _NAME_QUESTION,
                        _NAME_PREFIX, {"answer": "name", "language": "python"})  # fmt: skip

RULER_13: tuple[str, ...] = tuple(task.name for task in _RULER)
TASKS: dict[str, TaskConfig] = {task.name: task for task in (*_RULER, *_CODE, *_REPOQA, _HUMANEVAL)}
# Of the report's second table. Those of the extra `code-tasks` are in no group that a plain installation runs.
CODE_TASKS: tuple[str, ...] = tuple(name for name in TASKS if name not in RULER_13)
EXTRA_TASKS: tuple[str, ...] = tuple(
    name for name in TASKS if name == "humaneval_haystack" or TASKS[name].params.get("language") == "javascript"
)
_PLAIN_CODE = tuple(name for name in CODE_TASKS if name not in EXTRA_TASKS)
TASK_GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": RULER_13,
    "code": _PLAIN_CODE,
    "code-extra": EXTRA_TASKS,
    "all": RULER_13 + _PLAIN_CODE,
}
# Their rows are always made one by one, as in the mode `balanced`: there is no reference to follow.
BALANCED_FAMILIES = frozenset(TASKS[name].family for name in CODE_TASKS)


def get_task(name: str) -> TaskConfig:
    """Look a task up.

    Raises:
        ConfigError: There is no such task; the message lists those there are.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ConfigError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}") from None


def resolve_tasks(names: str) -> tuple[str, ...]:
    """Turn `vt,cwe` or names of groups such as `ruler` into task names, in order and once each.

    Raises:
        ConfigError: A name is neither a task nor a group.
    """
    found: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        for task in TASK_GROUPS.get(name, (name,)):
            found[get_task(task).name] = None
    if not found:
        raise ConfigError(f"no task in {names!r}: expected names separated by commas, or {', '.join(TASK_GROUPS)}")
    return tuple(found)


def parse_lengths(text: str) -> list[int]:
    """Lengths such as `4096,32k,1M` (k = 1024, M = 1024²) in tokens.

    Raises:
        ConfigError: One is not a length.
    """
    factors = {"k": 1024, "m": 1024**2}
    lengths = []
    for part in filter(None, (item.strip().lower() for item in text.split(","))):
        number, factor = (part[:-1], factors[part[-1]]) if part[-1] in factors else (part, 1)
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"{part!r} is not a length: expected tokens such as 4096, 32k or 1M")
        lengths.append(int(number) * factor)
    if not lengths:
        raise ConfigError("no length given: expected tokens such as 4096,32k")
    return list(dict.fromkeys(lengths))
