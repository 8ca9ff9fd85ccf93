"""Benchmarks of the model on a tiny checkpoint: what they count is right; how long it took is not looked at here."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import fake_server
from utils.benchmark import all as all_benchmarks
from utils.benchmark import memory
from utils.benchmark.ttft import STAGES
from utils.checkpoint.load import load_decoder
from utils.checkpoint.settings import ON_CPU
from utils.errors import CodeLlavaError
from utils.files import read_json, write_json, write_text
from utils.training.flops import PairCost

Run = Callable[..., dict[str, Any]]
NO_SWEEPS = ["--also-tokens", "--also-chunk-sizes", "--also-spans", "--also-dtypes", "--also-batches"]


@pytest.fixture
def tiny(checkpoints: dict[str, Path]) -> list[str]:
    return ["--checkpoint", str(checkpoints["lclm"]), "--device", "cpu"]


@pytest.mark.slow
def test_encode(tiny: list[str], result_of: Run, tmp_path: Path) -> None:
    flags = ["--tokens", 200, "--spans", 1, 30, "--bare-batches", 1, "--repeats", 2, "--output", tmp_path / "out"]
    result = result_of("encode", *tiny, *flags)
    assert set(result["ratio_to_bare"]) == {"bare forward, 1 windows", "1 spans", "30 spans"}
    assert all(len(runs) == 2 for runs in result["runs_s"].values())
    assert (tmp_path / "out" / "throughput_by_spans.png").is_file()


@pytest.mark.slow
def test_ttft(tiny: list[str], result_of: Run, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    pytest.importorskip("pybase64")  # what it times includes the wire format
    sweep = ["--tokens", 100, "--also-tokens", 50, "--also-chunk-sizes", 8, "--also-spans", 5]
    sweep += ["--also-dtypes", "bfloat16", "--also-batches", 2, "--repeats", 2]
    result = result_of("ttft", *tiny, *sweep, "--output", tmp_path / "out")
    cases = result["cases"]
    assert len(cases) == 2 * (1 + 5)
    assert (tmp_path / "out" / "ttft_by_length.png").is_file()
    for case in cases:
        assert case["memory_tokens"] == case["tokens"]
        assert case["full_rows"] > case["tokens"] > case["prompt_rows"]
        assert len(case["runs_s"]) == len(case["full_runs_s"]) == 2
        ratios = [full / run for full, run in zip(case["full_runs_s"], case["runs_s"], strict=True)]
        assert case["speedup"] == pytest.approx(statistics.median(ratios))
        assert set(case["stages_s"]) == set(STAGES)
        assert (case["stages_s"]["project"] == 0) == case["cached"]
        assert all(case["stages_s"][name] > 0 for name in ("tokenise", "encode", "splice", "serialise", "prefill"))
        assert case["ideal_parts"] > 0
    base = next(c for c in cases if c["tokens"] == 100 and c["chunk_size"] == 4 and c["spans"] == 1 and c["batch"] == 1)
    finer = next(c for c in cases if c["chunk_size"] == 8)
    assert base["prompt_rows"] - finer["prompt_rows"] == 25 - 13
    assert finer["ideal_operations"] > base["ideal_operations"]


@pytest.mark.slow
def test_ttft_counts_the_ideal_as_the_cost_model_does(
    tiny: list[str], result_of: Run, compressor_of: Callable[[], Any]
) -> None:
    pytest.importorskip("pybase64")  # what it times includes the wire format
    result = result_of("ttft", *tiny, "--tokens", 64, *NO_SWEEPS, "--repeats", 1)
    fresh, cached = result["cases"]
    compressor = compressor_of()
    cost = PairCost.of(compressor.memory_encoder, load_decoder(compressor.files, ON_CPU))
    rows = {"full_rows": fresh["full_rows"], "prompt_rows": fresh["prompt_rows"], "span_lengths": [64]}
    assert fresh["ideal_operations"] == pytest.approx(cost.ideal_speedup(**rows))
    assert cached["ideal_operations"] == pytest.approx(cost.ideal_speedup(**rows, cached=True))
    assert cached["ideal_operations"] > fresh["ideal_operations"]


@pytest.fixture
def compressor_of(checkpoints: dict[str, Path]) -> Callable[[], Any]:
    from utils.compress.compressor import Compressor

    return lambda: Compressor.load(checkpoints["lclm"], settings=ON_CPU)


def test_ttft_refuses_a_text_that_the_decoder_cannot_read(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from utils.benchmark.__main__ import main

    assert main(["ttft", *tiny, "--tokens", "600", *NO_SWEEPS]) == 1
    assert "the full text of 600 memory tokens needs" in capsys.readouterr().err


@pytest.mark.slow
def test_ttft_through_a_server(tiny: list[str], result_of: Run) -> None:
    with fake_server.running() as server:
        result = result_of("ttft", *tiny, "--tokens", 40, *NO_SWEEPS, "--repeats", 2, "--server-url", server.url)
        asked = [body for _, body in server.requests if body.get("max_tokens") == 1]
    assert result["prefill"].startswith("server")
    texts = [body["prompt"] for body in asked if "prompt" in body]
    # One warm-up round and two counted ones; no text twice, or the server's prefix cache would answer it.
    assert len(texts) == len(set(texts)) == 3
    rows = [body["prompt_embeds"] for body in asked if "prompt_embeds" in body]
    # The client's probe; then encoded, cached and the decoder alone.
    assert len(rows) == len(set(rows)) == 1 + 3 * 3
    assert all(case["full_stages_s"]["tokenise"] == 0 for case in result["cases"])


def test_pooling(tiny: list[str], result_of: Run) -> None:
    shares = result_of("pooling", *tiny, "--tokens", 4000, "--chunk-sizes", 1, 4)["shares"]
    # One token alone is neither mixed nor turned; of four, the mean says which, and only the other says where.
    alone = [shares[f"{pooling}, chunk size 1"]["in_place"] for pooling in ("mean", "rotary")]
    assert alone[0] == pytest.approx(alone[1], abs=0.02)
    assert alone[0] > 0.4
    assert shares["rotary, chunk size 4"]["in_place"] > 1.05 * shares["mean, chunk size 4"]["in_place"]


def test_generate(tiny: list[str], result_of: Run) -> None:
    flags = ["--prompts", 5, "--shortest", 8, "--longest", 200, "--new-tokens", 3, "--batch-size", 2, "--repeats", 1]
    result = result_of("generate", *tiny, *flags)
    lengths = result["prompt_rows"]
    # Keys and values are kept: after the prompt, one row a token.
    assert result["decoder_rows"]["one by one"] == sum(lengths) + 5 * 2
    padded = sum(max(lengths[at : at + 2]) * len(lengths[at : at + 2]) for at in (0, 2, 4))
    assert result["decoder_rows"]["batches sorted by length"] == padded + 5 * 2
    assert result["decoder_rows"]["batches as they come"] == result["decoder_rows"]["transformers, padded batches"]
    assert 0 == result["padding"]["one by one"] < result["padding"]["batches sorted by length"]
    assert result["padding"]["batches sorted by length"] < result["padding"]["batches as they come"]


def test_memory_of_one_length(checkpoints: dict[str, Path]) -> None:
    row = memory.encode_once(str(checkpoints["lclm"]), None, ON_CPU, 400)
    assert row["peak_bytes"] >= row["loaded_bytes"] > 10 * 2**20
    assert row["latent_bytes"] == 100 * 32 * 4


@pytest.mark.slow
def test_memory_in_fresh_processes(tiny: list[str], result_of: Run, tmp_path: Path) -> None:
    result = result_of("memory", *tiny, "--tokens", 200, 400, "--output", tmp_path / "out")
    assert [row["tokens"] for row in result["rows"]] == [200, 400]
    assert result["rows"][0]["ratio"] == 1
    assert (tmp_path / "out" / "memory_by_length.png").is_file()


@pytest.mark.slow
def test_load(tiny: list[str], result_of: Run) -> None:
    result = result_of("load", *tiny, "--repeats", 1)
    assert result["ratio"] > 0.5
    assert result["imports_ms"]["torch"] > 0


@pytest.mark.slow
def test_ruler(tiny: list[str], result_of: Run) -> None:
    flags = ["--tasks", "niah_single_1", "--lengths", "4k", "--num-samples", 1, "--answered-rows", 0]
    result = result_of("ruler", *tiny, *flags)
    assert [row["task"] for row in result["building"]] == ["niah_single_1"]
    assert result["building"][0]["rows_per_s"] > 0


def test_all_goes_on_where_it_stopped(
    tiny: list[str], result_of: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def run_one(args: Any, name: str, folder: Path) -> None:
        if name == "cache" and started.count("cache") == 0:
            started.append(name)
            raise CodeLlavaError("interrupted")
        started.append(name)
        write_text(folder / "table.md", f"# {name}\n\n![p](p.png)\n")
        write_json(folder / "result.json", {"benchmark": name})

    monkeypatch.setattr(all_benchmarks, "_run_one", run_one)
    from utils.benchmark.__main__ import main

    assert main(["all", *tiny, "--output", str(tmp_path)]) == 1
    assert started == ["encode", "ttft", "memory", "cache"]
    started.clear()
    started.append("cache")
    result = result_of("all", *tiny, "--output", tmp_path)
    assert started == ["cache", "cache", "load", "generate", "ruler"]
    assert list(result["results"]) == ["encode", "ttft", "memory", "cache", "load", "generate", "ruler"]
    assert read_json(tmp_path / "result.json")["results"]["load"] == {"benchmark": "load"}
    assert "![p](memory/p.png)" in (tmp_path / "table.md").read_text()


def test_all_passes_its_flags_on(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every benchmark takes the flags that `all` gives it."""
    from utils.benchmark.__main__ import build_parser

    commands: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Any:
        commands.append(command[3:])
        folder = Path(command[-1])
        write_text(folder / "table.md", "")
        write_json(folder / "result.json", {})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(all_benchmarks, "subprocess", SimpleNamespace(run=start, DEVNULL=None))
    words = ["all", *tiny, "--dtype", "float32", "--gateway-url", "http://a", "--backend-url", "http://b"]
    all_benchmarks.run(build_parser().parse_args([*words, "--output", str(tmp_path)]))
    assert [command[0] for command in commands] == [
        "encode", "ttft", "memory", "cache", "load", "generate", "ruler", "gateway",
    ]  # fmt: skip
    for command in commands:
        parsed = build_parser().parse_args(command)
        assert parsed.checkpoint == tiny[1]
        assert parsed.dtype == "float32"
        assert parsed.output == str(tmp_path / command[0])
    assert parsed.backend_url == "http://b"
