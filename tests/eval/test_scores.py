"""Metrics of sample rows, worked out by hand."""

import math

import pytest

from eval.scores import (
    chance_level,
    compare,
    estimate,
    guessing_p_value,
    is_right,
    measured,
    picked_option,
)
from eval.statistics import mean, wilson_interval


def option(text, logprob, num_tokens=1, alone=None):
    return {"text": text, "logprob": logprob, "logprob_alone": alone, "num_tokens": num_tokens}


# Each normalisation picks another option: the likeliest (0), per token (1), per character (2),
# per byte (3; its letters take two bytes each), against its likelihood alone (4).
ROW = {
    "doc_id": "0",
    "gold": 2,
    "options": [
        option(" a", -2.0, 1, -1.0),  # -1 a character, -1 a byte, -1 against alone
        option(" bb", -3.0, 6, -2.0),  # -0.5 a token, -1 a character
        option(" ccccccccc", -4.0, 2, -2.0),  # -0.4 a character and byte
        option(" ééééééé", -3.6, 2, -2.0),  # -0.45 a character, -0.24 a byte
        option(" d", -5.0, 2, -9.0),  # +4 against alone
    ],
}


@pytest.mark.parametrize(
    ("metric", "picked"),
    [("acc", 0), ("acc_per_token", 1), ("acc_per_char", 2), ("acc_per_byte", 3), ("acc_uncond", 4)],
)
def test_every_normalisation_is_hand_worked(metric, picked):
    assert picked_option(ROW, metric) == picked
    assert is_right(ROW, metric) == (picked == 2)


def test_bits_per_byte_of_the_right_option():
    expected = 4.0 / math.log(2) / 10  # its leading blank counts
    assert estimate([ROW], "bits_per_byte").value == pytest.approx(expected)


def test_unconditional_accuracy_is_left_out_where_the_file_has_none():
    plain = {**ROW, "options": [option(" a", -1.0), option(" b", -2.0)], "gold": 0}
    assert "acc_uncond" in measured("requests", [ROW])
    assert "acc_uncond" not in measured("requests", [ROW, plain])


def test_a_question_the_model_could_not_read_is_wrong():
    unread = {"doc_id": "1", "gold": 0, "options": [option(" a", None, 0), option(" b", -1.0)]}
    assert picked_option(unread, "acc") is None
    assert not is_right(unread, "acc")
    assert estimate([ROW, unread], "acc_per_char").value == 0.5
    assert "bits_per_byte" not in measured("multiple_choice", [unread])


def test_chance_is_one_over_the_options():
    two = {"options": [option(" a", -1.0)] * 2}
    four = {"options": [option(" a", -1.0)] * 4}
    assert chance_level([two, four]) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert chance_level([{"correct": True}]) is None


def block(doc_id, logprob, num_bytes):
    return {
        "doc_id": doc_id,
        "logprob": logprob,
        "num_bytes": num_bytes,
        "num_tokens": num_bytes // 4,
        "num_words": num_bytes // 5,
    }


def test_perplexity_sums_over_blocks_before_it_divides():
    rows = [block("0:0", -100 * math.log(2), 100), block("0:1", -500 * math.log(2), 200)]
    assert estimate(rows, "bits_per_byte").value == pytest.approx(2.0)
    assert estimate(rows, "nats_per_token").value == pytest.approx(600 * math.log(2) / 75)
    assert estimate(rows, "word_perplexity").value == pytest.approx(2 ** (600 / 60))


def test_models_are_compared_on_questions_both_were_asked():
    def answers(*corrects):
        return [{"doc_id": str(n), "correct": right} for n, right in corrects]

    first = answers((0, True), (1, False), (2, False))
    second = answers((2, True), (1, True), (5, True))
    difference = compare(first, second, "exact_match")
    assert difference is not None
    assert (difference.wins, difference.losses, difference.ties) == (2, 0, 0)
    assert compare(first, answers((9, True)), "exact_match") is None


def test_fewer_bits_are_a_win():
    first = [block(str(n), -200.0 - n, 100) for n in range(5)]
    second = [block(str(n), -180.0 - n, 100) for n in range(5)]
    difference = compare(first, second, "bits_per_byte")
    assert difference is not None
    assert difference.value == pytest.approx(-20 / 100 / math.log(2))
    assert (difference.wins, difference.losses) == (5, 0)
    assert difference.is_separated


def answered(doc_id, is_correct, cluster=None):
    row = {"doc_id": str(doc_id), "correct": is_correct}
    return row if cluster is None else row | {"cluster": cluster}


def test_questions_about_one_passage_count_as_related():
    rights = [True, True, True, False, False, False]
    rows = [answered(n, right, "ab"[n // 3]) for n, right in enumerate(rights)]
    found = estimate(rows, "exact_match")
    assert found.stderr == mean([1.0, 0.0]).stderr == 0.5
    assert (found.value, found.n) == (0.5, 6)
    assert (found.low, found.high) == pytest.approx(wilson_interval(1, 2))  # of two passages
    better = [answered(n, True, "ab"[n // 3]) for n in range(6)]
    difference = compare(rows, better, "exact_match")
    assert difference is not None
    assert (difference.value, difference.wins) == (0.5, 3)
    assert not difference.is_separated  # two passages show nothing


def test_a_question_without_a_passage_is_its_own_cluster():
    rows = [answered(0, True, "a"), answered(1, True, "a"), answered(2, False), answered(3, True)]
    expected = [2 - 0.75 * 2, 0 - 0.75, 1 - 0.75]  # residuals of the three clusters
    error = math.sqrt(sum(item**2 for item in expected) * 3 / 2) / 4
    assert estimate(rows, "exact_match").stderr == pytest.approx(error)


def test_scores_in_between_about_one_passage_count_as_related_too():
    def graded(number: int, score: float, cluster: str) -> dict:
        return {"doc_id": str(number), "scores": {"answer_f1": score}, "cluster": cluster}

    rows = [graded(n, (0.25, 0.75)[n // 3], "ab"[n // 3]) for n in range(6)]
    found = estimate(rows, "answer_f1")
    assert (found.value, found.n) == (0.5, 6)
    assert found.stderr == pytest.approx(0.25)  # of two passages: |0.75 - 0.25| / 2
    assert (found.low, found.high) == (0.25, 0.75)  # both draws may be of one passage
    better = [graded(n, 0.75, "ab"[n // 3]) for n in range(6)]
    difference = compare(rows, better, "answer_f1")
    assert difference is not None
    assert (difference.value, difference.wins) == (0.25, 3)
    assert not difference.is_separated


def test_the_chance_of_guessing_is_hand_worked():
    rows = [{"options": [option(" a", -1.0), option(" b", -2.0)], "gold": 0}] * 3
    assert guessing_p_value(rows, "acc") == pytest.approx(1 / 8)
    assert guessing_p_value(rows, "bits_per_byte") is None
    assert guessing_p_value([answered(0, True)], "exact_match") is None
