"""Tokenised examples, memory-mapped: tokenised once, opened in no time, read without loading.

    cache = TokenCache.build("data/lookup", read_jsonl("data/lookup.jsonl"), processor)
    cache = TokenCache.open("data/lookup")
    cache[7].decoder_ids        # each span a single placeholder: the chunk size is chosen when rows are packed

A folder holds five plain arrays and `meta.json`. Shape legend: n examples, s spans, m targets, c candidates.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.errors import ConfigError, DatasetError, PromptError, shown_name
from utils.files import atomic_folder, read_json, sha256_bytes, sha256_file, write_json
from utils.model.processor import Processor
from utils.model.prompt import MemorySpan, parse_chat_prompt, parse_raw_prompt
from utils.training.data.segments import Candidate, find_candidates
from utils.training.plain import from_plain

_META, _INDEX = "meta.json", "index.npz"
_DECODER, _ENCODER, _TEXT, _SHOWN = "decoder.i32", "encoder.i32", "text.i32", "shown.i32"
_FILES = (_DECODER, _ENCODER, _TEXT, _SHOWN, _INDEX)
_VERSION = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExample:
    """One example before a chunk size is chosen.

    Attributes:
        decoder_ids: [T] int32, each memory span as a single placeholder.
        spans: Encoder tokens of each span, int32.
        targets: Half-open ranges of decoder rows that the loss is taken on, one an answer; placeholders and markers in
            them never count.
        candidates: What of the memory may stand as text, in the memory's order.
        texts: Decoder tokens of each span's whole text, tokenised by itself, int32.
    """

    decoder_ids: np.ndarray
    spans: tuple[np.ndarray, ...]
    targets: tuple[tuple[int, int], ...]
    candidates: tuple[Candidate, ...] = ()
    texts: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meta:
    """`meta.json`: counts, what the cache was made from, and what its files must be."""

    version: int
    examples: int
    memory_tokens: int
    decoder_tokens: int
    target_tokens: int
    key: str
    sha256: dict[str, str]


class TokenCache:
    """A folder of tokenised examples; see the module's text."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.meta = meta
        self._decoder = _map(folder / _DECODER)
        self._encoder = _map(folder / _ENCODER)
        self._text = _map(folder / _TEXT)
        self._shown = _map(folder / _SHOWN)
        with np.load(folder / _INDEX) as index:
            # Offsets of decoder ids [n + 1], spans [n + 1], encoder ids and texts' ids [s + 1], targets [n + 1],
            # candidates [n + 1], their ids [c + 1]; targets [m, 2]; candidates [c, 5]: span, first and last token + 1,
            # holds an answer, selected.
            self._index = dict(index)

    def __len__(self) -> int:
        return len(self._index["target_offsets"]) - 1

    def __getitem__(self, number: int) -> TokenizedExample:
        decoder, spans, targets, candidates = (
            slice(*self._index[name][number : number + 2])
            for name in ("decoder_offsets", "span_offsets", "target_offsets", "candidate_offsets")
        )
        ends, texts, shown = (self._index[f"{name}_offsets"] for name in ("encoder", "text", "shown"))
        return TokenizedExample(
            decoder_ids=self._decoder[decoder],
            spans=tuple(self._encoder[ends[s] : ends[s + 1]] for s in range(spans.start, spans.stop)),
            targets=tuple((int(a), int(b)) for a, b in self._index["targets"][targets]),
            candidates=tuple(
                Candidate(
                    span=int(row[0]),
                    tokens=(int(row[1]), int(row[2])),
                    ids=self._shown[shown[c] : shown[c + 1]],
                    holds_answer=bool(row[3]),
                    selected=bool(row[4]),
                )
                for c, row in enumerate(self._index["candidates"][candidates], candidates.start)
            ),
            texts=tuple(self._text[texts[s] : texts[s + 1]] for s in range(spans.start, spans.stop)),
        )

    @classmethod
    def open(cls, folder: str | Path) -> TokenCache:
        """Open a cache, and see that its files are those that were written.

        Raises:
            DatasetError: There is none, it is damaged, or it was written by another version.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        if meta is None:
            raise DatasetError(f"{folder}: a token cache of another version: {_anew(folder)}")
        for name in _FILES:
            # Ids that are not the tokenizer's would be an error somewhere in a pass, or none at all.
            if not (folder / name).is_file() or sha256_file(folder / name) != meta.sha256.get(name):
                raise DatasetError(f"{folder / name} is missing or damaged: {_anew(folder)}")
        return cls(folder, dataclasses.asdict(meta))

    @classmethod
    def build(
        cls, folder: str | Path, source: str | Path, rows: Iterable[Mapping[str, Any]], processor: Processor
    ) -> TokenCache:
        """Tokenise rows and write them; memory stays flat.

        Args:
            folder: Where to; an existing cache is replaced.
            source: The file behind the rows, for messages and the check of `is_current`.
            rows: Of the shapes that `tokenize_row` takes, with memory markers.
            processor: Tokenizers and limits.

        Raises:
            DatasetError: A row of another shape, without a span, or with wrong markers; the message names it.
        """
        names = ("decoder", "span", "encoder", "text", "target", "candidate", "shown")
        offsets: dict[str, list[int]] = {name: [0] for name in names}
        targets: list[tuple[int, int]] = []
        candidates: list[tuple[int, int, int, bool, bool]] = []
        with atomic_folder(folder, holds=(*_FILES, _META)) as temporary:
            with (
                (temporary / _DECODER).open("wb") as decoder,
                (temporary / _ENCODER).open("wb") as encoder,
                (temporary / _TEXT).open("wb") as texts,
                (temporary / _SHOWN).open("wb") as shown,
            ):
                bar = tqdm(rows, desc=f"tokenising {shown_name(Path(source).name)}", unit="example", disable=None)
                for number, row in enumerate(bar, start=1):
                    example = tokenize_row(row, processor, f"{source}, row {number}")
                    example.decoder_ids.tofile(decoder)
                    offsets["decoder"].append(offsets["decoder"][-1] + len(example.decoder_ids))
                    for span, text in zip(example.spans, example.texts, strict=True):
                        span.tofile(encoder)
                        offsets["encoder"].append(offsets["encoder"][-1] + len(span))
                        text.tofile(texts)
                        offsets["text"].append(offsets["text"][-1] + len(text))
                    offsets["span"].append(len(offsets["encoder"]) - 1)
                    targets += example.targets
                    offsets["target"].append(len(targets))
                    for candidate in example.candidates:
                        candidate.ids.tofile(shown)
                        offsets["shown"].append(offsets["shown"][-1] + len(candidate.ids))
                        candidates.append(
                            (candidate.span, *candidate.tokens, candidate.holds_answer, candidate.selected)
                        )
                    offsets["candidate"].append(len(candidates))
            if not targets:
                raise DatasetError(f"{source}: no examples")
            index: dict[str, Any] = {
                f"{name}_offsets": np.array(ends, dtype=np.int64) for name, ends in offsets.items()
            }
            index["targets"] = np.array(targets, dtype=np.int64)
            index["candidates"] = np.array(candidates, dtype=np.int64).reshape(-1, 5)
            np.savez(temporary / _INDEX, **index)
            meta = _Meta(
                version=_VERSION,
                examples=len(offsets["target"]) - 1,
                memory_tokens=offsets["encoder"][-1],
                decoder_tokens=offsets["decoder"][-1],
                target_tokens=sum(stop - start for start, stop in targets),
                key=cache_key(source, processor),
                sha256={name: sha256_file(temporary / name) for name in _FILES},
            )
            write_json(temporary / _META, dataclasses.asdict(meta))
        return cls.open(folder)

    @classmethod
    def is_current(cls, folder: str | Path, source: str | Path, processor: Processor) -> bool:
        """Whether a cache is there and was made by this version from this file with these tokenizers.

        Raises:
            DatasetError: It cannot be told, because the cache is damaged.
        """
        folder = Path(folder)
        meta = _read_meta(folder) if (folder / _META).exists() else None
        return meta is not None and meta.key == cache_key(source, processor)


def _read_meta(folder: Path) -> _Meta | None:
    """A cache's `meta.json`; None for one of another version."""
    try:
        values = read_json(folder / _META)
        if isinstance(values, dict) and type(version := values.get("version")) is int and version != _VERSION:
            return None
        meta: _Meta = from_plain(_Meta, values)
    except (DatasetError, ConfigError) as error:
        raise DatasetError(f"{folder / _META} is damaged ({error}): {_anew(folder)}") from None
    return meta


def _anew(folder: Path) -> str:
    return f"delete {folder} to tokenise again"


def tokenize_row(row: Mapping[str, Any], processor: Processor, where: str) -> TokenizedExample:
    """Tokenise one JSONL row.

    Args:
        row: `{"messages", "target"}`, with the loss on the target; `{"messages"}` that end with the assistant's, with
            the loss on each message of the assistant; or `{"text"}`, with the loss on everything outside the memory.
        processor: Tokenizers and limits.
        where: File and row, for messages.

    Raises:
        DatasetError: Its shape or its markers are wrong, or it has no memory span.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{where}: a text holds half a character (a lone surrogate)") from None
    try:
        if isinstance(row.get("messages"), list):
            messages = row["messages"]
            if isinstance(row.get("target"), str):
                turns = [len(messages)]
                messages = [*messages, {"role": "assistant", "content": row["target"]}]
            else:
                turns = [at for at, message in enumerate(messages) if _is_answer(message)]
                if not turns or turns[-1] != len(messages) - 1:
                    raise DatasetError(
                        f'{where}: give a "target", or let the last message be the assistant\'s, with a text as content'
                    )
            spans, ids, targets, queries = _tokenize_turns(messages, turns, processor)
            answers = [messages[at]["content"] for at in turns]
        elif isinstance(row.get("text"), str):
            prompt = parse_raw_prompt(row["text"], processor.tokenizers, None, processor.limit)
            spans, ids, targets = prompt.spans, prompt.input_ids, [(1, len(prompt.input_ids))]
            answers, queries = [], []
        else:
            raise DatasetError(
                f'{where}: expected {{"messages", "target"}}, {{"messages"}} or {{"text"}}, got the keys {sorted(row)}'
            )
    except PromptError as error:
        raise DatasetError(f"{where}: {error}") from None
    if not spans:
        raise DatasetError(f"{where}: no memory span; mark what is to be compressed with the memory markers")
    return TokenizedExample(
        decoder_ids=np.array(ids, dtype=np.int32),
        spans=tuple(np.array(span.token_ids, dtype=np.int32) for span in spans),
        targets=tuple(targets),
        candidates=find_candidates(spans, queries, answers, processor.tokenizers),
        texts=tuple(_text_ids(span, processor) for span in spans),
    )


def _text_ids(span: MemorySpan, processor: Processor) -> np.ndarray:
    """What the decoder reads where a span is text; a control token in it is text as well."""
    made = processor.tokenizers.decoder(span.text, add_special_tokens=False, split_special_tokens=True)
    return np.array(made["input_ids"], dtype=np.int32)


def _is_answer(message: Any) -> bool:
    """Whether a message is the assistant's, and text."""
    return (
        isinstance(message, Mapping) and message.get("role") == "assistant" and isinstance(message.get("content"), str)
    )


def _tokenize_turns(
    messages: Sequence[Mapping[str, Any]], turns: Sequence[int], processor: Processor
) -> tuple[Sequence[MemorySpan], list[int], list[tuple[int, int]], list[str]]:
    """A chat up to its last turn that is learnt: spans, decoder ids, the rows of the assistant's messages `turns`, and
    what each of them was asked.

    Each turn is tokenised as a request for it would be, and then as it would be answered.
    """
    ids: list[int] = []
    targets: list[tuple[int, int]] = []
    queries: list[str] = []
    spans: Sequence[MemorySpan] = ()
    for at in turns:
        prompt = parse_chat_prompt(messages[:at], processor.tokenizers, None, processor.limit)
        if list(prompt.input_ids[: len(ids)]) != ids:
            raise PromptError(
                f"message {at}: the chat template, or white space around an answer, gives the messages before it other "
                "tokens than they were answered with: remove the white space, or give each answer a row of its own"
            )
        ids = [*prompt.input_ids, *processor.target_ids(messages[at]["content"])]
        targets.append((len(prompt.input_ids), len(ids)))
        queries.append(prompt.query)
        spans = prompt.spans
    return spans, ids, targets, queries


def cache_key(source: str | Path, processor: Processor) -> str:
    """Changes with the file's content, a tokenizer or the chat template."""
    tokenizers = processor.tokenizers
    parts = [
        sha256_file(source),
        *(t.backend_tokenizer.to_str() for t in (tokenizers.decoder, tokenizers.encoder)),
        str(tokenizers.decoder.chat_template),
    ]
    return sha256_bytes(json.dumps(parts).encode())


def _map(path: Path) -> np.ndarray:
    # A file of no bytes cannot be mapped.
    return np.memmap(path, dtype=np.int32, mode="r") if path.stat().st_size else np.empty(0, dtype=np.int32)
