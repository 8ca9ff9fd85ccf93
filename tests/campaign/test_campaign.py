"""A short run of each part of the campaign."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign import damages, flat_memory, hostile_requests, kills, odd_clients
from tests.campaign.api_grammar import Grammar
from tests.campaign.children import run_command
from tests.campaign.figures import Figures
from tests.campaign.jobs import JOBS, Tools, running_tools
from tests.support.marks import needs_default_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tools]:
    with running_tools(tmp_path_factory.mktemp("tools")) as running:
        yield running


def check(figures: Figures, tried: int) -> None:
    assert figures.failures == []
    assert figures.tried >= tried


def test_hostile_requests_are_answered(tools: Tools, tmp_path: Path) -> None:
    for figures in hostile_requests.run(tmp_path, tools, 200, seed=1):
        check(figures, 200)
        # A grammar of nothing but nonsense would only try the first check.
        assert figures.counts["answered"] > 20


def test_odd_clients_are_let_go(tools: Tools, tmp_path: Path) -> None:
    check(odd_clients.run(tmp_path, tools, 100, seed=1), 101)


@pytest.mark.parametrize("name", JOBS)
def test_kills_lose_nothing(name: str, tools: Tools, tmp_path: Path) -> None:
    if name == "assemble":
        needs_default_checkpoint()
    count = 2 if name == "assemble" else 6
    check(kills.run(tmp_path, tools, name, count, seed=1), count)


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job.outputs])
def test_damage_is_mended_or_named(name: str, tools: Tools, tmp_path: Path) -> None:
    check(damages.run(tmp_path, tools, name, 12, seed=1), 12)


@pytest.mark.parametrize("name", [name for name in JOBS if name != "assemble"])
def test_full_disks_cost_nothing_finished(name: str, tools: Tools, tmp_path: Path) -> None:
    check(damages.run_on_full_disks(tmp_path, tools, name, 4, seed=1), 4)


def test_memory_stays_flat_under_mixed_load(tools: Tools, tmp_path: Path) -> None:
    check(flat_memory.run(tmp_path, tools, 0.5, seed=1), 50)


def test_a_seed_draws_the_same_requests_again() -> None:
    one, same, other = ([Grammar(seed).request() for _ in range(50)] for seed in (3, 3, 4))
    assert one == same
    assert one != other


def test_what_breaks_a_promise_is_seen(tmp_path: Path) -> None:
    """The campaign's own eyes: a kill, an error without its line, a file that may not grow."""
    missing = ["--input-file", str(tmp_path / "none.txt"), "--output", str(tmp_path / "o.npy")]
    assert run_command("general.step1_raw_text", missing, kill=lambda _: True).was_killed
    assert run_command("general.step1_raw_text", missing).complaint() is None
    assert run_command("general.step1_raw_text", ["--no-such-flag"]).complaint() is not None
