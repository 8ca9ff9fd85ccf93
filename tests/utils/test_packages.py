"""Which installed packages may be read, and which are kept for evaluation."""

from __future__ import annotations

import pytest

from utils.packages import is_for_evaluation, permissive_licence


class Package:
    """A distribution's metadata."""

    def __init__(self, **metadata: str) -> None:
        self.metadata = self
        self.values = {key.replace("_", "-"): value for key, value in metadata.items()}

    def get_all(self, name: str) -> list[str]:
        return [self.values[name]] if name in self.values else []


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ({"License_Expression": "MIT"}, "MIT"),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, "BSD License"),
        ({"License": "Apache-2.0", "Classifier": "Topic :: Games"}, "Apache-2.0"),
        ({"License": "GPL-3.0"}, None),
        ({"License_Expression": "MIT AND MPL-2.0"}, None),
        ({"License_Expression": "MIT", "License": "LGPL"}, None),
        # A system that a program runs on, and the text of a licence.
        ({"Classifier": "Operating System :: POSIX :: BSD"}, None),
        ({"License": "Permission is granted\nby MIT"}, None),
        ({}, None),
    ],
)
def test_only_permissive_licences(metadata: dict[str, str], licence: str | None) -> None:
    assert permissive_licence(Package(**metadata)) == licence  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["huggingface_hub", "huggingface-hub", "Jinja2"])
def test_packages_for_evaluation(name: str) -> None:
    assert is_for_evaluation(name)
    assert not is_for_evaluation("numpy")
