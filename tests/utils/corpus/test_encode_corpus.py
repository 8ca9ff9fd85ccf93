"""The command that encodes a corpus: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import itertools
import json
import re
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from safetensors.torch import load_file

from utils.checkpoint.settings import ON_CPU, EncoderSettings
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.compress.latent_files import LatentFiles
from utils.compress.span_encoder import SpanEncoder
from utils.corpus import __main__ as encode_corpus
from utils.corpus import encode as corpus_encode
from utils.corpus import run as corpus_run
from utils.corpus.encode import CorpusJob, CorpusWorker
from utils.corpus.reader import EncodedCorpus
from utils.corpus.shards import CorpusOutput, checksum, new_shard
from utils.corpus.source import Document
from utils.errors import ConfigError, DatasetError

TEXTS = {
    "a.py": "def f():\r\n    return 1\r\n" * 6,
    "b/empty.py": "",
    "b/same.py": "def f():\r\n    return 1\r\n" * 6,
    "b/é.py": "naïve = 'é'  # ünï\n" * 5,
    "c.py": "x",
    "d.py": "class A:\n    pass\n" * 12,
}
Encode = Callable[..., dict[str, Any]]


def write(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus", TEXTS)


@pytest.fixture
def encode(checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Encode:
    """Run the command on a corpus; returns its summary, or its error under "error"."""

    def run(corpus: Path, *flags: str, layout: str = "lclm", code: int = 0) -> dict[str, Any]:
        where = [] if "--to-cache" in flags or "--output" in flags else ["--output", str(tmp_path / "out")]
        flags = ("--checkpoint", str(checkpoints[layout]), "--device", "cpu", "--json", *where, *flags)
        capsys.readouterr()
        got = encode_corpus.main([str(corpus), "--shard-size", "200", *flags])
        out, err = capsys.readouterr()
        assert got == code, err
        return json.loads(out) if out else {"error": err}

    return run


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("latents-*")}


def read_all(folder: Path) -> None:
    with EncodedCorpus.open(folder) as encoded:
        for row in encoded:
            encoded.latents(row.id)


def prompt_latents(compressor: Compressor, text: str) -> torch.Tensor:
    """What a prompt with this text as memory gets."""
    embeds = compressor.compress([compressor.parse_raw(f"<|memory_start|>{text}<|memory_end|>")])[0]
    ((start, stop),) = embeds.spans
    return embeds.values_TD[start:stop]


@pytest.mark.parametrize("layout", ["code-llava", "lclm"])
def test_latents_are_those_of_prompts(
    layout: str, encode: Encode, corpus: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    summary = encode(corpus, layout=layout)
    compressor = Compressor.load(checkpoints[layout], settings=ON_CPU)
    with EncodedCorpus.open(tmp_path / "out") as encoded:
        encoded.check(compressor.files)
        rows = list(encoded)
        assert [row.id for row in rows] == sorted(TEXTS, key=str.encode)
        for row in rows:
            text = TEXTS[row.id]
            assert row.num_tokens == len(text.encode())
            assert row.num_latents == -(-row.num_tokens // 4) == row.stop_row - row.first_row
            if text:
                rows_ND = prompt_latents(compressor, text)
                torch.testing.assert_close(encoded.latents(row.id), rows_ND, atol=1e-5, rtol=0)
            else:
                assert encoded.latents(row.id).shape == (0, 0)
        assert len(encoded) == len(TEXTS)
        assert "a.py" in encoded
        with pytest.raises(DatasetError, match="no document 'nothing'"):
            encoded.latents("nothing")
    sums = {"memory_tokens": sum(r.num_tokens for r in rows), "num_latents": sum(r.num_latents for r in rows)}
    assert summary.items() >= {**sums, "documents": 6, "empty": 1, "missing": 0, "problems": 0}.items()
    assert summary["shards"] == len(shards(tmp_path / "out")) > 1


def test_shards_are_plain_safetensors_in_the_encoders_dtype(
    encode: Encode, corpus: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    encode(corpus, "--dtype", "bfloat16")
    compressor = Compressor.load(checkpoints["lclm"], settings=EncoderSettings(device="cpu", dtype="bfloat16"))
    with EncodedCorpus.open(tmp_path / "out") as encoded:
        row = encoded.document("d.py")
        rows_ND = load_file(tmp_path / "out" / row.shard)["latents"][row.first_row : row.stop_row]
        assert rows_ND.dtype == torch.bfloat16
        assert torch.equal(rows_ND, encoded.latents("d.py"))
    torch.testing.assert_close(rows_ND, prompt_latents(compressor, TEXTS["d.py"]), atol=0.05, rtol=0.05)


def test_a_shard_of_texts_without_tokens(tmp_path: Path) -> None:
    document = Document(id='a "quoted" é', sha256="0" * 64, text_bytes=3)
    output = CorpusOutput(root=tmp_path, settings={"chunk_size": 4})
    with new_shard(tmp_path, [document], output.about) as shard:
        shard.add(document, None, 0)
    (path,) = tmp_path.iterdir()
    check = checksum(document.id, document.sha256, 0, None)
    assert list(output.shards()) == [(path.name, [(document.id, document.sha256, 0, 0, 0, check)])]
    with pytest.raises(DatasetError, match="is of another run"):
        list(CorpusOutput(root=tmp_path, settings={"chunk_size": 8}).shards())
    path.unlink()
    with new_shard(tmp_path, [document], output.about):
        pass  # every document vanished
    assert list(tmp_path.iterdir()) == []


def test_a_span_takes_its_latents_from_the_corpus(
    encode: Encode, corpus: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(corpus)
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    text = f"See <|memory_start|>{TEXTS['d.py']}<|memory_end|> and <|memory_start|>{TEXTS['c.py']}<|memory_end|>."
    prompt = compressor.parse_raw(text)
    expected = compressor.compress([prompt])[0]
    monkeypatch.setattr(compressor.memory_encoder, "encode_units", None)
    with EncodedCorpus.open(tmp_path / "out") as encoded:
        embeds = compressor.embed(prompt, [encoded.encoded(span) for span in prompt.spans])
        torch.testing.assert_close(embeds.values_TD, expected.values_TD, atol=1e-5, rtol=0)
        assert embeds.stats.cached_tokens == prompt.memory_tokens
        with pytest.raises(DatasetError, match="no document with this span's text"):
            encoded.encoded(compressor.parse_raw("<|memory_start|>other<|memory_end|>").spans[0])
        with pytest.raises(DatasetError, match=r"216 tokens at chunk size 4, the span has 216 at 8: .* chunk_size=4"):
            encoded.encoded(compressor.parse_raw(text, 8).spans[0])
        with pytest.raises(ConfigError, match="another checkpoint"):
            encoded.check(Compressor.load(checkpoints["code-llava"], settings=ON_CPU).files)


def test_a_killed_run_resumes_to_the_same_bytes(
    encode: Encode, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(corpus, "--output", str(tmp_path / "whole"))
    encode_spans, calls = SpanEncoder.encode, itertools.count()

    def interrupted(self: SpanEncoder, *arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return encode_spans(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SpanEncoder, "encode", interrupted)
        encode(corpus, code=130)
    out = tmp_path / "out"
    left = shards(out)
    assert 0 < len(left) < whole["shards"]
    assert not list(out.glob(".*.tmp"))
    with pytest.raises(DatasetError, match=r"no index\.sqlite yet"):
        EncodedCorpus.open(out)
    # What SIGKILL leaves behind.
    (out / ".latents-0.safetensors.x.tmp").write_bytes(b"half")
    (out / ".index.sqlite.y.tmp").write_bytes(b"half")
    resumed = encode(corpus)
    assert shards(out) == shards(tmp_path / "whole")
    assert left.items() <= shards(out).items()
    assert 0 < resumed["encoded_documents"] < 5
    assert resumed["corpus_sha256"] == whole["corpus_sha256"]
    assert sorted(path.name for path in out.glob(".*")) == [".lock"]


def test_a_finished_run_is_recognised(
    encode: Encode, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(corpus)
    index = tmp_path / "out" / "index.sqlite"
    written = index.stat().st_mtime_ns
    monkeypatch.setattr(corpus_encode, "CorpusWorker", None)  # a model that is not even loaded
    again = encode(corpus)
    assert index.stat().st_mtime_ns == written
    assert (first["was_complete"], again["was_complete"]) == (False, True)
    assert again.items() >= {"encoded_documents": 0, "memory_tokens": first["memory_tokens"]}.items()


def test_only_what_changed_is_encoded(encode: Encode, corpus: Path, tmp_path: Path) -> None:
    encode(corpus)
    before = shards(tmp_path / "out")
    write(corpus, {"d.py": "class B:\n    pass\n", "new.py": "y = 2\n"})
    (corpus / "c.py").unlink()
    summary = encode(corpus)
    assert summary.items() >= {"encoded_documents": 2, "documents": 6, "unused_shards": 1}.items()
    assert summary["encoded_tokens"] == len("class B:\n    pass\n" + "y = 2\n")
    assert before.items() <= shards(tmp_path / "out").items()
    with EncodedCorpus.open(tmp_path / "out") as encoded:
        assert "c.py" not in encoded
        assert encoded.document("d.py").num_tokens == 18
        kept = {row.shard for row in encoded if row.shard}
    assert encode(corpus, "--prune").items() >= {"pruned_shards": 1, "unused_shards": 0, "was_complete": True}.items()
    assert set(shards(tmp_path / "out")) >= kept
    # A shard that was lost is made again, and no other.
    lost = sorted(kept)[0]
    (tmp_path / "out" / lost).unlink()
    assert 0 < encode(corpus)["encoded_documents"] < 5
    with EncodedCorpus.open(tmp_path / "out") as encoded:
        assert all(len(encoded.latents(row.id)) == row.num_latents for row in encoded)


def test_what_changes_meanwhile_is_left_out_and_comes_next_time(
    encode: Encode, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(job: CorpusJob) -> CorpusWorker:
        (corpus / "a.py").write_text("other")
        (corpus / "c.py").unlink()
        return CorpusWorker(job)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_encode, "CorpusWorker", changed)
        summary = encode(corpus, code=3)
    assert summary.items() >= {"missing": 2, "documents": 4}.items()
    summary = encode(corpus)
    assert summary.items() >= {"missing": 0, "documents": 5, "encoded_documents": 1}.items()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chunk-size", "8"], "was made with other settings: chunk_size was 4, is 8: use those, or give another"),
        (["--dtype", "bfloat16"], "dtype was auto, is bfloat16"),
    ],
)
def test_another_run_is_refused(flags: list[str], message: str, encode: Encode, corpus: Path, tmp_path: Path) -> None:
    encode(corpus)
    before = shards(tmp_path / "out")
    assert message in encode(corpus, *flags, code=1)["error"]
    assert "corpus was" in encode(write(tmp_path / "other", {"a": "b"}), code=1)["error"]
    assert shards(tmp_path / "out") == before
    damaged = tmp_path / "out" / min(before)
    damaged.write_bytes(before[damaged.name][:-1])
    assert f"{damaged} is not a whole shard" in encode(corpus, code=1)["error"]
    with filelock.FileLock(tmp_path / "out" / ".lock"):
        assert "is being written by another run" in encode(corpus, code=1)["error"]


def test_unusable_corpora_are_refused_before_any_work(encode: Encode, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", {"good.py": "x = 1\n"})
    (corpus / "link.py").symlink_to("nowhere.py")
    (corpus / "a picture.png").write_bytes(b"\xff\xfe\0")
    error = encode(corpus, code=1)["error"]
    assert "2 files or lines cannot be encoded:\n  link.py: cannot be read" in error
    assert "--skip-unreadable" in error
    assert not (tmp_path / "out" / "corpus.json").exists()
    summary = encode(corpus, "--skip-unreadable")
    assert summary.items() >= {"documents": 1, "problems": 2}.items()
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert skipped[1] == {"place": "a picture.png", "reason": "binary (it holds a zero byte)"}
    with sqlite3.connect(tmp_path / "out" / "index.sqlite") as db:
        assert db.execute("SELECT place FROM problems").fetchall() == [("link.py",), ("a picture.png",)]
    assert encode(corpus, "--exclude", "link.py", "--exclude", "*.png")["problems"] == 0
    (tmp_path / "nothing").mkdir()
    assert "the corpus is empty" in encode(tmp_path / "nothing", "--output", str(tmp_path / "n"), code=1)["error"]
    assert "does not exist" in encode(tmp_path / "nowhere", code=1)["error"]
    assert "neither a folder nor a .jsonl file" in encode(corpus / "good.py", code=1)["error"]
    assert "the corpus itself" in encode(corpus, "--output", str(corpus), code=1)["error"]
    assert "--shard-size must be at least 1" in encode(corpus, "--shard-size", "0", code=1)["error"]


def test_what_is_no_text_is_listed_and_left_out(
    encode: Encode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = write(tmp_path / "corpus", {"good.py": "x = 1\n"})
    (corpus / "a picture.png").write_bytes(b"\x89PNG\0")
    (corpus / "latin1.py").write_bytes("# Größe".encode("latin-1"))
    assert encode(corpus).items() >= {"documents": 1, "problems": 2}.items()
    assert "a picture.png: binary" in caplog.text
    assert "latin1.py: not UTF-8 text (byte 4)" in caplog.text
    (corpus / "good.py").unlink()
    assert "the corpus is empty" in encode(corpus, code=1)["error"]


def test_lines(encode: Encode, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [{"key": "b", "body": TEXTS["a.py"]}, {"key": "a", "body": TEXTS["d.py"]}, {"key": 3, "body": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode(path, "--text-field", "body", "--id-field", "key")
    with EncodedCorpus.open(tmp_path / "out") as encoded:
        assert [(row.id, row.num_tokens) for row in encoded] == [("b", 144), ("a", 216), ("3", 0)]
    assert "fields was" in encode(path, "--text-field", "body", "--line-ids", code=1)["error"]
    path.write_text(path.read_text() + '{"key": "a", "body": "x"}\n')
    error = encode(path, "--text-field", "body", "--id-field", "key", "--skip-unreadable", code=1)["error"]
    assert "line 4: its id 'a' is line 2's already" in error


def test_odd_files_are_problems_by_name(encode: Encode, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", {"good.py": "x = 1\n", "long.py": "x" * 2000})
    (corpus / "loop.py").symlink_to("loop.py")
    (corpus / "secret.py").symlink_to("/etc/hostname")
    (corpus / "name\x1b[2J.py").write_bytes(b"\xff")
    (corpus / "name\nforged\x9b.py").write_bytes(b"\xff")
    with (corpus / "sparse.bin").open("wb") as stream:
        stream.truncate(100 << 30)
    error = encode(corpus, "--max-text-size", "1K", code=1)["error"]
    assert error.count("\n") == 8  # one line in front, one a problem, one behind
    summary = encode(corpus, "--max-text-size", "1K", "--skip-unreadable")
    assert summary.items() >= {"documents": 1, "problems": 6}.items()
    text = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert [c for c in text if not c.isprintable()] == ["\n"] * 6
    assert "--max-text-size must be at least 1" in encode(corpus, "--max-text-size", "0", code=1)["error"]


def test_what_the_command_writes_into_the_corpus_is_no_document(encode: Encode, corpus: Path) -> None:
    own = {"--output": corpus / "b" / "out", "--cache-dir": corpus / "b" / "cache"}
    for flag, folder in own.items():
        more = ["--to-cache", "--exclude", "b/out/*"] if flag == "--cache-dir" else []
        for _ in range(2):
            summary = encode(corpus, flag, str(folder), *more)
            assert summary.items() >= {"documents": 6, "problems": 0}.items()
    assert "--cache-dir" in encode(corpus, "--to-cache", "--cache-dir", str(corpus), code=1)["error"]


@pytest.mark.parametrize("name", ["corpus.json", "index.sqlite", "shard"])
@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"settings": 5, "version": 1}', b"\0" * 1000, b"[" * 100_000])
def test_a_damaged_output_is_one_error_or_made_anew(
    name: str, data: bytes, encode: Encode, corpus: Path, tmp_path: Path
) -> None:
    encode(corpus)
    folder = tmp_path / "out"
    path = min(folder.glob("latents-*")) if name == "shard" else folder / name
    path.write_bytes(data)
    if name != "index.sqlite":
        with pytest.raises(DatasetError, match=re.escape(str(path))):
            read_all(folder)
    if name == "index.sqlite":
        assert encode(corpus)["was_complete"] is False
        assert encode(corpus)["was_complete"] is True
    else:
        error = encode(corpus, code=1)["error"]
        assert str(path) in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_damaged_rows_are_an_error_whose_advice_works(encode: Encode, corpus: Path, tmp_path: Path) -> None:
    encode(corpus)
    path = min((tmp_path / "out").glob("latents-*"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"{re.escape(str(path))} are damaged: remove that file"):
        read_all(tmp_path / "out")
    path.unlink()
    encode(corpus)
    read_all(tmp_path / "out")


def test_another_writer_of_an_output_is_named(encode: Encode, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".own.tmp").write_text("not this command's")
    with filelock.FileLock(tmp_path / "out" / ".lock"):
        assert str(tmp_path / "out") in encode(corpus, code=1)["error"]
    encode(corpus)
    assert (tmp_path / "out" / ".own.tmp").is_file()


def test_prompts_hit_the_cache(
    encode: Encode, corpus: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--to-cache", "--cache-dir", str(tmp_path / "cache"))
    first, again = encode(corpus, *flags), encode(corpus, *flags)
    assert first["encoded_tokens"] > 0
    assert again.items() >= {"encoded_tokens": 0, "cached_tokens": again["memory_tokens"], "documents": 6}.items()
    with LatentCache.open(tmp_path / "cache") as cache:
        compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU, cache=cache)
        prompt = compressor.parse_raw(f"<|memory_start|>{TEXTS['d.py']}<|memory_end|>?")
        assert compressor.compress([prompt])[0].stats.cached_tokens == prompt.memory_tokens
    # A cache that cannot keep its latents is no result.
    monkeypatch.setattr(corpus_run, "DEFAULT_LIMIT_BYTES", 1000)
    assert "write shards with --output instead" in encode(corpus, *flags, code=1)["error"]
    monkeypatch.setattr(LatentFiles, "write", lambda *_: 5)
    assert "were not cached" in encode(corpus, "--to-cache", "--cache-dir", str(tmp_path / "new"), code=1)["error"]


def test_a_full_disk_keeps_the_shards_before(encode: Encode, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", {"small.py": "x = 1\n" * 40, "large.py": "y = 22\n" * 600})
    (corpus / "large.py").rename(corpus / "zlarge.py")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        error = encode(corpus, code=1)["error"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "cannot be written (File too large): the shards before it are kept; make room" in error
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert encode(corpus)["documents"] == 2


def test_an_output_that_is_the_corpus_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "skipped.jsonl").write_text('{"id": "a", "text": "x"}\n')
    (tmp_path / "link").symlink_to(corpus)
    (corpus / "corpus.json").touch()
    for source, output in (
        (corpus, corpus), (corpus, tmp_path / "link"), (tmp_path / "o" / "skipped.jsonl", tmp_path / "o"),
    ):  # fmt: skip
        assert encode_corpus.main([str(source), "--output", str(output)]) == 1
        assert "--output" in capsys.readouterr().err
