"""Tokenizers that prompts are measured with: a Hugging Face folder, `tokenizer.json`, hub id, tiktoken, sentencepiece.

Measuring needs three things only: how many tokens a text has (without special tokens), which tokens, and whether the
tokenizer cuts a text into words before it does anything else (`splits_words`), so that counts of parts add up. The
light `tokenizers` package reads Hugging Face files; transformers is imported only for folders without `tokenizer.json`.

    tokenizer = load_tokenizer("hf", "models/Qwen3-4B")
    tokenizer.count(["one text", "another"])          # [2, 1]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from utils.errors import CheckpointError, ConfigError
from utils.files import sha256_file
from utils.pretrained import loading, read_settings, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MIN_BATCH = 48  # waking the tokenizer's threads costs more than fewer texts take
TOKENIZER_TYPES = ("hf", "openai", "nemo")


class TextTokenizer(Protocol):
    """What the generators ask of a tokenizer.

    Attributes:
        name: What the user called it.
        fingerprint: sha256 that changes with the vocabulary.
        splits_words: True where a text is split at spaces before tokens are formed, so that no token crosses one.
    """

    name: str
    fingerprint: str
    splits_words: bool

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...

    def count(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        ...


class HuggingFaceTokenizer:
    """A fast tokenizer as stored in `tokenizer.json`."""

    def __init__(self, backend: Tokenizer, name: str, fingerprint: str) -> None:
        # Some files carry the truncation and padding of their training script.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.name = name
        self.fingerprint = fingerprint
        splitter = backend.pre_tokenizer
        self.splits_words = splitter is not None and len(splitter.pre_tokenize_str("one two")) > 1

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def count(self, texts: Sequence[str]) -> list[int]:
        if len(texts) < _MIN_BATCH:
            return [len(self.encode(text)) for text in texts]
        return [len(encoding) for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]


class TransformersTokenizer:
    """A slow tokenizer that only transformers can load."""

    splits_words = False

    def __init__(self, backend: Any, name: str) -> None:
        self._backend = backend
        self.name = name
        self.fingerprint = _hash_words(sorted(backend.get_vocab()))

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False))

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(self.encode(text)) for text in texts]


class TiktokenTokenizer:
    """An OpenAI encoding. Text that spells a special token counts as ordinary text."""

    splits_words = True

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.name = str(backend.name)
        self.fingerprint = _hash_words([f"{backend.name}:{backend.n_vocab}"])

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode_ordinary(text))

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._backend.encode_ordinary_batch(list(texts))]


class SentencePieceTokenizer:
    """A sentencepiece model file; its pieces may cross any place, so counts are always taken of whole texts."""

    splits_words = False

    def __init__(self, path: Path) -> None:
        spm = _import("sentencepiece")
        with loading(path, "is not a model that sentencepiece can read"):
            self._backend = spm.SentencePieceProcessor(model_file=str(path))
        self.name = str(path)
        self.fingerprint = sha256_file(path)

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text))

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._backend.encode(list(texts))]


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
    folder = Path(path)
    if not folder.exists():
        names = ("chat_template.jinja", "tokenizer_config.json")
        found = [file for file in (_hub_file(path, name, required=False) for name in names) if file]
    else:
        folder = folder if folder.is_dir() else folder.parent
        found = [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
    for file in filter(Path.exists, found):
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


def _load_hugging_face(path: str) -> TextTokenizer:
    from tokenizers import Tokenizer

    local = Path(path)
    if local.is_dir() and not (local / "tokenizer.json").exists():
        return _load_with_transformers(path)
    if local.is_dir():
        file = local / "tokenizer.json"
    elif local.is_file():
        file = local
    else:
        found = _hub_file(path, "tokenizer.json", required=True)
        assert found is not None
        file = found
    with loading(file, "is not a tokenizer that `tokenizers` can read"):
        backend = Tokenizer.from_file(str(file))
    return HuggingFaceTokenizer(backend, path, sha256_file(file))


def _load_with_transformers(path: str) -> TextTokenizer:
    return TransformersTokenizer(read_tokenizer(path), path)


def _hub_file(repo: str, name: str, *, required: bool) -> Path | None:
    """A file of a hub repository, from the local cache or the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if not required:
            return None
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"no tokenizer at {repo}: neither a folder, nor a tokenizer.json file, nor on the hub ({reason})"
        ) from None


def _load_tiktoken(name: str) -> TextTokenizer:
    tiktoken = _import("tiktoken")
    try:
        encoding = (
            tiktoken.get_encoding(name) if name in tiktoken.list_encoding_names() else tiktoken.encoding_for_model(name)
        )
    except (KeyError, ValueError):
        raise ConfigError(
            f"unknown tiktoken encoding {name!r}: expected a model name or one of {tiktoken.list_encoding_names()}"
        ) from None
    except OSError as error:
        raise ConfigError(f"tiktoken could not fetch the encoding {name!r}: {error}") from None
    return TiktokenTokenizer(encoding)


def _load_sentencepiece(path: str) -> TextTokenizer:
    if not Path(path).is_file():
        raise ConfigError(f"no sentencepiece model at {path}: expected a .model file")
    return SentencePieceTokenizer(Path(path))


def _import(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"{package} is not installed: uv sync --extra ruler-tokenizers") from None


def _hash_words(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
