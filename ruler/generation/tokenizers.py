"""Tokenizers that prompts are measured with: a Hugging Face folder, `tokenizer.json`, hub id, tiktoken, sentencepiece.

Measuring needs three things only: how many tokens a text has (without special tokens), which tokens, and whether the
tokenizer cuts a text into words before it does anything else (`splits_words`), so that counts of parts add up. The
light `tokenizers` package reads Hugging Face files; transformers is imported only for folders without `tokenizer.json`.

    tokenizer = load_tokenizer("hf", "models/Qwen3-4B")
    tokenizer.count(["one text", "another"])          # [2, 1]
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import CheckpointError, ConfigError, first_line
from utils.files import sha256_bytes, sha256_file
from utils.pretrained import TOKENIZER, loading, read_settings, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MIN_BATCH = 48  # waking the tokenizer's threads costs more than fewer texts take
TOKENIZER_TYPES = ("hf", "openai", "nemo")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokenizer:
    """What the generators ask of a tokenizer; special tokens are never among the ids.

    Attributes:
        name: What the user called it.
        fingerprint: sha256 that changes with the vocabulary.
        splits_words: True where a text is split at spaces before tokens are formed, so that no token crosses one.
        encode: Token ids of a text.
        encode_batch: Those of many texts at once; None where that is no faster.
    """

    name: str
    fingerprint: str
    splits_words: bool
    encode: Callable[[str], list[int]]
    encode_batch: Callable[[list[str]], Sequence[Sized]] | None = None

    def count(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        if self.encode_batch is None or len(texts) < _MIN_BATCH:
            return [len(self.encode(text)) for text in texts]
        return [len(ids) for ids in self.encode_batch(list(texts))]


def load_tokenizer(kind: str, path: str) -> TextTokenizer:
    """Load a tokenizer.

    Args:
        kind: `hf` (a folder, a `tokenizer.json` file or a hub id), `openai` (a tiktoken encoding or model name) or
            `nemo` (a sentencepiece `.model` file).
        path: Where it is.

    Raises:
        ConfigError: There is no such tokenizer, or the package that reads it is not installed.
    """
    loaders = {"hf": _load_hugging_face, "openai": _load_tiktoken, "nemo": _load_sentencepiece}
    if kind not in loaders:
        raise ConfigError(f"unknown tokenizer type {kind!r}: expected one of {', '.join(TOKENIZER_TYPES)}")
    try:
        return loaders[kind](path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def read_chat_template(path: str) -> str:
    """The chat template (Jinja) that a Hugging Face tokenizer folder or hub id carries.

    Raises:
        ConfigError: It carries none.
        CheckpointError: A file of it cannot be read.
    """
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        try:
            file = _tokenizer_file(path, name)
        except ConfigError:
            continue
        if file.suffix == ".jinja":
            with loading(file, "cannot be read"):
                template: Any = file.read_text(encoding="utf-8")
        else:
            template = read_settings(file).get("chat_template")
        if isinstance(template, list):  # several named ones
            named = [item for item in template if isinstance(item, dict)]
            template = next((item.get("template") for item in named if item.get("name") == "default"), None)
        if template:
            return str(template)
    raise ConfigError(
        f"the tokenizer {path} has no chat template (chat_template.jinja or tokenizer_config.json): "
        "name one of the templates instead"
    )


def _tokenizer_file(path: str, name: str) -> Path:
    """A file of a tokenizer: in its folder, beside its `tokenizer.json`, or in its hub repository (cached or fetched).

    Raises:
        ConfigError: There is none.
    """
    local = Path(path)
    if local.exists():
        file = (local if local.is_dir() else local.parent) / name
        if not file.exists():
            raise ConfigError(f"{file} does not exist")
        return file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"no tokenizer at {path}: neither a folder, nor a tokenizer.json file, nor on the hub ({first_line(error)})"
        ) from None


def _load_hugging_face(path: str) -> TextTokenizer:
    from tokenizers import Tokenizer

    local = Path(path)
    if local.is_dir() and not (local / TOKENIZER).exists():
        return _load_with_transformers(path)
    file = local if local.is_file() else _tokenizer_file(path, TOKENIZER)
    with loading(file, "is not a tokenizer that `tokenizers` can read"):
        backend = Tokenizer.from_file(str(file))
    return from_hugging_face(backend, path, sha256_file(file))


def from_hugging_face(backend: Tokenizer, name: str, fingerprint: str) -> TextTokenizer:
    """A fast tokenizer as stored in `tokenizer.json`."""
    # Some files carry the truncation and padding of their training script.
    backend.no_truncation()
    backend.no_padding()
    splitter = backend.pre_tokenizer
    return TextTokenizer(
        name=name,
        fingerprint=fingerprint,
        splits_words=splitter is not None and len(splitter.pre_tokenize_str("one two")) > 1,
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        encode_batch=lambda texts: backend.encode_batch_fast(texts, add_special_tokens=False),
    )


def _load_with_transformers(path: str) -> TextTokenizer:
    """A slow tokenizer that only transformers can load."""
    backend = read_tokenizer(path)
    return TextTokenizer(
        name=path,
        fingerprint=_hash_words(sorted(backend.get_vocab())),
        splits_words=False,
        encode=lambda text: list(backend.encode(text, add_special_tokens=False)),
    )


def _load_tiktoken(name: str) -> TextTokenizer:
    tiktoken = _import("tiktoken")
    known = tiktoken.list_encoding_names()
    try:
        return from_tiktoken(tiktoken.get_encoding(name) if name in known else tiktoken.encoding_for_model(name))
    except (KeyError, ValueError):
        raise ConfigError(f"unknown tiktoken encoding {name!r}: expected a model name or one of {known}") from None
    except OSError as error:
        raise ConfigError(f"tiktoken could not fetch the encoding {name!r}: {error}") from None


def from_tiktoken(encoding: Any) -> TextTokenizer:
    """An OpenAI encoding. Text that spells a special token counts as ordinary text."""
    return TextTokenizer(
        name=str(encoding.name),
        fingerprint=_hash_words([f"{encoding.name}:{encoding.n_vocab}"]),
        splits_words=True,
        encode=lambda text: list(encoding.encode_ordinary(text)),
        encode_batch=encoding.encode_ordinary_batch,
    )


def _load_sentencepiece(path: str) -> TextTokenizer:
    """A sentencepiece model file; its pieces may cross any place, so counts are always taken of whole texts."""
    if not Path(path).is_file():
        raise ConfigError(f"no sentencepiece model at {path}: expected a .model file")
    spm = _import("sentencepiece")
    with loading(path, "is not a model that sentencepiece can read"):
        backend = spm.SentencePieceProcessor(model_file=path)
    return TextTokenizer(
        name=path, fingerprint=sha256_file(path), splits_words=False, encode=lambda text: list(backend.encode(text))
    )


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"{package} is not installed: uv sync --extra ruler-tokenizers") from None


def _hash_words(words: Sequence[str]) -> str:
    return sha256_bytes("\n".join(words).encode())
