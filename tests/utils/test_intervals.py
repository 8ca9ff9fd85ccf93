"""Intervals around means."""

from __future__ import annotations

import pytest

from utils.intervals import bootstrap, wilson


def test_wilson_against_published_values() -> None:
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == pytest.approx(1.0)


def test_a_bootstrap_interval_holds_the_mean_and_depends_on_its_seed_only() -> None:
    values = [0.2, 0.4, 0.6, 0.8] * 10
    low, high = bootstrap(values, seed=3)
    assert 0.4 < low < 0.5 < high < 0.6
    assert bootstrap(values, seed=3) == (low, high)
    assert bootstrap([0.3] * 5) == pytest.approx((0.3, 0.3))
