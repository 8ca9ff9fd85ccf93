"""Checkpoints whose adapter reads token columns: saved, loaded, converted, described; others stay as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.loaded import check_loaded
from tests.support.tiny import make_model, tokenizers, write_checkpoint
from utils.checkpoint.convert.conversion import convert
from utils.checkpoint.convert.names import pair_names
from utils.checkpoint.describe import main as describe
from utils.checkpoint.layout import CODE_LLAVA, LAYOUTS, LCLM, Layout
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.save import save_checkpoint
from utils.checkpoint.settings import StateOptions
from utils.errors import CheckpointError, ConfigError
from utils.inference.inference import load_model
from utils.model.config import CONFIG_FILE, CompressionConfig

CONFIG = CompressionConfig(chunk_size=4, window=16, pooling="rotary", token_columns=True)
TEXT = "Explain <|memory_start|>def f(): return 1<|memory_end|> and <|memory_start|>x<|memory_end|>"
TOKENS = "projectors/code_tokens.safetensors"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_is_saved_is_what_is_loaded(layout: Layout, tmp_path: Path) -> None:
    original = make_model(CONFIG)
    write_checkpoint(tmp_path / "pair", CONFIG, layout=layout)
    check_loaded(original, tmp_path / "pair", TEXT)


def test_layouts_there_and_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pair", CONFIG)
    convert(tmp_path / "pair", tmp_path / "lclm", layout=LCLM)
    convert(tmp_path / "lclm", tmp_path / "back", layout=CODE_LLAVA)
    for name in (TOKENS, "projectors/code_projection.safetensors"):
        before, after = load_file(tmp_path / "pair" / name), load_file(tmp_path / "back" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert find_checkpoint(tmp_path / "back").config == CONFIG


def test_a_trainer_s_state_has_them_as_well(tmp_path: Path) -> None:
    model = make_model(CONFIG)
    save_checkpoint(tmp_path / "base", model, tokenizers())
    with torch.no_grad():
        model.memory_encoder.adapter.token_fc.weight.add_(1)
    save_file(
        {f"module.{name}": p.detach().clone() for name, p in model.named_parameters()}, tmp_path / "state.safetensors"
    )
    convert(tmp_path / "state.safetensors", tmp_path / "new", base=tmp_path / "base", options=StateOptions())
    merged, _, _ = load_model(tmp_path / "new", device="cpu")
    torch.testing.assert_close(
        merged.memory_encoder.adapter.token_fc.weight, model.memory_encoder.adapter.token_fc.weight
    )
    names = pair_names(["projectors.code_tokens.weight", "projectors.code_tokens.norm.weight"])
    assert list(names.values()) == [
        "memory_encoder.adapter.token_fc.weight",
        "memory_encoder.adapter.token_norm.weight",
    ]


def test_it_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "pair", CONFIG)
    assert describe([str(tmp_path / "pair"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["token_columns"] is True


def test_the_fingerprint_knows_their_weights(tmp_path: Path) -> None:
    model = make_model(CONFIG)
    save_checkpoint(tmp_path / "a", model, tokenizers())
    with torch.no_grad():
        model.memory_encoder.adapter.token_fc.weight.mul_(2)
    save_checkpoint(tmp_path / "b", model, tokenizers())
    assert find_checkpoint(tmp_path / "a").fingerprint != find_checkpoint(tmp_path / "b").fingerprint


def test_others_are_written_as_ever(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pair", CompressionConfig(chunk_size=4, window=16, pooling="rotary"))
    assert "token_columns" not in json.loads((tmp_path / "pair" / CONFIG_FILE).read_text())
    assert not (tmp_path / "pair" / TOKENS).exists()


def test_files_that_do_not_agree_are_errors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pair", CONFIG)
    (tmp_path / "pair" / TOKENS).rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"code_tokens\.safetensors is missing"):
        find_checkpoint(tmp_path / "pair")
    write_checkpoint(tmp_path / "lclm", CONFIG, layout=LCLM)
    path = tmp_path / "lclm" / CONFIG_FILE
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "token_columns": False}))
    with pytest.raises(CheckpointError, match=r"token_\w+\.weight is unknown"):
        load_model(tmp_path / "lclm", device="cpu")
    path.write_text(json.dumps({**values, "token_columns": 1}))
    with pytest.raises(ConfigError, match="token_columns: expected true or false, got 1"):
        find_checkpoint(tmp_path / "lclm")
