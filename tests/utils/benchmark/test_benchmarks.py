"""The benchmarks on a tiny pair: what they count is right; how long it took is not looked at here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.support import fake_server, gateway_server
from utils.benchmark.__main__ import main
from utils.benchmark.sources import cut_points
from utils.checkpoint.load import load_decoder
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.errors import ConfigError
from utils.training.flops import PairCost

Run = Callable[..., dict[str, Any]]

STAGES = """
- {preset: align, steps: 2, row_tokens: 128}
- preset: decoder
  steps: 2
  row_tokens: 128
  rows: 2
  chunk_sizes: {1: 1, 2: 1}
  learning_rates: {adapter: 1e-3, markers: 1e-3, encoder: 1e-3, decoder: 1e-3}
"""


@pytest.fixture
def tiny(checkpoints: dict[str, Path]) -> list[str]:
    return ["--checkpoint", str(checkpoints["lclm"]), "--device", "cpu"]


def test_encode_writes_its_result(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "200", "--spans", "1,30", "--bare-batches", "1", "--repeats", "2"]
    assert main(["encode", *tiny, *sizes, "--output", str(tmp_path / "out")]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert set(result["ratio_to_bare"]) == {"bare forward, 1 windows", "1 spans", "30 spans"}
    assert all(len(runs) == 2 for runs in result["runs_s"].values())
    assert result["flags"]["spans"] == [1, 30]
    assert isinstance(result["machine"]["native_bfloat16"], bool)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert "\n".join(table) in (tmp_path / "out" / "table.md").read_text()


def test_json_alone(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # Lists as they were once written, and the small defaults of --quick.
    assert main(["encode", *tiny, "--tokens", "100", "--spans", "1", "2", "--quick", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    flags = json.loads(line)["flags"]
    assert (flags["spans"], flags["repeats"]) == ([1, 2], 1)


def test_a_list_of_other_things_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["encode", "--spans", "1,many"])
    assert "--spans" in capsys.readouterr().err


@pytest.mark.slow
def test_ttft(tiny: list[str], result_of: Run, checkpoints: dict[str, Path]) -> None:
    cases = result_of("ttft", *tiny, "--tokens", "100,50", "--also-chunk-sizes", 8, "--repeats", 2)["cases"]
    assert [(c["tokens"], c["chunk_size"], c["cached"]) for c in cases] == [
        (100, 4, False), (100, 4, True), (100, 8, False), (100, 8, True), (50, 4, False), (50, 4, True),
    ]  # fmt: skip
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    cost = PairCost.of(compressor.memory_encoder, load_decoder(compressor.files, ON_CPU))
    for case in cases:
        assert case["full_rows"] > case["tokens"] > case["prompt_rows"]
        ratios = [full / run for full, run in zip(case["full_runs_s"], case["runs_s"], strict=True)]
        assert case["speedup"] == pytest.approx(statistics.median(ratios))
        assert all(seconds > 0 for seconds in case["stages_s"].values())
        assert case["ideal_parts"] > 0
        rows = {name: case[name] for name in ("full_rows", "prompt_rows", "chunk_size", "cached")}
        assert case["ideal_operations"] == pytest.approx(cost.ideal_speedup(**rows, span_lengths=[case["tokens"]]))
    encoded, cached, finer, *_ = cases
    assert encoded["prompt_rows"] - finer["prompt_rows"] == 25 - 13
    assert cached["ideal_operations"] > encoded["ideal_operations"]


@pytest.mark.slow
def test_ttft_refuses_a_text_that_the_decoder_cannot_read(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ttft", *tiny, "--tokens", "50,600"]) == 1
    assert "600 memory tokens" in capsys.readouterr().err


def test_cache(tiny: list[str], result_of: Run) -> None:
    result = result_of("cache", *tiny, "--tokens", 800, "--spans", 3, "--repeats", 1)
    assert result["cached_tokens"] == result["memory_tokens"] == 800
    assert result["times_faster"] > 1


@pytest.mark.slow
def test_pooling(tiny: list[str], result_of: Run) -> None:
    shares = result_of("pooling", *tiny, "--tokens", 4000, "--chunk-sizes", "1,4")["shares"]
    # One token alone is neither mixed nor turned; of four, the mean says which, and only the other says where.
    alone = [shares[f"{pooling}, chunk size 1"]["in_place"] for pooling in ("mean", "rotary")]
    assert alone[0] == pytest.approx(alone[1], abs=0.02)
    assert alone[0] > 0.4
    assert shares["rotary, chunk size 4"]["in_place"] > 1.05 * shares["mean, chunk size 4"]["in_place"]


@pytest.mark.slow
def test_generate(tiny: list[str], result_of: Run) -> None:
    sizes = ["--prompts", 5, "--shortest", 8, "--longest", 200, "--new-tokens", 3, "--batch-size", 2, "--repeats", 1]
    result = result_of("generate", *tiny, *sizes)
    lengths, padding = result["prompt_rows"], result["padding"]
    padded = sum(max(lengths[at : at + 2]) * len(lengths[at : at + 2]) for at in (0, 2, 4))
    assert padding["batches sorted by length"] == pytest.approx(1 - sum(lengths) / padded)
    assert 0 == padding["one by one"] < padding["batches sorted by length"] < padding["batches as they come"]
    assert set(result["times_transformers"]) == set(padding)


@pytest.mark.slow
def test_memory_in_fresh_processes(tiny: list[str], result_of: Run) -> None:
    rows = result_of("memory", *tiny, "--tokens", "200,400")["rows"]
    assert [row["tokens"] for row in rows] == [200, 400]
    assert rows[0]["ratio"] == 1
    assert rows[1]["peak_bytes"] >= rows[1]["loaded_bytes"] > 10 * 2**20
    assert rows[1]["latent_bytes"] == 100 * 32 * 4


@pytest.mark.slow
def test_load(tiny: list[str], result_of: Run) -> None:
    result = result_of("load", *tiny, "--repeats", 1)
    assert result["ratio"] > 0.5
    assert all(runs[0] > 0 for runs in result["runs_s"].values())


def test_ruler(result_of: Run, checkpoints: dict[str, Path]) -> None:
    tokenizer = next(path.parent for path in checkpoints["lclm"].rglob("tokenizer.json"))
    sizes = ["--tasks", "niah_single_1", "--lengths", "4k", "--modes", "compat", "--num-samples", 1, "--repeats", 1]
    (row,) = result_of("ruler", "--tokenizer-path", tokenizer, *sizes)["results"]
    assert (row["task"], row["length"], row["mode"]) == ("niah_single_1", 4096, "compat")
    assert row["rows_per_s"] > 0
    assert 0 < row["fill"] <= 1


def test_gateway(tiny: list[str], checkpoints: dict[str, Path], tmp_path: Path, result_of: Run) -> None:
    with fake_server.running() as backend, LatentCache.open(tmp_path) as cache:
        compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU, cache=cache)
        with gateway_server.running(compressor, backend.url) as url:
            servers = ["--gateway-url", url, "--backend-url", backend.url]
            sizes = ["--clients", "1,3", "--requests", 2, "--lines", 4, "--expand", "1/4"]
            result = result_of("gateway", *tiny, *servers, *sizes)
        counts = {name: figures["requests"] for name, figures in result["latency"].items()}
        assert counts == {
            f"{clients} clients, {way}": 2 * clients for clients in (1, 3) for way in ("direct", "gateway", "expanded")
        }
        sent = [body["prompt_embeds"] for _, body in backend.requests if body["max_tokens"] == 1]
        # One probe row; each client's rows are the same on both ways, and others with text among them.
        assert len(set(sent)) == 1 + 3 + 3


@pytest.mark.slow
def test_training_beside_the_hf_trainer(result_of: Run, tmp_path: Path) -> None:
    values = {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "pair": {"checkpoint": "toy"},
        "threads": 1,
        "data": {"folder": str(tmp_path / "data"), "source": "symbols", "chars_per_token": 1, "memory_tokens": [4, 12]},
        "decoder_tuning": {"method": "lora", "rank": 4, "alpha": 8},
        "stages": yaml.safe_load(STAGES),
    }
    values["data"]["tasks"] = {"copy_symbols": 60}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    stages = result_of("training", "--config", config, "--device", "cpu", "--steps", 2, "--repeats", 1)["stages"]
    assert list(stages) == ["stage 0 (align)", "stage 1 (decoder)", "HF Trainer, plain text"]
    assert stages["HF Trainer, plain text"]["of_hf_trainer"] == 1
    assert stages["HF Trainer, plain text"]["runs"][0]["tokens"] == 2 * 2 * 128
    for stage in stages.values():
        (run,) = stage["runs"]
        assert stage["tokens_per_s"] == pytest.approx(run["tokens"] / run["seconds"])
        assert stage["of_hf_trainer"] > 0
        assert run["peak_bytes"] > 100 << 20
    assert not (tmp_path / "run").exists()


@given(st.data())
def test_cuts_cover_everything_and_are_never_empty(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 500))
    count = data.draw(st.integers(1, total))
    cuts = cut_points(total, count)
    assert [n for a, b in cuts for n in range(a, b)] == list(range(total))
    assert len(cuts) == count
    assert all(a < b for a, b in cuts)


def test_more_spans_than_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="--spans 6: expected 1 to 5"):
        cut_points(5, 6)


@pytest.mark.slow
def test_selection(result_of: Run) -> None:
    sizes = ["--tasks", "next_lines", "--ruler-tasks", "niah_multiquery", "--ruler-lengths", "1k", "--num-examples", 2]
    results = result_of("selection", *sizes, "--memory-tokens", "500,900", "--parts", "1,8,100000")["results"]
    assert [(row["task"], row["policy"]) for row in results] == [
        (task, policy) for task in ("next_lines", "niah_multiquery, 1024") for policy in ("bm25", "random", "answer")
    ]
    for row in results:
        # The whole memory holds every answer, no text none; bm25 finds four needles in an eighth of it.
        assert row["budgets"]["1/1"]["share"] == 1
        assert row["budgets"]["1/100000"]["share"] == 0
        assert row["ms"] > 0
    assert results[3]["budgets"]["1/8"]["share"] > results[4]["budgets"]["1/8"]["share"]


@pytest.mark.parametrize(
    "flags", [["--tasks", "lookups"], ["--policies", "best"], ["--parts", "0"], ["--memory-tokens", "500"]]
)
def test_selection_refuses_what_it_cannot_measure(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selection", *flags]) == 1
    assert "error" in capsys.readouterr().err
