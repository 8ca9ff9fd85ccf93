"""Requests for a backend that reads nothing but text: of the memory, the text that the question needs.

    requests = TextRequests(TextSelector.load(None), memories, settings)
    compressed = await requests.compress(CHAT, raw, owner)

What stays and what takes the rest's place is in `utils/serving/selected_text.py`.
"""

from __future__ import annotations

import orjson

from utils.errors import ConfigError
from utils.model.prompt import MemoryPrompt
from utils.serving.api_error import ApiError
from utils.serving.memories import MemoryStore
from utils.serving.read_request import ReadRequest
from utils.serving.report import SpanReport
from utils.serving.request_options import OptionsReader
from utils.serving.rewriter import CompressedRequest, Rewriter
from utils.serving.selected_text import DEFAULT, TEXT_POLICIES, TextSelector
from utils.serving.settings import GatewaySettings


class TextRequests(Rewriter):
    """Puts selected text in the spans' places.

    Args:
        selector: Counts tokens.
        memories: Stored texts that spans may name.
        settings: Limits, and what is selected for requests that say nothing about it.

    Raises:
        ConfigError: That leaves nothing, or needs latents.
    """

    mode = "text"

    def __init__(self, selector: TextSelector, memories: MemoryStore, settings: GatewaySettings) -> None:
        default = settings.expansion or DEFAULT
        if default.is_off or default.policy not in TEXT_POLICIES:
            raise ConfigError(
                "--backend text has no latents: it needs a budget above 0 and one of the policies "
                f"{', '.join(TEXT_POLICIES)}"
            )
        options = OptionsReader((), default, TEXT_POLICIES, auto=settings.auto_memory)
        # Other servers than vLLM know no salt, and some refuse fields that they do not know.
        super().__init__(selector, options, memories, settings, salted=False)

    async def _rewrite(self, read: ReadRequest, owner: str) -> CompressedRequest:
        return await self._tokenizer.run(lambda: self._write(read))

    def _write(self, read: ReadRequest) -> CompressedRequest:
        expansion = read.options.expansion
        if expansion is None:
            raise ApiError(
                400, "the budget is 0, which leaves nothing of the memory: this gateway's backend reads text only, "
                "expected a budget above 0",
            )  # fmt: skip
        texts: list[str] = []
        reports: list[SpanReport] = []
        for prompt in self._prompts(read):
            for part in self._selected.choose(prompt, expansion):
                texts.append(part.text())
                reports.append(self._selected.report(part, texts[-1]))
        if read.chat is not None:
            body = {**read.body, "messages": read.chat.fill_texts(texts)}
        else:
            body = read.with_prompts(texts)
        return self._forward(read, body, orjson.dumps(body), reports=reports)

    def _prompts(self, read: ReadRequest) -> list[MemoryPrompt]:
        """The spans of each prompt, with what it asks; a token is a row."""
        if read.chat is not None:
            return [self._rows.spans_alone(read.sources, 1, read.chat.query())]
        remaining = iter(read.sources)
        prompts = []
        for pieces in read.prompts:
            own = [next(remaining) for _ in pieces[1::2]]
            prompts.append(self._rows.spans_alone(own, 1, " ".join(pieces[::2]).strip()))
            self._rows.check_together(sum(prompt.memory_tokens for prompt in prompts))
        return prompts
