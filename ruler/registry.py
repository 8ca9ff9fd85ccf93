"""The tasks: RULER's thirteen configurations and our code tasks, as data.

A task is a family (the module in `ruler/tasks/` that generates it), the family's prompt template and scoring rule, and
the parameters that set it apart from its siblings. This module knows no generator, no tokenizer and no file.

    TASKS["niah_single_2"].params        # {'haystack': 'essay', 'key': 'words', 'value': 'numbers', …}

Source: RULER, arXiv 2404.06654; github.com/NVIDIA/RULER (templates, parameters and token counts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.errors import ConfigError

Metric = Literal["all", "part"]

REFERENCE_COMMIT = "c3f5e3b4f87f"
REFERENCE_URL = "https://github.com/NVIDIA/RULER"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """One task.

    Attributes:
        name: The name in commands, folders and reports.
        family: The module of `ruler/tasks/` that generates it.
        tokens_to_generate: Tokens of the budget kept free for the answer.
        metric: `all` = mean share of the references found; `part` = any reference found.
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


def _niah(name: str, haystack: str, key: str, value: str, counts: tuple[int, int, int] = (1, 1, 1)) -> TaskConfig:
    """Needle in a haystack; `counts` = keys, values a key, queries."""
    keys, values, queries = counts
    return TaskConfig(
        name=name,
        family="niah",
        tokens_to_generate=128,
        metric="all",
        template=(
            "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
            "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
        ),
        answer_prefix=" The special magic {type_needle_v} for {query} mentioned in the provided text are",
        params={
            "haystack": haystack,
            "key": key,
            "value": value,
            "num_keys": max(keys, queries),
            "num_values": values,
            "num_queries": queries,
        },
    )


def _qa(name: str, dataset: str) -> TaskConfig:
    rule = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    return TaskConfig(
        name=name,
        family="qa",
        tokens_to_generate=32,
        metric="part",
        template=(f"{rule}\n\nThe following are given documents.\n\n{{context}}\n\n{rule}\n\nQuestion: {{query}}"),
        answer_prefix=" Answer:",
        params={"dataset": dataset},
    )


def _code(name: str, tokens_to_generate: int, question: str, answer_prefix: str) -> TaskConfig:
    return TaskConfig(
        name=name,
        family="code",
        tokens_to_generate=tokens_to_generate,
        metric="all",
        template=f"The following are source files of one project. Read them, then answer.\n\n{{context}}\n\n{question}",
        answer_prefix=answer_prefix,
        params={"kind": name.removeprefix("code_")},
    )


_VARIABLE_TRACKING = TaskConfig(
    name="vt",
    family="variable_tracking",
    tokens_to_generate=30,
    metric="all",
    template=(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value {query} in the text above."
    ),
    answer_prefix=(
        " Answer: According to the chain(s) of variable assignment in the text above, "
        "{num_v} variables are assigned the value {query}, they are: "
    ),
    params={"num_chains": 1, "num_hops": 4},
)

_COMMON_WORDS = TaskConfig(
    name="cwe",
    family="common_words",
    tokens_to_generate=120,
    metric="all",
    template=(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n{context}\n"
        "Question: What are the 10 most common words in the above list?"
    ),
    answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
    params={"num_common": 10, "freq_common": 30, "freq_rare": 3},
)

_FREQ_WORDS = TaskConfig(
    name="fwe",
    family="freq_words",
    tokens_to_generate=50,
    metric="all",
    template=(
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. {context}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    ),
    answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
    params={"alpha": 2.0, "word_length": 6},
)

_RULER = (
    _niah("niah_single_1", "noise", "words", "numbers"),
    _niah("niah_single_2", "essay", "words", "numbers"),
    _niah("niah_single_3", "essay", "words", "uuids"),
    _niah("niah_multikey_1", "essay", "words", "numbers", (4, 1, 1)),
    _niah("niah_multikey_2", "needle", "words", "numbers"),
    _niah("niah_multikey_3", "needle", "uuids", "uuids"),
    _niah("niah_multivalue", "essay", "words", "numbers", (1, 4, 1)),
    _niah("niah_multiquery", "essay", "words", "numbers", (1, 1, 4)),
    _VARIABLE_TRACKING,
    _COMMON_WORDS,
    _FREQ_WORDS,
    _qa("qa_1", "squad"),
    _qa("qa_2", "hotpotqa"),
)

_CODE = (
    _code(
        "code_lookup",
        32,
        "Question: What constant does the function {function} of the file {path} return?",
        " Answer: The function {function} returns",
    ),
    _code(
        "code_where",
        64,
        "Question: Which file defines the function {function}? Give its path as shown above.",
        " Answer: The function {function} is defined in the file",
    ),
    _code(
        "code_copy",
        192,
        "Question: Repeat the function {function} of the file {path} exactly, character for character.",
        " Answer: Here is the function {function}:\n",
    ),
)

RULER_13: tuple[str, ...] = tuple(task.name for task in _RULER)
CODE_TASKS: tuple[str, ...] = tuple(task.name for task in _CODE)
TASKS: dict[str, TaskConfig] = {task.name: task for task in (*_RULER, *_CODE)}
TASK_GROUPS: dict[str, tuple[str, ...]] = {"ruler": RULER_13, "code": CODE_TASKS, "all": RULER_13 + CODE_TASKS}


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
    """Turn `vt,cwe`, `ruler`, `code` or `all` into task names, in order and once each.

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
