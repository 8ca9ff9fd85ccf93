"""Intervals around means, and paired comparisons."""

from __future__ import annotations

import pytest

from utils.intervals import bootstrap, compare, mcnemar, paired_interval, retention, wilson


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


def test_an_exact_test_of_paired_answers() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 0.0625
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 512)
    assert mcnemar(4, 4) == 1.0


def test_arms_are_compared_on_the_examples_that_both_answered() -> None:
    one, other = {1: True, 2: True, 3: False, 4: True}, {1: False, 2: True, 3: False, 5: True}
    compared = compare(one, other)
    assert compared is not None
    assert compared["difference"] == pytest.approx(1 / 3)
    assert (compared["count"], compared["p"]) == (3, 1.0)
    assert compared["low"] < 0 < compared["high"]
    assert compare(one, {9: True}) is None
    assert compare({1: 0.5, 2: 0.5}, {1: 0.25, 2: 0.25}) == {"difference": 0.25, "count": 2, "low": 0.25, "high": 0.25}


def test_retention_is_what_is_kept_of_what_the_text_gives() -> None:
    none, full = {n: n < 1 for n in range(10)}, {n: n < 9 for n in range(10)}
    assert retention({n: n < 5 for n in range(10)}, none, full) == pytest.approx(0.5)
    assert retention(none, none, none) is None
    assert retention({1: True}, {2: True}, full) is None


def test_an_interval_of_a_paired_difference() -> None:
    low, high = paired_interval(0, 0, 100)
    assert low == -high
    assert 0.01 < high < 0.03
    # Wald's interval where there are many examples.
    low, high = paired_interval(600, 400, 10_000)
    assert low == pytest.approx(0.02 - 1.96 * 0.1**0.5 / 100, abs=2e-4)
    assert high == pytest.approx(0.02 + 1.96 * 0.1**0.5 / 100, abs=2e-4)
    assert paired_interval(3, 0, 3)[1] == 1.0
    assert paired_interval(0, 3, 3)[0] == -1.0
