"""`step1.py` and `step1_raw_text.py`: what they write and print, and what they refuse."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from general import step1, step1_raw_text
from tests.support.processes import run_python
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.prompt_embeds import load_prompt_embeds
from utils.files import PROJECT_ROOT
from utils.flags import read_memory_files
from utils.inference.inference import build_messages

SPAN = "<|memory_start|>def f(): return 1<|memory_end|>"


@pytest.fixture
def flags(checkpoints: dict[str, Path], tmp_path: Path) -> list[str]:
    return ["--model-path", str(checkpoints["lclm"]), "--device", "cpu", "--output", str(tmp_path / "out/rows.npy")]


def expected(flags: list[str], prompt: Any) -> torch.Tensor:
    compressor = Compressor.load(flags[1], settings=ON_CPU)
    parsed = compressor.parse_raw(prompt) if isinstance(prompt, str) else compressor.parse_chat(prompt)
    return compressor.compress([parsed])[0].values_TD


def read(flags: list[str]) -> torch.Tensor:
    return load_prompt_embeds(flags[5]).values_TD


def test_raw_text_from_every_source(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"Explain\r\n{SPAN} and é{SPAN}"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    rows = expected(flags, text)
    for source in (["--text", text], ["--input-file", str(tmp_path / "prompt.txt")], ["-"], ["--input_file", "-"]):
        Path(flags[5]).unlink(missing_ok=True)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert step1_raw_text.main([*source, *flags]) == 0
        torch.testing.assert_close(read(flags), rows, atol=1e-5, rtol=0)
    assert "2 spans" in capsys.readouterr().out


def test_result_and_sidecar(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert step1_raw_text.main(["--text", f"x{SPAN}y", "--json", *flags]) == 0
    out, _ = capsys.readouterr()
    result = json.loads(out)
    array = np.load(flags[5], allow_pickle=False)
    sidecar = json.loads(Path(flags[5]).with_suffix(".json").read_text())
    assert array.dtype == np.float32
    assert result["shape"] == list(array.shape) == sidecar["array"]["shape"]
    assert (result["memory_tokens"], result["num_latents"], result["ratio"]) == (17, 5, 3.4)
    assert sidecar["stats"]["memory_tokens"] == 17
    assert sidecar["spans"] == [[2, 7]]
    assert sidecar["provenance"]["config"]["compression_ratio"] == 4
    assert len(sidecar["provenance"]["fingerprint"]) == 64


def test_the_second_run_reads_the_cache(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for extra in ([], [], ["--no-cache"]):
        assert step1_raw_text.main(["--text", SPAN, "--json", *extra, *flags]) == 0
        results.append((json.loads(capsys.readouterr().out)["cached_tokens"], read(flags)))
    assert [cached for cached, _ in results] == [0, 17, 0]
    assert all(torch.equal(rows, results[0][1]) for _, rows in results)


def test_memory_files_are_spans_before_the_prompt(flags: list[str], tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"print('{name}')\n")
    memory = ["--memory", str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    assert step1_raw_text.main([*memory, "--text", "What is printed?", *flags]) == 0
    marked = "".join(f"<|memory_start|>print('{name}')\n<|memory_end|>\n" for name in ("a.py", "b.py"))
    torch.testing.assert_close(read(flags), expected(flags, marked + "What is printed?"), atol=1e-5, rtol=0)


def test_a_memory_file_may_hold_markers(flags: list[str], tmp_path: Path) -> None:
    """Whoever writes about prompts writes them down."""
    text = "END = '<|memory_end|>'\nHOLE = '<|memory|>'\n"
    (tmp_path / "markers.py").write_text(text)
    assert step1_raw_text.main(["--memory", str(tmp_path / "markers.py"), "--text", "What is HOLE?", *flags]) == 0
    (span,) = load_prompt_embeds(flags[5]).spans
    assert span == (1, 1 + -(-len(text) // 4))
    # Whichever way they are given.
    parsed = Compressor.load(flags[1], chunk_size=4).parse_chat(build_messages(text, "What is <|memory|>HOLE?"))
    assert [span.text for span in parsed.spans] == [text]


@pytest.mark.slow
def test_every_text_of_this_project_can_be_memory(flags: list[str]) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT_ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    compressor = Compressor.load(flags[1], chunk_size=4)
    num_texts = 0
    for name in listed.stdout.decode().split("\0"):
        path = PROJECT_ROOT / name
        try:
            text = path.read_bytes().decode() if path.is_file() else ""
        except UnicodeDecodeError:
            continue
        if text and "\0" not in text:
            num_texts += 1
            (span,) = compressor.parse_raw(read_memory_files([str(path)])).spans
            assert span.text == text, name
    assert num_texts > 500


def test_an_empty_file_among_others_is_passed_over(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in {"__init__.py": "", "a.py": "x = 1\n", "b.py": "\ufeffy = 2\r\n"}.items():
        (tmp_path / name).write_bytes(text.encode())
    memory = ["--memory", *(str(tmp_path / name) for name in ("__init__.py", "a.py", "b.py"))]
    assert step1_raw_text.main([*memory, "--text", "Which?", *flags]) == 0
    assert "__init__.py" in caplog.text
    # The byte order mark is none of the text.
    marked = "<|memory_start|>x = 1\n<|memory_end|>\n<|memory_start|>y = 2\r\n<|memory_end|>\nWhich?"
    torch.testing.assert_close(read(flags), expected(flags, marked), atol=1e-5, rtol=0)


def test_chunk_size_per_span_whatever_the_order(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    spans = {}
    for sizes in ("32,8", "8,32"):
        text = "<|memory_start|>" + "x" * 40 + "<|memory_end|>" + "<|memory_start|>" + "x" * 40 + "<|memory_end|>"
        assert step1_raw_text.main(["--text", text, "--chunk-size", sizes, "--no-cache", *flags]) == 0
        embeds = load_prompt_embeds(flags[5])
        order = sorted(embeds.spans, key=lambda span: span[1] - span[0])
        spans[sizes] = [embeds.values_TD[start:stop] for start, stop in order]
    assert [len(rows) for rows in spans["8,32"]] == [2, 5]
    for one, other in zip(*spans.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_prompt_without_memory(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert step1_raw_text.main(["--text", "no memory", *flags]) == 0
    assert "0 spans" in capsys.readouterr().out
    assert len(read(flags)) == len("no memory")


def test_truncation_is_reported(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    limit = ["--max-memory-tokens", "10", "--truncate-memory"]
    assert step1_raw_text.main(["--text", SPAN, *limit, *flags]) == 0
    assert "left out           7 tokens over --max-memory-tokens" in capsys.readouterr().out


def test_chat(flags: list[str], tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"Explain {SPAN}"}]
    for content in (messages, {"messages": messages}):
        (tmp_path / "messages.json").write_text(json.dumps(content))
        assert step1.main(["--prompt-file", str(tmp_path / "messages.json"), *flags]) == 0
        torch.testing.assert_close(read(flags), expected(flags, messages), atol=1e-5, rtol=0)
    assert step1.main(flags) == 0
    torch.testing.assert_close(read(flags), expected(flags, step1.PROMPT), atol=1e-5, rtol=0)


def test_bfloat16_survives_in_safetensors(flags: list[str], tmp_path: Path) -> None:
    target = tmp_path / "rows.safetensors"
    argv = ["--text", SPAN, *flags[:4], "--output", str(target), "--dtype", "bfloat16"]
    assert step1_raw_text.main(argv) == 0
    assert load_prompt_embeds(target).values_TD.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--text", ""], "the prompt is empty"),
        (["--text", f"{SPAN} <|memory_start|>open"], "without a <|memory_end|>"),
        (["--text", "<|memory_start|><|memory_end|>"], "the memory span is empty"),
        (["--text", "<|memory|>"], "literal <|memory|>"),
        (["--text", "x" * 600], "prompt 0 needs 600 rows, but the decoder has 512 positions"),
        (["--input-file", "{tmp}/none.txt"], "No such file or directory"),
        (["--input-file", "{tmp}/latin.txt"], "latin.txt is not UTF-8 text (byte 1)"),
        (["--memory", "{tmp}/empty.py"], "empty.py is empty"),
        (["--memory", "{tmp}/empty.py", "{tmp}/none.py"], "No such file or directory"),
        (["--memory", "{tmp}/empty.py", "{tmp}/also_empty.py"], "also_empty.py are empty: nothing to compress"),
        (["--memory", "{tmp}/binary"], "binary is not text: it holds a zero (character 1)"),
        (["--memory", "{tmp}"], "is a folder: name its text files"),
        (["--text", "a \ud83d b"], "the prompt holds half a character (a lone surrogate, '\\ud83d') at character 2"),
    ],
)
def test_refused(
    argv: list[str], wanted: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "also_empty.py").write_text("")
    (tmp_path / "binary").write_bytes(b"a\0b")
    assert step1_raw_text.main([part.format(tmp=tmp_path) for part in argv] + flags) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("error: ")) == ("", 1)
    assert wanted in err
    assert not Path(flags[5]).exists()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{}", "expected a list of messages"),
        ("[", "is not JSON"),
        ('[{"role": "user"}]', "message 0: content must be a text"),
        ("[]", "no messages"),
        ('[{"role": "<|memory|>", "content": "x"}]', "the role holds a memory marker"),
    ],
)
def test_refused_messages(
    content: str, wanted: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "messages.json").write_text(content)
    assert step1.main(["--prompt-file", str(tmp_path / "messages.json"), *flags]) == 1
    assert wanted in capsys.readouterr().err
    assert not Path(flags[5]).exists()


def test_memory_that_runs_out_is_an_error(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.model.code_chunker import CodeChunker

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CodeChunker, "batches", fail)
    assert step1_raw_text.main(["--text", SPAN, *flags]) == 1
    error = capsys.readouterr().err
    assert "error: out of memory while encoding 1 windows" in error
    assert ": lower --batch-tokens, or use a smaller dtype" in error
    assert not Path(flags[5]).exists()


def test_without_a_prompt_both_compress_the_same_example(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for command in (step1, step1_raw_text):
        assert command.main([*flags, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["memory_tokens"] == results[1]["memory_tokens"] > 100
    assert results[0]["shape"][0] > results[1]["shape"][0]  # the chat template
    assert len(read(flags)) == results[1]["shape"][0]


@pytest.mark.parametrize("name", [pytest.param("step1.py", marks=pytest.mark.slow), "step1_raw_text.py"])
def test_as_a_script_from_another_folder(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Relative paths are those of the working directory; results on stdout, nothing but logs on stderr."""
    where = PROJECT_ROOT if name == "step1.py" else tmp_path
    output = tmp_path / "rows.npy" if where == PROJECT_ROOT else Path("rows.npy")
    source = [] if name == "step1.py" else ["--text", SPAN]
    command = [PROJECT_ROOT / "general" / name, "--model-path", checkpoints["code-llava"], *source]
    done = run_python(*command, "--output", output, "--json", cwd=where)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spans"] == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "rows.npy").exists()


def test_an_output_that_is_an_input_is_refused(
    flags: list[str], checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, memory = tmp_path / "prompt.npy", tmp_path / "rows.json"
    prompt.write_text(SPAN)
    memory.write_text('{"version": 1, "array": {}, "spans": []}')  # as a sidecar, which may be replaced
    (tmp_path / "hard.npy").hardlink_to(prompt)
    (tmp_path / "messages.npy").symlink_to(prompt)
    projectors = checkpoints["lclm"] / "adapter" / "new.npy"
    for command, source, output, flag in (
        (step1_raw_text, ["--input-file", str(prompt)], prompt, "--input-file"),
        (step1_raw_text, ["--input-file", str(prompt)], tmp_path / "hard.npy", "--input-file"),
        (step1_raw_text, ["--memory", str(memory)], tmp_path / "rows.npy", "--memory"),
        (step1_raw_text, ["--text", SPAN], projectors, "--checkpoint"),
    ):
        assert command.main([*source, *flags[:4], "--output", str(output)]) == 1
        err = capsys.readouterr().err
        assert "--output" in err
        assert flag in err
    assert (prompt.read_text(), memory.exists(), projectors.exists()) == (SPAN, True, False)
    (tmp_path / "messages.json").write_text('[{"role": "user", "content": "x"}]')
    (tmp_path / "link.npy").symlink_to(tmp_path / "messages.json")
    output = ["--output", str(tmp_path / "link.npy")]
    assert step1.main(["--prompt-file", str(tmp_path / "messages.json"), *flags[:4], *output]) == 1
    assert "--prompt-file" in capsys.readouterr().err


def test_a_cache_that_cannot_be_used_costs_speed_only(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert step1_raw_text.main(["--text", SPAN, *flags, "--cache-dir", str(tmp_path / "file")]) == 0
    assert len([record for record in caplog.records if "cache" in record.message]) == 1
    assert read(flags).shape[0] > 0
