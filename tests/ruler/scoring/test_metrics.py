"""The judge: post-processing, official and strict values, intervals, averages."""

import pytest

from ruler.scoring.metrics import (
    effective_length,
    interval,
    interval_of_task_mean,
    length_averages,
    official_score,
    postprocess,
    sample_value,
)
from utils.errors import DatasetError


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  7 ", "7"),
        ("\x00\x01 \n", ""),
        ("a\x0bfoo", "a\nfoo"),
        ("a\r\nb\tc", "a\n\nb\nc"),
        ("\x7f", "\x7f"),  # not in the reference's range
    ],
)
def test_postprocess(raw, clean):
    assert postprocess(raw) == clean


def test_all_counts_a_fraction_and_part_any_hit():
    assert sample_value("two and FOUR", ["one", "two", "three", "four"], "all") == 0.5
    assert sample_value("two and FOUR", ["one", "two"], "part") == 1.0
    assert sample_value("", ["one"], "part") == 0.0


def test_strict_wants_word_boundaries():
    assert sample_value("x48234989", ["4823498"], "all") == 1.0
    assert sample_value("x48234989", ["4823498"], "all", strict=True) == 0.0
    assert sample_value("is 4823498.", ["4823498"], "all", strict=True) == 1.0
    assert sample_value("Uses C++!", ["c++"], "all", strict=True) == 1.0


def test_empty_references_are_an_error():
    with pytest.raises(DatasetError, match="no references"):
        sample_value("x", [], "all")


def test_official_score_rounds_like_the_reference():
    assert official_score([1 / 3, 1 / 3, 1 / 3]) == 33.33
    assert official_score([]) == 0.0


def test_interval_picks_its_method_and_holds_the_mean():
    binary = interval([1.0, 0.0, 1.0, 1.0])
    assert binary is not None
    assert binary.method == "wilson"
    assert binary.low < 75 < binary.high
    graded = interval([0.2, 0.4, 0.6, 0.8] * 10)
    assert graded is not None
    assert graded.method == "bootstrap"
    assert graded.low < 50 < graded.high
    assert graded == interval([0.2, 0.4, 0.6, 0.8] * 10)
    assert interval([]) is None


def test_effective_length_is_inclusive_at_one_decimal():
    assert effective_length({4096: 99.0, 8192: 85.56, 16384: 85.54}) == 8192
    assert effective_length({4096: 10.0}) is None


def test_length_averages_weigh_one_to_n():
    averages = length_averages({16384: 60.0, 4096: 90.0, 8192: 75.0})
    assert averages == {"mean": 75.0, "weighted_increasing": 70.0, "weighted_decreasing": 80.0}
    assert length_averages({}) is None


def test_interval_of_a_mean_over_tasks():
    one, two = [0.0, 0.0, 1.0, 1.0], [1.0] * 4
    first, second = interval(one), interval(two)
    both = interval_of_task_mean([one, two])
    assert first is not None
    assert second is not None
    assert both is not None
    assert both.low == pytest.approx(75 - ((50 - first.low) ** 2 + (100 - second.low) ** 2) ** 0.5 / 2, abs=0.01)
    assert both.high == pytest.approx(75 + (first.high - 50) / 2, abs=0.01)
    alone = interval_of_task_mean([one])
    assert alone is not None
    assert (alone.low, alone.high) == pytest.approx((first.low, first.high), abs=0.01)
    assert interval_of_task_mean([]) is None
