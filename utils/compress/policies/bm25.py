"""Pieces that share words with the question (BM25), and what belongs to them: cheap, exact, and good at names.

A hit alone often does not answer: the answer is the next line, a line of the function, the class around it or the file
that it stands in. So a hit hands a part of its score on, less the farther away:

- to the lines after it and the comment above it, most where the question quotes a whole line;
- from the definition of an asked name to the lines of its block, those with words of the question first;
- to the definitions around it, and to the line above that names the file.

Each line takes the best of what it is offered. What has nothing to do with the question comes last: definitions that
hold a block before other lines, so that a question that matches nothing gets an outline of the memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils.compress.policies.lexical import Asked, bm25
from utils.compress.policies.structure import Outline, outline_of

if TYPE_CHECKING:
    from utils.compress.select import MemoryText, Question

# A quoted line or sentence, more than a name.
_PASSAGE = re.compile(r"\w\W*[^\w.]")
# Of a hit's score. Tuned on held-out code (docs/benchmarks/selection_amd_epyc_202611.md); their order matters, their
# exact values hardly.
_DEFINITION = 1.0  # more for a line that defines what is asked for
_QUOTE = 2.0  # of the best hit, more for a line that the question quotes
_FILE = 0.9  # to the line that names the file
_COMMENT_QUOTE, _COMMENT = 0.9, 0.6  # to the comment above
_AFTER_QUOTE, _AFTER = 0.85, 0.5  # to the next line
_AFTER_QUOTE_FADES, _AFTER_FADES = 0.93, 0.8  # from there to the next one, and so on
_REACH = 8  # lines
_BLOCK_ASKED = 0.8  # to the lines of a definition's block that have words of the question
_BLOCK, _BLOCK_FADES = 0.5, 0.98  # to its first line, and from there to the next one, and so on
_AROUND_DEFINITION, _AROUND = 0.85, 0.6  # to the definition around it: the class of the method that is asked for
_BEFORE = 0.3  # to the line before
_BOTH = 0.2  # for a line with two offers: of the smaller one
_OUTLINE, _REST = 1e-3, 1e-4


def score(memories: Sequence[MemoryText], question: Question) -> np.ndarray:
    """BM25 of each piece, handed on as above; above 0 for all."""
    asked = Asked.of(question.query)
    texts = [text for memory in memories for text in memory.piece_texts]
    if not texts:
        return np.zeros(0)
    tokens = np.array([stop - first for memory in memories for first, stop in memory.piece_tokens])
    hits = bm25(texts, tokens, asked)
    best = float(hits.max())
    ends = np.cumsum([len(memory.pieces) for memory in memories])
    own = np.split(hits, ends[:-1])
    return np.concatenate([_hand_on(memory, hits, best, asked) for memory, hits in zip(memories, own, strict=True)])


def _hand_on(memory: MemoryText, hits: np.ndarray, best: float, asked: Asked) -> np.ndarray:
    """Scores of one memory's pieces."""
    if not len(hits):
        return hits
    outline = outline_of(memory.piece_texts)
    quoted = _quoted(memory, asked.quotes)
    defined = np.array([max(map(asked.share_of, names), default=0.0) if names else 0.0 for names in outline.names])
    hits = (hits + _QUOTE * best * quoted) * (1 + _DEFINITION * defined)
    near = _near(hits, quoted, outline)
    definitions = (hits * defined).tolist()
    scores = _with_blocks(hits, near, definitions, outline)
    for piece in range(len(scores) - 1, -1, -1):
        around, file = outline.parents[piece], outline.files[piece]
        if around >= 0:
            scores[around] = max(scores[around], _AROUND * scores[piece], _AROUND_DEFINITION * definitions[piece])
        if file >= 0:
            scores[file] = max(scores[file], _FILE * scores[piece])
    holds_block = set(outline.parents)
    return np.array(scores) + [_OUTLINE if piece in holds_block else _REST for piece in range(len(scores))]


def _quoted(memory: MemoryText, quotes: Sequence[str]) -> np.ndarray:
    """Which pieces the question quotes word by word, as 0 and 1."""
    quoted = np.zeros(len(memory.pieces))
    for quote in map(str.strip, quotes):
        if not _PASSAGE.search(quote):
            continue
        for match in re.finditer(re.escape(quote), memory.text):
            quoted[list(memory.pieces_in(*match.span()))] = 1
    return quoted


def _near(hits: np.ndarray, quoted: np.ndarray, outline: Outline) -> list[float]:
    """What each piece is offered by those before and after it."""
    near = np.zeros(len(hits))
    in_quote = hits * quoted
    for step in range(1, min(_REACH + 1, len(hits))):
        after = hits[:-step] * (_AFTER * _AFTER_FADES ** (step - 1))
        after_quote = in_quote[:-step] * (_AFTER_QUOTE * _AFTER_QUOTE_FADES ** (step - 1))
        near[step:] = np.maximum(near[step:], np.maximum(after, after_quote))
    near[:-1] = np.maximum(near[:-1], hits[1:] * _BEFORE)
    offers = near.tolist()
    below = np.maximum(hits * _COMMENT, in_quote * _COMMENT_QUOTE).tolist()
    for piece in range(len(hits) - 2, -1, -1):
        if outline.comments[piece]:
            # Of several lines, each hands on what it was offered.
            below[piece] = max(below[piece], below[piece + 1])
            offers[piece] = max(offers[piece], below[piece + 1])
    return offers


def _with_blocks(hits: np.ndarray, near: list[float], definitions: list[float], outline: Outline) -> list[float]:
    """The best of each piece's own hit, what is near, and the definition of something asked for around it."""
    own = hits.tolist()
    block = [0.0] * len(own)
    scores = []
    for piece, around in enumerate(outline.parents):
        offer = near[piece]
        if around >= 0:
            block[piece] = max(block[around], definitions[around])
            share = _BLOCK_ASKED if own[piece] else _BLOCK * _BLOCK_FADES ** (piece - around)
            offer = max(offer, block[piece] * share)
        scores.append(max(own[piece], offer) + _BOTH * min(own[piece], offer))
    return scores
