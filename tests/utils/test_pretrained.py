"""Hostile folders: nothing of theirs is run, nobody is asked, nothing is fetched; and who may call the loaders."""

from __future__ import annotations

import ast
import functools
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from ruler.answering.backends import open_backend
from ruler.answering.protocol import BackendSettings
from tests.support.processes import run_python
from utils.checkpoint import describe
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.errors import CheckpointError, CodeLlavaError
from utils.files import PROJECT_ROOT
from utils.inference.inference import load_model
from utils.pretrained import loading, read_config, read_model, read_settings, read_tokenizer
from utils.training.config import PairConfig
from utils.training.pairs import starting_pair

Copied = Callable[[str], Path]


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


@pytest.fixture
def own_code(copied: Copied, tmp_path: Path) -> Path:
    """A checkpoint whose encoder's folder carries a program that leaves a file behind when it is imported."""
    root = copied("code-llava")
    (root / "embedder" / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast as T, Qwen3Config as C, Qwen3Model as M\n"
    )
    return root


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("config.json", {"AutoConfig": "mine.C", "AutoModel": "mine.M"}),
        ("config.json", {"AutoModel": "mine.M"}),
        ("config.json", {"AutoConfig": "some-org/some-model--mine.C"}),
        ("config.json", "mine.C"),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "mine.T"]}),
        ("tokenizer_config.json", ["mine.T", None]),
        ("generation_config.json", {"AutoModel": "mine.M"}),
        ("processor_config.json", {"AutoProcessor": "mine.P"}),
    ],
)
def test_own_code_is_an_error_without_a_question(
    file: str, value: Any, own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own_code / "embedder" / file
    edit(path, auto_map=value)
    edit(own_code / "embedder" / "config.json", model_type="mine" if "AutoConfig" in value else "qwen3")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    ways: list[Callable[[], Any]] = [
        lambda: Compressor.load(own_code, settings=ON_CPU),
        lambda: load_model(own_code, device="cpu"),
        lambda: read_config(path.parent),
        lambda: read_tokenizer(path.parent),
        lambda: read_model(AutoModel, path.parent),
        lambda: starting_pair(PairConfig(encoder=str(path.parent), decoder=str(own_code / "llm"))),
        lambda: open_backend(BackendSettings(name="local-text", model=str(path.parent))),
    ]
    for way in ways:
        with pytest.raises(CheckpointError, match="auto_map") as caught:
            way()
        assert str(path) in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_own_code_of_a_nested_configuration(own_code: Path) -> None:
    edit(own_code / "embedder" / "config.json", text_config={"auto_map": {"AutoConfig": "mine.C"}})
    with pytest.raises(CheckpointError, match=r"config\.json: auto_map"):
        read_config(own_code / "embedder")


def test_describing_names_the_file(own_code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(own_code / "embedder" / "config.json", auto_map={"AutoConfig": "mine.C"})
    assert describe.main([str(own_code)]) == 1
    assert "embedder/config.json: auto_map" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"attn_implementation": "some-org/some-kernel"}, "some-org/some-kernel"),
        ({"_attn_implementation": "kernels-community/flash-attn:f"}, "kernels-community"),
        ({"experts_implementation": {"": "some-org/some-kernel"}}, "some-org/some-kernel"),
        ({"transformers_weights": "../weights.safetensors"}, "transformers_weights"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"hidden_size": 10**7}, r"numbers, .* bytes"),
        ({"vocab_size": 10**9}, r"numbers, .* bytes"),
        ({"intermediate_size": 10**9}, r"numbers, .* bytes"),
        ({"head_dim": 10**9}, r"numbers, .* bytes"),
        ({"hidden_size": -24}, "negative"),
        ({"num_attention_heads": 0}, "."),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"dtype": "int8"}, "."),
        ({"dtype": "load"}, "."),
        ({"model_type": ["qwen3"]}, "."),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], wanted: str, copied: Copied) -> None:
    folder = copied("code-llava") / "embedder"
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        read_model(AutoModel, folder)
    assert str(folder) in str(caught.value)


def test_wide_experts_are_no_absurd_number_of_them(copied: Copied) -> None:
    folder = copied("code-llava") / "embedder"
    edit(folder / "config.json", shared_expert_intermediate_size=20_480, block_size=32_768)
    read_model(AutoModel, folder)


def test_how_a_model_computes_is_not_the_configuration_s_choice(copied: Copied) -> None:
    folder = copied("code-llava") / "embedder"
    usual = read_model(AutoModel, folder)[0].config._attn_implementation
    edit(folder / "config.json", attn_implementation="flash_attention_2")
    assert read_model(AutoModel, folder)[0].config._attn_implementation == usual


def test_pickled_weights_are_not_opened(copied: Copied) -> None:
    folder = copied("code-llava") / "embedder"
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_model(AutoModel, folder)
    with pytest.raises(CheckpointError, match="pickled"):
        find_checkpoint(folder.parent)


@pytest.mark.parametrize(
    "shard", ["../../llm/model.safetensors", "/etc/passwd", "", ".", "x.bin", 5, None, ["a"], "\ud800", "x" * 5000]
)
def test_shards_lie_beside_their_index(shard: Any, copied: Copied) -> None:
    folder = copied("code-llava") / "embedder"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": shard}}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        find_checkpoint(folder.parent)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "5", "{", "[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", b"\xff\xfe", "NaN"],
)
def test_settings_that_are_no_object(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"settings\.json"):
        read_settings(path)


def test_settings_that_are_no_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json", "nothing.json"):
        with pytest.raises(CheckpointError, match=name):
            read_settings(tmp_path / name)


def test_a_template_may_fail_in_any_way(copied: Copied) -> None:
    root = copied("code-llava")
    for template in ("{% for i in range(10**9) %}x{% endfor %}", "{{ 1 / 0 }}", "{{ messages.a.b.c() }}", "{% if %}"):
        (root / "llm" / "chat_template.jinja").write_text(template)
        with pytest.raises(CodeLlavaError, match="template"):
            Compressor.load(root, settings=ON_CPU).parse_chat([{"role": "user", "content": "x"}])


def test_panics_of_rust_are_errors_of_the_file() -> None:
    class PanicException(BaseException):
        """As pyo3 has it."""

    with (
        pytest.raises(CheckpointError, match=r"the file cannot be read: PanicException: oh"),
        loading("the file", "cannot be read"),
    ):
        raise PanicException("oh")
    with pytest.raises(KeyboardInterrupt), loading("the file", "cannot be read"):
        raise KeyboardInterrupt


ONLINE = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("a connection was tried")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from utils.checkpoint.locate import find_checkpoint
from utils.inference.inference import load_model
print(find_checkpoint(sys.argv[1]).fingerprint)
model, _, processor = load_model(sys.argv[1], device="cpu")
model.generate([processor.parse_chat([{"role": "user", "content": "x"}])], max_new_tokens=1)
"""


def test_a_folder_that_is_there_asks_nobody(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("socket.socket.connect", "socket.create_connection", "socket.getaddrinfo"):
        monkeypatch.setattr(name, lambda *given, **_: asked.append(given) or pytest.fail("a connection was tried"))
    model, _, processor = load_model(checkpoints["code-llava"], device="cpu")
    model.generate([processor.parse_chat([{"role": "user", "content": "x"}])], max_new_tokens=1)
    assert asked == []


@pytest.mark.slow
def test_a_folder_asks_nobody(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkpoints["code-llava"]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    done = run_python("-c", ONLINE, root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == find_checkpoint(root).fingerprint
    assert socket.socket.connect is not None


@functools.cache
def calls() -> list[tuple[str, ast.Call]]:
    """Calls that load something, as (file, call)."""
    loaders = {"from_pretrained", "from_config", "snapshot_download", "hf_hub_download"}
    found = []
    for package in ("utils", "general", "ruler", "ruler_minimal"):
        for path in (PROJECT_ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = node.func if isinstance(node, ast.Call) else None
                if getattr(called, "attr", getattr(called, "id", None)) in loaders:
                    found.append((path.relative_to(PROJECT_ROOT).as_posix(), node))
    return found


def test_one_module_has_transformers_load_things() -> None:
    allowed = {
        "utils/pretrained.py",
        "utils/checkpoint/default/build.py",  # the GGUF file of a package
        "utils/checkpoint/lora.py",  # peft
        "ruler/generation/tokenizers.py",  # single files of a hub repository
    }
    assert {file for file, _ in calls()} <= allowed


def test_every_loader_is_told_not_to_trust() -> None:
    names = ("AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForCausalLM", "kind")
    checked = 0
    for file, call in calls():
        owner = ast.unparse(call.func).split(".")[0]
        if owner in names:
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert arguments.get("trust_remote_code") == "False", f"{file}, line {call.lineno}"
            checked += 1
    assert checked >= 4
