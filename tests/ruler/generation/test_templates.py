"""Chat templates, named and a tokenizer's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ruler.generation.templates import NAMED, chat_template
from utils.errors import ConfigError

QWEN_LIKE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_keep_the_prompt(name: str) -> None:
    template = chat_template(name)
    assert template.before + "{task_template}" + template.behind == NAMED[name]


@pytest.mark.parametrize("as_file", [False, True])
def test_the_tokenizers_own(tmp_path: Path, as_file: bool) -> None:
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(QWEN_LIKE)
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": QWEN_LIKE}))
    own = chat_template("tokenizer", str(tmp_path))
    assert own.before == "<|im_start|>user\n"
    assert own.behind == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only for tools') }}", "cannot be rendered: only for tools"),
        ("no place for it", "does not keep the prompt"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "does not keep the prompt"),
    ],
)
def test_unusable_templates(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(ConfigError, match=message):
        chat_template("tokenizer", str(tmp_path))
