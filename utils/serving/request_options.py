"""What a request asks of the gateway under `code_llava`, each field checked.

    options = OptionsReader(chunk_sizes={4, 8}, default=None).read({"code_llava": {"expand": "1/16"}})
    options.expansion     # Expansion(share=Fraction(1, 16), policy="bm25")

A request that says nothing about expansion gets the default that the gateway was started with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from utils.compress.policies.registry import WHOLE
from utils.compress.select import Expansion, read_share
from utils.serving.api_error import ApiError, shown
from utils.serving.settings import DEFAULT_AUTO_TOKENS

# A request may say {"code_llava": {"chunk_size": 16}}; the answer tells under the same name what was done.
EXTENSION = "code_llava"
FIELDS = ("chunk_size", "expand_tokens", "expand", "expand_query", "expand_policy", "tool", "auto")
# `answer` knows what only an evaluation knows.
REQUEST_POLICIES = ("bm25", "latents", "random", "all", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What one request asks for.

    Attributes:
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.
        expansion: How much of the memory stays text; None for nothing.
        asks_to_expand: The request said so itself: what cannot be done is then an error.
        tool: The model gets the tool that shows segments as text.
        auto: Parts of a chat from so many tokens on become memory without markers; None: markers alone count.
    """

    chunk_size: int | None = None
    expansion: Expansion | None = None
    asks_to_expand: bool = False
    tool: bool = False
    auto: int | None = None


class OptionsReader:
    """Reads the field of one gateway's requests.

    Args:
        chunk_sizes: What the checkpoint was made for: other sizes would be answered badly without a word.
        default: Expansion of requests that say nothing about it.
        policies: What they may choose.
        has_tool: The backend is a server that reads latents, so that its model can be offered the tool.
        auto: What requests get that say nothing about it.
    """

    def __init__(
        self,
        chunk_sizes: Iterable[int],
        default: Expansion | None,
        policies: tuple[str, ...] = REQUEST_POLICIES,
        *,
        has_tool: bool = False,
        auto: int | None = None,
    ) -> None:
        self.chunk_sizes = sorted(chunk_sizes)
        self.default = None if default is None or default.is_off else default
        self.policies = policies
        self._has_tool = has_tool
        self._auto = auto

    def read(self, body: Mapping[str, Any]) -> RequestOptions:
        """The options of a body.

        Raises:
            ApiError: 400, an unknown field or a value that cannot be.
        """
        options = body.get(EXTENSION, {})
        if not isinstance(options, dict):
            raise ApiError(400, f"{EXTENSION} is {shown(options)}, expected an object with any of {', '.join(FIELDS)}")
        for name in options.keys() - FIELDS:
            raise ApiError(400, f"{EXTENSION} has the field {shown(name)}, expected any of {', '.join(FIELDS)}")
        given = {name: value for name, value in options.items() if value is not None}
        asks = any(name.startswith("expand") for name in given)
        return RequestOptions(
            chunk_size=self._chunk_size(given.get("chunk_size")),
            expansion=self._expansion(given) if asks else self.default,
            asks_to_expand=asks,
            tool=self._tool(given.get("tool")),
            auto=self._least_tokens(given.get("auto")),
        )

    def _least_tokens(self, given: Any) -> int | None:
        if given is None:
            return self._auto
        if isinstance(given, bool):
            return (self._auto or DEFAULT_AUTO_TOKENS) if given else None
        if not isinstance(given, int) or given < 1:
            raise ApiError(
                400, f"auto is {shown(given)}, expected true, false, or the least tokens of a part, 1 or more"
            )
        return given

    def _tool(self, given: Any) -> bool:
        if given not in (None, "expand"):
            raise ApiError(400, f'tool is {shown(given)}, expected "expand"')
        if given is not None and not self._has_tool:
            raise ApiError(400, "the tool expand needs a vLLM backend")
        return given is not None

    def _chunk_size(self, given: Any) -> int | None:
        if given is not None and (type(given) is not int or given not in self.chunk_sizes):
            sizes = ", ".join(map(str, self.chunk_sizes))
            has = f"this checkpoint has {sizes}" if sizes else "but this gateway sends text: leave it out"
            raise ApiError(400, f"chunk_size is {shown(given)}, {has}")
        return given

    def _expansion(self, given: Mapping[str, Any]) -> Expansion | None:
        tokens, share = given.get("expand_tokens"), given.get("expand")
        if tokens is not None and share is not None:
            raise ApiError(400, "expand_tokens and expand are two ways to say one budget: expected one of them")
        if tokens is not None and (type(tokens) is not int or tokens < 0):
            raise ApiError(400, f"expand_tokens is {shown(tokens)}, expected a number of encoder tokens, 0 or more")
        if share is not None and (share := read_share(given["expand"])) is None:
            raise ApiError(
                400, f'expand is {shown(given["expand"])}, expected a share of the memory from 0 to 1, as "1/16" or '
                "0.0625",
            )  # fmt: skip
        policy = given.get("expand_policy", self.default.policy if self.default else self.policies[0])
        if policy not in self.policies:
            raise ApiError(400, f"expand_policy is {shown(policy)}, expected one of {', '.join(self.policies)}")
        query = given.get("expand_query", self.default.query if self.default else None)
        if query is not None and not (isinstance(query, str) and query.strip()):
            raise ApiError(400, f"expand_query is {shown(query)}, expected a text to select by")
        if tokens is None and share is None and policy not in WHOLE:
            if self.default is None or self.default.policy in WHOLE:
                raise ApiError(400, f"the policy {policy} needs a budget: expected expand_tokens 256 or expand 1/16")
            tokens, share = self.default.tokens, self.default.share
        expansion = Expansion(tokens=tokens, share=share, policy=policy, query=query)
        return None if expansion.is_off else expansion
