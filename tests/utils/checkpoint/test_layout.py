"""Finding checkpoints: the newest of a run, hub ids, chunk sizes, fingerprints."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tests.support.tiny import make_memory_encoder, make_model, tokenizers
from utils.checkpoint.layout import LAYOUTS, LCLM, Layout
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.save import save_adapter, save_checkpoint
from utils.errors import CheckpointError
from utils.model.config import CompressionConfig


def test_the_largest_number_is_the_newest(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    for name in ("checkpoint_2", "checkpoint_10", "checkpoint_9-epoch_1", "checkpoint_final", "logs"):
        shutil.copytree(checkpoints["lclm"], run / name)
    with caplog.at_level(logging.INFO, logger="utils"):
        assert find_checkpoint(run).root == run / "checkpoint_10"
    assert "checkpoint_10" in caplog.text
    # The newest is checked, and never passed over for an older one.
    shutil.rmtree(run / "checkpoint_10" / "encoder")
    with pytest.raises(CheckpointError, match=r"checkpoint_10.*encoder/"):
        find_checkpoint(run)


def test_a_checkpoint_that_holds_checkpoints_is_itself_meant(copied: Callable[[str], Path]) -> None:
    root = copied("code-llava")
    shutil.copytree(root, root / "checkpoint_5")
    assert find_checkpoint(root).root == root


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts(layout: Layout, checkpoints: dict[str, Path]) -> None:
    files = find_checkpoint(checkpoints[layout.name])
    assert files.layout is layout
    assert (files.decoder.parent, files.encoder.parent) == (files.root, files.root)


def test_a_published_code_llava_checkpoint_takes_the_chunk_size_given(copied: Callable[[str], Path]) -> None:
    root = copied("code_llava_c8")
    config = find_checkpoint(root, 8).config
    assert config == CompressionConfig.code_llava(8)
    assert config.rope_dtype == "bfloat16"


def test_a_hub_id_is_downloaded(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(checkpoints["lclm"])
    )
    with caplog.at_level(logging.INFO, logger="utils"):
        assert find_checkpoint("some-org/some-model").root == checkpoints["lclm"]
    assert asked == ["some-org/some-model"]
    assert "downloading it from the Hugging Face hub" in caplog.text


def test_offline_a_hub_id_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"some-org/some-model.* hub: \S"):
        find_checkpoint("some-org/some-model")


def test_unknown_keys_of_the_config_are_reported(
    copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = copied("lclm")
    path = root / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainer": "x"}))
    find_checkpoint(root)
    assert f"{path}: keys that mean nothing here: trainer" in caplog.text


def test_fingerprint_is_of_what_decides_a_latent(copied: Callable[[str], Path], checkpoints: dict[str, Path]) -> None:
    root = copied("lclm")
    before = find_checkpoint(root).fingerprint
    assert before == find_checkpoint(checkpoints["lclm"]).fingerprint
    # Not the chunk size, which cache keys carry themselves, nor the decoder.
    assert find_checkpoint(root, 8).fingerprint == before
    (root / "decoder" / "generation_config.json").write_text("{}")
    assert find_checkpoint(root).fingerprint == before
    seen = {before}
    changes: list[Callable[[], None]] = [
        lambda: save_adapter(root, make_memory_encoder(CONFIG, seed=9).adapter, CONFIG, LCLM),
        lambda: save_adapter(root, make_memory_encoder(CONFIG, seed=9).adapter, WIDER, LCLM),
        lambda: flip_last_byte(root / "encoder" / "model.safetensors"),
    ]
    for change in changes:
        change()
        seen.add(find_checkpoint(root).fingerprint)
    assert len(seen) == 1 + len(changes)


CONFIG = CompressionConfig(chunk_size=4, window=32)
WIDER = CompressionConfig(chunk_size=4, window=64)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_saving_replaces_a_whole_folder_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "pair"
    model = make_model(CONFIG)
    save_checkpoint(target, model, tokenizers())
    (target / "llm" / "stale").write_text("x")
    before = find_checkpoint(target).fingerprint

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(target, model, tokenizers())
    assert find_checkpoint(target).fingerprint == before
    assert (target / "llm" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]
    save_checkpoint(target, model, tokenizers())
    assert not (target / "llm" / "stale").exists()


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIG)

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model.decoder, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_checkpoint(tmp_path / "pair", model, tokenizers())
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "pair"))
    assert list(tmp_path.iterdir()) == []


def test_attention_adapters_are_saved_as_lclm_only(tmp_path: Path) -> None:
    config = CompressionConfig(chunk_size=4, window=32, adapter="mlp_attn", num_adapter_layers=2)
    model = make_model(config)
    with pytest.raises(CheckpointError, match=r"code-llava.*mlp_attn.*lclm"):
        save_checkpoint(tmp_path / "a", model, tokenizers())
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "b", model, tokenizers(), LCLM)
    assert find_checkpoint(tmp_path / "b").config == config


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = make_model(CONFIG)
    before = model.code_chunker.encoder.config._attn_implementation
    save_checkpoint(tmp_path / "a", model, tokenizers())
    assert model.code_chunker.encoder.config._attn_implementation == before
    assert "packed" not in (tmp_path / "a" / "embedder" / "config.json").read_text()
