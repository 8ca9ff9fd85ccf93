"""Installed packages as sources of code: under which licences, and which of them are kept for evaluation."""

from __future__ import annotations

import importlib.metadata
import re

# RULER's code tasks make their haystacks of them, so that nothing is ever trained on them.
EVALUATION_PACKAGES = (
    "accelerate",
    "fastapi",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "networkx",
    "openai",
    "peft",
    "uvicorn",
)
_PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|0BSD|Unlicense)\b", re.IGNORECASE)
_COPYLEFT = re.compile(r"\b(A?GPL|LGPL|MPL)", re.IGNORECASE)


def is_for_evaluation(name: str) -> bool:
    """Whether a package is one of `EVALUATION_PACKAGES`, however its name is written."""
    return re.sub(r"[-_.]+", "_", name).lower() in EVALUATION_PACKAGES


def permissive_licence(package: importlib.metadata.Distribution) -> str | None:
    """What a package says about its licence, on one line; None unless all that it says is permissive."""
    fields = ("License-Expression", "Classifier", "License")
    values = [(name, str(value).strip()) for name in fields for value in package.metadata.get_all(name) or []]
    # A field of several lines is a licence's whole text.
    stated = [
        value
        for name, value in values
        if "\n" not in value and (name != "Classifier" or value.startswith("License ::"))
    ]
    permissive = [value for value in stated if _PERMISSIVE.search(value)]
    if not permissive or any(map(_COPYLEFT.search, stated)):
        return None
    return permissive[0].rpartition("::")[2].strip()
