"""The training tasks.

    example = TASKS["lookup"].draw(TaskSources(random, files, config.data))
    example.row()           # {"messages", "target"}: loss on the target; {"messages"}: loss on all that the assistant
                            # says; {"text"}: loss on the text

Add a task: a file with its `draw`, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from utils.training.data.examples import Example, TaskSources
from utils.training.data.tasks import (
    chat,
    continue_code,
    conversation,
    copy_symbols,
    count,
    find_symbol,
    list_notes,
    lookup,
    needle,
    next_lines,
    reconstruct,
    shuffled,
    strings,
    variables,
    which_file,
)

_ANSWERED = ("exact", "contains")
_REPEATED = ("edit_similarity", "exact")


@dataclass(frozen=True, slots=True)
class Task:
    """A training task.

    Attributes:
        draw: Makes one example; None where what it drew does not suit, and the builder draws again.
        metrics: What evaluation judges it by; the first is drawn as a picture.
        needs_files: Whether it draws from source files.
        fills_length: Whether its memories have the length that is drawn, where the files are long enough.
    """

    draw: Callable[[TaskSources], Example | None]
    metrics: tuple[str, ...] = _ANSWERED
    needs_files: bool = True
    fills_length: bool = True


TASKS = {
    "reconstruct": Task(reconstruct.draw, _REPEATED),
    "shuffled": Task(shuffled.draw),
    "continue": Task(continue_code.draw, ("perplexity",)),
    "lookup": Task(lookup.draw),
    "next_lines": Task(next_lines.draw),
    "which_file": Task(which_file.draw),
    "needle": Task(needle.draw),
    "strings": Task(strings.draw),
    "list_notes": Task(list_notes.draw),
    "conversation": Task(conversation.draw),
    "variables": Task(variables.draw),
    "count": Task(count.draw, needs_files=False),
    chat.CHAT: Task(chat.draw, fills_length=False),
    "copy_symbols": Task(copy_symbols.draw, _REPEATED, needs_files=False),
    "find_symbol": Task(find_symbol.draw, needs_files=False, fills_length=False),
}
