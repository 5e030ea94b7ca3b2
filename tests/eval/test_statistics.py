"""Intervals and tests against published or hand-worked values."""

import math
import random

import pytest

from eval.statistics import (
    Difference,
    Estimate,
    bootstrap_interval,
    chance_p_value,
    clustered_mean,
    clustered_proportion,
    holm,
    macro_average,
    macro_difference,
    mcnemar_p_value,
    mean,
    minimal_detectable_effect,
    paired_bootstrap,
    paired_clusters,
    paired_proportions,
    paired_ratios,
    proportion,
    ratio,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("num_correct", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_newcombes_published_values(num_correct, n, low, high):
    assert list(wilson_interval(num_correct, n)) == pytest.approx([low, high], abs=5e-5)


def test_wilson_interval_of_all_wrong_is_the_closed_form():
    z_squared = 1.959964**2
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(z_squared / (10 + z_squared), abs=1e-6)


def test_wilson_interval_covers_the_truth_about_as_often_as_it_says():
    chance = random.Random(0)
    covered = 0
    for _ in range(2000):
        truth = chance.uniform(0.05, 0.95)
        num_correct = sum(chance.random() < truth for _ in range(50))
        low, high = wilson_interval(num_correct, 50)
        covered += low <= truth <= high
    assert 0.935 < covered / 2000 < 0.965


def test_a_proportion_carries_the_standard_error_of_a_mean():
    estimate = proportion([True, True, True, False])
    assert (estimate.value, estimate.n) == (0.75, 4)
    assert estimate.stderr == pytest.approx(0.25)  # sample deviation 0.5 over the root of 4


def test_mean_of_one_to_five_has_the_hand_worked_error():
    estimate = mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert estimate.value == 3.0
    assert estimate.stderr == pytest.approx(math.sqrt(2.5 / 5))
    assert estimate.low == pytest.approx(3.0 - 1.959964 * math.sqrt(0.5), abs=1e-5)


def test_one_block_has_a_value_and_no_interval():
    assert ratio([6.0], [3.0]) == Estimate(2.0, None, None, None, 1)


def test_blocks_with_the_same_ratio_have_no_error_whatever_their_size():
    estimate = ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert estimate.value == pytest.approx(2.0)
    assert estimate.stderr == pytest.approx(0.0, abs=1e-12)


def test_macro_average_counts_a_small_task_as_much_as_a_large_one():
    small = Estimate(1.0, 0.3, 0.7, 1.0, 2)
    large = Estimate(0.0, 0.4, 0.0, 0.4, 1000)
    both = macro_average([small, large])
    assert (both.value, both.n) == (0.5, 1002)
    assert both.stderr == pytest.approx(0.25)  # 3-4-5 triangle, halved
    assert both.low == pytest.approx(0.5 - 0.15)
    assert both.high == pytest.approx(0.5 + 0.20)


def test_mcnemar_of_eight_to_two_is_hand_worked():
    assert mcnemar_p_value(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_p_value(2, 8) == mcnemar_p_value(8, 2)
    assert mcnemar_p_value(0, 0) == 1.0
    assert mcnemar_p_value(3, 3) == 1.0


def test_paired_difference_is_hand_worked_from_the_four_cells():
    # 100 questions: 30 both right, 12 only the first, 28 only the second, 30 neither.
    first = [True] * 30 + [True] * 12 + [False] * 28 + [False] * 30
    second = [True] * 30 + [False] * 12 + [True] * 28 + [False] * 30
    difference = paired_proportions(first, second)
    assert difference.value == pytest.approx(0.16)
    assert (difference.wins, difference.losses, difference.ties) == (28, 12, 60)
    half = 1.959964 * math.sqrt(41 - 16**2 / 102) / 102
    assert difference.low == pytest.approx(16 / 102 - half, abs=1e-6)
    assert difference.high == pytest.approx(16 / 102 + half, abs=1e-6)
    assert difference.is_separated
    assert difference.p_value == pytest.approx(0.0166, abs=1e-3)


def test_a_model_compared_with_itself_is_not_separated_and_still_has_a_width():
    answers = [True, False] * 20
    difference = paired_proportions(answers, answers)
    assert difference.value == 0.0
    assert difference.low is not None and difference.high is not None
    assert difference.low == pytest.approx(-difference.high)
    assert difference.high > 0
    assert difference.p_value == 1.0


def test_pairing_sees_a_small_steady_gain_that_separate_intervals_miss():
    first = [question % 2 == 0 for question in range(200)]
    second = [is_right or question % 20 == 1 for question, is_right in enumerate(first)]
    before, after = proportion(first), proportion(second)
    assert before.high is not None and after.low is not None
    assert before.high > after.low  # side by side they overlap
    assert paired_proportions(first, second).is_separated


def test_bits_per_byte_compare_block_by_block():
    difference = paired_ratios(
        [20.0, 30.0, 10.0], [18.0, 27.0, 9.0], [10.0, 15.0, 5.0], lower_is_better=True
    )
    assert difference.value == pytest.approx(-0.2)
    assert (difference.wins, difference.losses) == (3, 0)
    assert difference.is_separated  # every block gained the same share


def test_macro_difference_is_the_mean_with_bounds_added_in_squares():
    one = Difference(0.2, -0.1, 0.5, 0.2, 5, 3, 2)
    two = Difference(0.4, 0.0, 0.8, 0.1, 6, 2, 2)
    both = macro_difference([one, two])
    assert both.value == pytest.approx(0.3)
    assert both.low == pytest.approx(0.3 - 0.25)
    assert both.high == pytest.approx(0.3 + 0.25)
    assert (both.wins, both.losses, both.ties) == (11, 5, 4)


# ---------------------------------------------------------------- clusters, resampling, guessing


def test_questions_of_one_passage_count_as_one_when_they_always_agree():
    values = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    passages = [0, 0, 1, 1, 2, 2, 3, 3]
    clustered = clustered_mean(values, passages)
    assert clustered.stderr == pytest.approx(mean([1.0, 0.0, 1.0, 0.0]).stderr)
    assert (clustered.value, clustered.n) == (0.5, 8)
    alone = clustered_mean(values, range(8))
    assert alone.stderr == pytest.approx(mean(values).stderr)


def test_the_clustered_error_is_the_hand_worked_sum_over_pairs():
    # arXiv:2411.00640, eq. 4: 1/n of the root of the sum, over clusters, over pairs of residuals
    values, clusters = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], "aabbbc"
    centre = 4 / 6
    total = sum(
        (x - centre) * (y - centre)
        for x, a in zip(values, clusters, strict=True)
        for y, b in zip(values, clusters, strict=True)
        if a == b
    )
    expected = math.sqrt(total * 3 / 2) / 6
    assert clustered_mean(values, clusters).stderr == pytest.approx(expected)


def test_clusters_that_agree_have_the_interval_of_their_number():
    """Ten passages of three questions, all of a passage alike, tell what ten questions do."""
    right = [True] * 21 + [False] * 9
    clusters = [number // 3 for number in range(30)]
    found = clustered_proportion(right, clusters)
    assert (found.value, found.n) == (0.7, 30)
    assert (found.low, found.high) == pytest.approx(wilson_interval(7, 10))
    alone = clustered_proportion(right, range(30))
    assert (alone.low, alone.high) == pytest.approx(wilson_interval(21, 30))
    all_right = clustered_proportion([True] * 30, clusters)
    assert (all_right.low, all_right.high) == wilson_interval(10, 10)


def test_the_interval_of_clusters_covers_the_truth_about_as_often_as_it_says():
    chance = random.Random(11)
    covered = 0
    for _ in range(400):
        levels = [0.9 if chance.random() < 0.5 else 0.3 for _ in range(40)]  # 0.6 in all
        clusters = [number for number in range(40) for _ in range(5)]
        right = [chance.random() < levels[number] for number in clusters]
        found = clustered_proportion(right, clusters)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.6 <= found.high
    assert 0.92 < covered / 400 < 0.98


def test_bootstrap_interval_is_that_of_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    chance = random.Random(1)
    values = [chance.expovariate(1.0) for _ in range(80)]
    theirs = scipy_stats.bootstrap(
        (values,), lambda x, axis: x.mean(axis=axis), method="percentile", rng=5
    ).confidence_interval
    assert bootstrap_interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert bootstrap_interval(values) == bootstrap_interval(values)  # the same seed, the same draws


def test_bootstrap_of_clusters_is_wider_than_that_of_questions():
    values = [float(number // 5 % 2) for number in range(200)]
    passages = [number // 5 for number in range(200)]
    low, high = bootstrap_interval(values)
    low_clustered, high_clustered = bootstrap_interval(values, clusters=passages)
    # five questions that agree: the root of 5 wider
    assert (high_clustered - low_clustered) / (high - low) == pytest.approx(5**0.5, rel=0.1)


def test_paired_bootstrap_agrees_with_the_normal_difference_on_many_questions():
    chance = random.Random(2)
    first = [chance.random() for _ in range(400)]
    second = [value + chance.gauss(0.03, 0.3) for value in first]
    resampled = paired_bootstrap(first, second)
    normal = paired_ratios(first, second, [1.0] * 400, lower_is_better=False)
    assert resampled.value == pytest.approx(normal.value)
    assert resampled.low == pytest.approx(normal.low, abs=0.003)
    assert resampled.high == pytest.approx(normal.high, abs=0.003)
    assert resampled.p_value == pytest.approx(normal.p_value, abs=0.02)
    assert (resampled.wins, resampled.losses) == (normal.wins, normal.losses)


def test_paired_bootstrap_of_equal_answers_finds_nothing():
    difference = paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert (difference.p_value, difference.ties) == (1.0, 3)


def test_mcnemar_is_scipys_binomial_test_of_the_disagreements():
    scipy_stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((8, 2), (30, 12), (100, 140), (1, 0)):
        expected = scipy_stats.binomtest(wins, wins + losses).pvalue
        assert mcnemar_p_value(wins, losses) == pytest.approx(expected)


def test_the_chance_of_guessing_is_scipys_binomial_tail():
    scipy_stats = pytest.importorskip("scipy.stats")
    for correct, n, chance in ((30, 100, 0.25), (0, 10, 0.5), (100, 100, 0.25), (500, 900, 0.5)):
        expected = scipy_stats.binomtest(correct, n, chance, alternative="greater").pvalue
        assert chance_p_value(correct, [chance] * n) == pytest.approx(expected, rel=1e-9)


def test_the_chance_of_guessing_with_unequal_options_is_hand_worked():
    # of two and of four options: both right 1/8, exactly one 1/2 * 3/4 + 1/2 * 1/4 = 1/2
    assert chance_p_value(2, [1 / 2, 1 / 4]) == pytest.approx(1 / 8)
    assert chance_p_value(1, [1 / 2, 1 / 4]) == pytest.approx(5 / 8)
    assert chance_p_value(0, [1 / 2, 1 / 4]) == 1.0


def test_minimal_detectable_effect_is_hand_worked():
    # 1.96 + 0.8416 standard errors; for 1,000 questions of which 10 % change sides
    stderr = math.sqrt(0.1 / 1000)
    assert minimal_detectable_effect(stderr) == pytest.approx(2.8016 * 0.01, abs=1e-5)
    difference = Difference(0.0, -0.0196, 0.0196, 1.0, 50, 50, 900)
    assert difference.detectable == pytest.approx(0.028, abs=1e-4)


def test_a_true_difference_of_the_detectable_size_is_found_about_as_often_as_said():
    chance = random.Random(3)
    found = 0
    for _ in range(400):
        gains = [chance.gauss(0.28, 1.0) for _ in range(100)]  # 2.8 standard errors of 0.1
        found += paired_ratios([0.0] * 100, gains, [1.0] * 100, lower_is_better=False).is_separated
    assert 0.74 < found / 400 < 0.86


def test_holm_is_hand_worked():
    # Sorted 0.01 0.02 0.03 0.04: times 4, 3, 2, 1, and never below the one before
    assert holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_near_tie_is_known_to_be_small_and_not_merely_unproven():
    assert Difference(0.001, -0.008, 0.01, 0.8, 1, 1, 998).is_near_tie(0.01)
    unknown = Difference(0.001, -0.05, 0.05, 0.9, 9, 8, 10)
    assert not unknown.is_near_tie(0.01)
    assert not unknown.is_separated
    assert not Difference(0.0, None, None, None, 0, 0, 1).is_near_tie(0.01)


def test_a_gain_on_one_passage_is_no_gain_on_many_questions():
    # ten passages of ten questions; the second model knows one passage more
    passages = [number // 10 for number in range(100)]
    first = [0.0] * 100
    second = [1.0] * 10 + [0.0] * 90
    alone = paired_proportions([False] * 100, [value == 1.0 for value in second])
    assert alone.is_separated and alone.p_value == 2 / 2**10
    clustered = paired_clusters(first, second, passages)
    assert (clustered.value, clustered.wins, clustered.ties) == (0.1, 10, 90)
    assert not clustered.is_separated
    gains = [1.0] + [0.0] * 9
    expected = mean(gains)
    assert (clustered.low, clustered.high) == pytest.approx((expected.low, expected.high))
