"""What lm-eval calls a context, read as a prompt with memory: chats, marked texts, texts of which a part becomes it.

    reader = ContextReader(processor, expander, expansion=None, least_memory_tokens=500)
    prompt = reader.read("Read this.\\n\\n" + book + "\\n\\nQuestion: who is it about?")
    prompt.spans[0].text            # the book

lm-eval hands a context on as one text. A chat becomes a `ChatContext`: the text that the template wrote, which brings
its special tokens, with what was asked beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from utils.compress.expander import Expander
from utils.compress.select import Expansion
from utils.errors import PromptError
from utils.model.chat import chat_query, chat_text
from utils.model.markers import PLACEHOLDER, has_markers, split_spans, wrap
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
# "Answer:" and the like say where the answer goes, not what is asked.
_MOST_CUE_WORDS = 8


class ChatContext(str):
    """A chat as its template wrote it, with the memories in it between markers.

    Attributes:
        query: What the chat asks.
    """

    query: str

    def __new__(cls, text: str, query: str = "") -> ChatContext:
        """Make one; a copy that `pickle` makes gets its query afterwards."""
        context = super().__new__(cls, text)
        context.query = query
        return context


@dataclass
class ContextReader:
    """Contexts to prompts, with one checkpoint's tokenizers; each context is read once.

    Attributes:
        processor: Parses prompts.
        expander: Puts text in place of some latents.
        expansion: What of each memory stays text; None: nothing.
        least_memory_tokens: Where a context has no markers, its longest part becomes memory if it has so many encoder
            tokens (`mark_longest`); None: it stays text.
        template: The chat template to be used where the tokenizer has several; None for its own choice.
    """

    processor: Processor
    expander: Expander
    expansion: Expansion | None = None
    least_memory_tokens: int | None = None
    template: str | None = None
    _prompts: dict[tuple[type, str], MemoryPrompt] = field(default_factory=dict, init=False)
    _marked: dict[str, str] = field(default_factory=dict, init=False)

    def read(self, context: str) -> MemoryPrompt:
        """The prompt of a context.

        Raises:
            PromptError: It is empty, its markers are not in order, or there is nothing to expand its memory by.
            ConfigError: The memory cannot be expanded.
        """
        return self.read_marked(self.marked(context))

    def read_marked(self, text: str) -> MemoryPrompt:
        """The same of what `marked` gave, or the beginning of it."""
        key = (type(text), text)
        if key not in self._prompts:
            prompt = self.processor.parse_raw(text, add_special_tokens=not isinstance(text, ChatContext))
            if not prompt.input_ids:
                raise PromptError("the context is empty: a decoder continues at least one token")
            if isinstance(text, ChatContext):
                prompt = replace(prompt, query=text.query)
            self._prompts[key] = self.expander(prompt, self.expansion)
        return self._prompts[key]

    def forget(self) -> None:
        """Read the contexts anew that are asked for from now on."""
        self._prompts.clear()
        self._marked.clear()

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> ChatContext:
        """A chat as a context.

        Args:
            messages: `{"role": …, "content": …}` in order; memory may stand in any content. Without markers the longest
                content is looked at for memory.
            add_generation_prompt: Whether an answer begins; else the last message is continued.

        Raises:
            PromptError: The template refuses the messages, or drops or repeats a memory.
        """
        contents = [message["content"] for message in messages]
        if self.least_memory_tokens and not any(map(has_markers, contents)):
            longest = max(range(len(contents)), key=lambda number: len(contents[number]))
            contents[longest] = self.marked(contents[longest])
        memories: list[str] = []
        shortened = []
        for number, (message, content) in enumerate(zip(messages, contents, strict=True)):
            pieces = list(split_spans(content, f"message {number}"))
            memories += [piece.text for piece in pieces if piece.is_memory]
            short = "".join(PLACEHOLDER if piece.is_memory else piece.text for piece in pieces)
            shortened.append({**message, "content": short})
        arguments: dict[str, Any] = {} if self.template is None else {"chat_template": self.template}
        if not add_generation_prompt:
            arguments |= {"add_generation_prompt": False, "continue_final_message": True}
        # The template sees no memory: a program that came with the checkpoint might change it.
        first, *others = chat_text(shortened, self.processor.tokenizers.decoder, **arguments).split(PLACEHOLDER)
        if len(others) != len(memories):
            raise PromptError(
                f"the chat has {len(memories)} memories, the text that its template made of it {len(others)}: use a "
                "template that writes each message's content once and unchanged"
            )
        pairs = zip(memories, others, strict=True)
        return ChatContext(first + "".join(wrap(memory) + text for memory, text in pairs), chat_query(shortened))

    def marked(self, text: str) -> str:
        """A context with its longest part between markers, where that is wanted and it has none; a chat as it is."""
        if self.least_memory_tokens is None or isinstance(text, ChatContext) or has_markers(text):
            return text
        if text not in self._marked:
            self._marked[text] = mark_longest(text, self.least_memory_tokens, self._num_memory_tokens)
        return self._marked[text]

    def _num_memory_tokens(self, text: str) -> int:
        return len(self.processor.tokenizers.encoder(text, add_special_tokens=False)["input_ids"])


def mark_longest(text: str, least_tokens: int, num_tokens: Callable[[str], int]) -> str:
    """Put the markers around what stands between a text's instruction and its question.

    The instruction is the first paragraph, or the first line of a paragraph that is long itself; there may be none. The
    question is the last paragraph, or the last line of one that is long itself, with the one before it where the last
    one is only a cue of a few words and a colon ("Answer:"). Paragraphs are separated by blank lines. "Long" is
    `least_tokens` or more.

    Args:
        text: Without markers.
        least_tokens: Fewest tokens of a memory.
        num_tokens: Counts the tokens of a text.

    Returns:
        The marked text; the same text where no part of it is long, or it is long but has no question at its end.
    """
    paragraphs, lines = _stretches(text, _BLANK_LINES), _stretches(text, re.compile("\n"))

    def is_long(start: int, stop: int) -> bool:
        return num_tokens(text[start:stop]) >= least_tokens

    starts = (_question_start(text, stretches) for stretches in (paragraphs, lines) if stretches)
    stop = next((start for start in starts if not is_long(start, len(text))), None)
    if stop is None:
        return text
    ends = (stretches[0][1] for stretches in (paragraphs, lines))
    start = next((end for end in ends if end <= stop and not is_long(0, end)), 0)
    memory = text[start:stop].strip()
    if not memory or num_tokens(memory) < least_tokens:
        return text
    at = text.index(memory, start)
    return text[:at] + wrap(memory) + text[at + len(memory) :]


def _stretches(text: str, separator: re.Pattern[str]) -> list[tuple[int, int]]:
    """First and one past the last character of the parts between separators that say something."""
    bounds = [0, *(edge for match in separator.finditer(text) for edge in match.span()), len(text)]
    pairs = zip(bounds[::2], bounds[1::2], strict=True)
    return [(start, stop) for start, stop in pairs if text[start:stop].strip()]


def _question_start(text: str, stretches: Sequence[tuple[int, int]]) -> int:
    number = len(stretches) - 1
    while number and _is_cue(text[slice(*stretches[number])]):
        number -= 1
    return stretches[number][0]


def _is_cue(text: str) -> bool:
    return text.rstrip().endswith(":") and len(text.split()) <= _MOST_CUE_WORDS
