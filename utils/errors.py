"""The error family: every error a user can cause or meet derives from `CodeLlavaError`.

A message says what is wrong, where, what was expected and what was got, and what to do next. Commands print it as one
`error: …` line and exit 1. `assert` is kept for our own bugs.
"""

from __future__ import annotations


class CodeLlavaError(Exception):
    """Base of all errors that a command reports without a traceback."""


class ConfigError(CodeLlavaError):
    """A setting, flag or configuration file is wrong, or the machine lacks what it asks for."""


class CheckpointError(CodeLlavaError):
    """A checkpoint folder is missing, incomplete, or does not fit its own configuration."""


class PromptError(CodeLlavaError):
    """A prompt's memory markers or lengths are wrong."""


class SpliceError(CodeLlavaError):
    """Latents and placeholders do not agree."""


class ServerError(CodeLlavaError):
    """A model server cannot be reached or refused a request."""


class DatasetError(CodeLlavaError):
    """A data file is missing, malformed, or belongs to something else."""


def first_line(error: BaseException) -> str:
    """The first line that says something of another library's message, for use inside one of ours.

    The exception's name stands before it where the message alone (`KeyError: 'x'`) does not say what is wrong.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Headings, such as torch's "Error(s) in loading state_dict for …:".
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])[:500]
    telling = isinstance(error, (CodeLlavaError, OSError, ValueError, RuntimeError, ImportError)) and text
    return text if telling else f"{type(error).__name__}: {text}".removesuffix(": ")


def shown_name(name: str) -> str:
    """A name from outside (a file's, a document's) as messages and lists show it: quoted, with escapes, where it holds
    what a terminal would obey or not show."""
    return name if name.isprintable() else repr(name)
