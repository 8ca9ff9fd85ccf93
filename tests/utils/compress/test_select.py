"""Selection: the budget holds whatever the text, and what a question is about is found in several languages."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import byte_tokenizer
from utils.compress.policies.registry import POLICIES
from utils.compress.select import Expansion, MemoryText, Question, select
from utils.errors import ConfigError, PromptError
from utils.model.expand import token_offsets
from utils.model.prompt import MemorySpan, num_latents

BYTES = byte_tokenizer(markers=False)
# Everything that needs no encoder.
WITHOUT_ENCODER = sorted(set(POLICIES) - {"latents"})


def memory_of(text: str, barred: str | None = None) -> MemoryText:
    """Tokens as a trained tokenizer has them: a word with the white space before it, or a sign."""
    offsets = [match.span() for match in re.finditer(r"\s*(?:\w+|[^\w\s])|\s+", text)]
    pattern = re.compile(re.escape(barred)) if barred else None
    return MemoryText(text, np.array(offsets, dtype=np.int64).reshape(-1, 2), barred=pattern)


def tokens_in(memory: MemoryText, chosen: list[tuple[int, int]]) -> int:
    """Tokens that have a character in the ranges, each once."""
    return sum(any(a < end and begin < b for a, b in chosen) for begin, end in memory.offsets.tolist())


def shown(text: str, query: str, tokens: int, policy: str = "bm25") -> str:
    memory = memory_of(text)
    (chosen,) = select([memory], Question(query), Expansion(tokens=tokens, policy=policy))
    return "".join(text[a:b] for a, b in chosen)


@st.composite
def memories(draw: st.DrawFn) -> MemoryText:
    """Any text, cut anywhere into tokens; some share a character, as those of the bytes of an emoji do."""
    lines = draw(st.lists(st.text(st.sampled_from("ab_ .(=\r\té😀#"), max_size=30), min_size=1, max_size=8))
    text = draw(st.sampled_from(["\n", "\n\n", "\r\n"])).join(lines) + draw(st.sampled_from(["", "\n"])) or "a"
    if draw(st.booleans()):
        return MemoryText(text, token_offsets(BYTES, text, 4 * len(text)))
    borders = sorted(draw(st.sets(st.integers(1, len(text)), max_size=20)) | {0, len(text)})
    times = draw(st.integers(1, 3))
    offsets = [pair for pair in itertools.pairwise(borders) for _ in range(times)]
    return MemoryText(text, np.array(offsets, dtype=np.int64))


@given(st.lists(memories(), min_size=1, max_size=3), st.integers(0, 80), st.sampled_from(["bm25", "random", "answer"]))
def test_the_budget_holds(own: list[MemoryText], budget: int, policy: str) -> None:
    question = Question("Where is `a_b` set?", answer="a")
    chosen = select(own, question, Expansion(tokens=budget, policy=policy))
    assert sum(tokens_in(memory, ranges) for memory, ranges in zip(own, chosen, strict=True)) <= budget
    for memory, ranges in zip(own, chosen, strict=True):
        borders = [at for pair in ranges for at in pair]
        # Ascending, and with a gap between two ranges, or they would be one.
        assert borders == sorted(set(borders))
        assert all(0 <= at <= len(memory.text) for at in borders)
    assert chosen == select(own, question, Expansion(tokens=budget, policy=policy))


@given(memories())
def test_pieces_cover_the_text(memory: MemoryText) -> None:
    assert "".join(memory.piece_texts) == memory.text
    assert all(memory.piece_texts)
    for (begin, end), (first, stop) in zip(memory.pieces, memory.piece_tokens, strict=True):
        inside = [at for at, (a, b) in enumerate(memory.offsets.tolist()) if a < end and begin < b]
        assert inside == list(range(first, stop))
        assert memory.pieces_in(begin, end) == range(
            memory.pieces.index((begin, end)), memory.pieces_in(begin, end).stop
        )
        assert len(memory.pieces_in(begin, end)) == 1


@pytest.mark.parametrize("policy", ["bm25", "random", "all"])
@pytest.mark.parametrize("share", [Fraction(1), None])
def test_a_large_budget_takes_everything(policy: str, share: Fraction | None) -> None:
    memory = memory_of("\n\ndef f():\n    return 1\n\n\nx = 2\n\n")
    budget = Expansion(tokens=None if share else 10_000, share=share, policy=policy)
    assert select([memory, memory], Question("Where is y?"), budget) == [[(0, len(memory.text))]] * 2


@pytest.mark.parametrize("policy", WITHOUT_ENCODER)
def test_no_budget_takes_nothing(policy: str) -> None:
    chosen = select([memory_of("a = 1\nb = 2\n")], Question("", "1"), Expansion(tokens=0, policy=policy))
    assert chosen == ([[(0, 12)]] if policy == "all" else [[]])


def test_a_budget_below_every_piece_takes_nothing() -> None:
    assert shown("alpha = compute(beta)\ngamma = compute(delta)\n", "What is `alpha`?", tokens=3) == ""


def test_a_long_line_is_cut_at_sentences() -> None:
    memory = memory_of(" ".join(f"The colour number {n} of the long list is blue, as one sees." for n in range(40)))
    assert len(memory.pieces) > 10
    assert all(text.endswith(".") for text in memory.piece_texts)
    assert max(stop - first for first, stop in memory.piece_tokens) <= 64


@pytest.mark.parametrize("text", ["word " * 5000, "x=1;" * 5000, "😀" * 500])
def test_a_long_line_without_sentences_is_cut_all_the_same(text: str) -> None:
    memory = MemoryText(text, token_offsets(BYTES, text, 4 * len(text)))
    assert "".join(memory.piece_texts) == text
    # One more where a cut would have gone through a character.
    assert max(stop - first for first, stop in memory.piece_tokens) <= 64


def test_what_was_truncated_is_not_seen() -> None:
    ids = BYTES("answer = 1\nquestion = 2\n", add_special_tokens=False)["input_ids"][:11]
    chunks = num_latents(11, 4)
    span = MemorySpan(
        text="answer = 1\nquestion = 2\n", token_ids=ids, start=0, stop=chunks, chunk_size=4, truncated_tokens=13
    )
    assert MemoryText.of(span, BYTES).text == "answer = 1\n"


def test_what_is_barred_never_stays_text() -> None:
    long_line = "word " * 31 + "<|end|>" + " word" * 40
    for text in ("a = 1\nb = '<|end|>'\nc = 3\n", long_line):
        memory = memory_of(text, barred="<|end|>")
        (chosen,) = select([memory], Question("Where is `b` <|end|>?"), Expansion(tokens=1000))
        assert chosen
        at = text.index("<|end|>")
        assert not any(a < at + 7 and at < b for a, b in chosen)


def test_the_query_of_the_expansion_wins() -> None:
    text = "alpha = 1\nbeta = 2\ngamma = 3\n"
    memory = memory_of(text)
    (chosen,) = select([memory], Question("What is alpha?"), Expansion(tokens=4, query="What is gamma?"))
    assert [text[a:b] for a, b in chosen] == ["gamma = 3\n"]


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": 8, "policy": "best"},
        {"tokens": -1},
        {"share": Fraction(3, 2)},
        {"share": Fraction(-1, 2)},
        {"tokens": 8, "share": Fraction(1, 2)},
        {},
        {"tokens": 8, "query": "  "},
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Expansion(**settings)  # type: ignore[arg-type]


def test_a_prompt_that_asks_nothing_is_refused() -> None:
    memory = memory_of("a = 1\n")
    with pytest.raises(PromptError, match="--expand-query"):
        select([memory], Question(" \n"), Expansion(tokens=8))
    assert select([memory], Question(""), Expansion(tokens=8, policy="random")) == [[(0, 6)]]
    with pytest.raises(ConfigError, match="latents"):
        select([memory], Question("a?"), Expansion(tokens=8, policy="latents"))


def test_the_answer_policy_takes_all_of_several_answers() -> None:
    text = "".join(f"item {n} is {n * 37}\n" for n in range(30))
    memory = memory_of(text)
    (chosen,) = select([memory], Question("", ("is 37", "is 1073")), Expansion(tokens=10, policy="answer"))
    assert [text[a:b] for a, b in chosen] == ["item 1 is 37\n", "item 29 is 1073\n"]


PYTHON = '''\
# file: shop/cart.py
from decimal import Decimal as Money

MAX_ITEMS = 40


class Cart:
    """Things that somebody is about to buy."""

    def __init__(self, owner):
        self.owner = owner
        self.items = []

    # Prices are gross, never net.
    def total_price(self, rate=3):
        price = Money(0)
        for item in self.items:
            price += item.price * rate
        if price < 0:
            raise ValueError("refund")
        return price.quantize(Money("0.01"))


# file: shop/users.py
def authentication_of(user, token):
    if token != user.token:
        return None
    return user.rights


class Session:
    def close(self):
        self.open = False
        log("closed", self)
'''
JAVASCRIPT = """\
// src/queue.js
import { sleep } from "./time.js";

export class JobQueue {
  constructor(limit) {
    this.limit = limit;
    this.jobs = [];
  }

  async drainAll(timeoutMs) {
    while (this.jobs.length) {
      await this.jobs.shift().run();
      await sleep(timeoutMs);
    }
    return "drained";
  }
}

const retryDelay = (attempt) => 2 ** attempt * 100;
"""
GO = """\
// ---- cmd/server.go ----
package main

import "net/http"

type Server struct {
\tAddr string
\tTLS  bool
}

func (s *Server) Listen() error {
\tif s.TLS {
\t\treturn errNoCert
\t}
\treturn http.ListenAndServe(s.Addr, nil)
}

func parsePort(text string) int {
\treturn 8080
}
"""
C = """\
/* lib/ring.c */
#define RING_SIZE 512

static int ring_push(struct ring *r, char c) {
    if (r->used == RING_SIZE)
        return -ENOSPC;
    r->data[r->head++] = c;
    return 0;
}

int ring_pop(struct ring *r)
{
    return r->data[--r->head];
}
"""
MARKDOWN = """\
# Manual

## Installation

Run the installer and wait for a minute.

## Backups

Copies are made every night at three.
They are kept for ninety days.

## Contact

Write to the help desk.
"""
PROSE = " ".join(
    [
        "The harbour was built by monks who came from the north.",
        "Its lighthouse burned down twice, and nobody remembers when.",
        "Most people live on fish and on what the ferry brings.",
        "The bell of Saint Orwin weighs nine hundred pounds.",
        "In winter the road is closed, and letters wait for weeks.",
        "A school was opened, closed again and sold to a painter.",
    ]
)


@pytest.mark.parametrize(
    ("text", "query", "tokens", "found"),
    [
        (PYTHON, "What value is assigned to `MAX_ITEMS`?", 8, "MAX_ITEMS = 40"),
        (PYTHON, "What is the maximal number of items?", 24, "MAX_ITEMS = 40"),
        (PYTHON, "From which module is `Money` imported?", 16, "from decimal import"),
        (PYTHON, "What does the function `total_price` return?", 60, 'return price.quantize(Money("0.01"))'),
        (PYTHON, "Which exception does `total_price` raise?", 48, 'raise ValueError("refund")'),
        (PYTHON, "Which class defines the method `total_price`?", 40, "class Cart:"),
        (PYTHON, "What does the comment before `def total_price(self, rate=3):` say?", 32, "# Prices are gross"),
        (PYTHON, "In which file is `Session` defined?", 24, "# file: shop/users.py"),
        (
            PYTHON,
            "Write out the two lines after `def close(self):`.",
            32,
            'self.open = False\n        log("closed", self)',
        ),
        (PYTHON, "How does auth work?", 16, "def authentication_of(user, token):"),
        (JAVASCRIPT, "Which class has the method drainAll?", 32, "export class JobQueue {"),
        (JAVASCRIPT, "What does `drainAll` return?", 40, 'return "drained"'),
        (JAVASCRIPT, "How long is the retry delay?", 20, "const retryDelay"),
        (JAVASCRIPT, "Which file defines `JobQueue`?", 24, "// src/queue.js"),
        (GO, "What does `parsePort` return?", 20, "return 8080"),
        (GO, "Which fields does the struct `Server` have?", 32, "TLS  bool"),
        (C, "What does `ring_push` return when the ring is full?", 40, "return -ENOSPC;"),
        (C, "Which file defines ring_push?", 32, "/* lib/ring.c */"),
        (MARKDOWN, "How long are backups kept?", 20, "kept for ninety days"),
        (PROSE, "How heavy is the bell of Saint Orwin?", 24, "weighs nine hundred pounds."),
    ],
)
def test_the_answer_is_among_the_selected_text(text: str, query: str, tokens: int, found: str) -> None:
    assert tokens < len(memory_of(text).offsets) / 2
    assert found in shown(text, query, tokens)


def test_exact_names_come_before_their_likes() -> None:
    text = "max_cache_size = 1\ncache_size = 2\nCacheSize = 3\ncache = 4\n"
    for name in ("max_cache_size", "cache_size", "CacheSize", "cache"):
        assert shown(text, f"What is `{name}`?", tokens=4).startswith(f"{name} = ")


def test_nothing_in_common_gives_an_outline() -> None:
    chosen = shown(PYTHON, "Bonjour!", tokens=24)
    assert "class Cart:" in chosen
    assert "self.owner = owner" not in chosen


def test_a_function_comes_in_one_stretch() -> None:
    """Not as the lines of all functions that look like it."""
    text = "".join(f"def f{n}(x):\n    y = x + {n}\n    z = y * {n}\n    return z\n\n\n" for n in range(20))
    assert shown(text, "Explain `f7`.", tokens=20) == "def f7(x):\n    y = x + 7\n    z = y * 7\n    return z\n\n\n"
