"""Sample rows, as they stand in samples/<model>/<task>.jsonl, -> metrics with their intervals."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.statistics import (
    Difference,
    Estimate,
    bootstrap_interval,
    chance_p_value,
    clustered_mean,
    clustered_proportion,
    length_controlled,
    macro_average,
    macro_difference,
    mean,
    paired_bootstrap,
    paired_clusters,
    paired_proportions,
    paired_ratios,
    proportion,
    ratio,
)
from eval.tasks import LOWER_IS_BETTER, MACRO, METRICS, RUBRICS

Row = Mapping[str, Any]  # one sample

# How much of an option's log-likelihood is the option's own: it is divided by this.
DIVISORS: dict[str, Callable[[Row], float]] = {
    "acc": lambda option: 1.0,
    "acc_per_token": lambda option: option["num_tokens"],
    "acc_per_char": lambda option: len(option["text"]),
    "acc_per_byte": lambda option: len(option["text"].encode()),
    # lm-eval's names; its options come without their leading blank
    "acc_norm": lambda option: len(option["text"]),
    "acc_bytes": lambda option: len(option["text"].encode()),
}
JUDGED = {name for names in RUBRICS.values() for name in names}
UNCONDITIONAL = {"acc_uncond", "acc_mutual_info"}
# What a perplexity counts in; its logarithm is what has an interval.
PERPLEXITY_UNITS = {"word_perplexity": "num_words", "byte_perplexity": "num_bytes"}


MIN_DOCUMENTS = 20  # whose blocks are added up; fewer clusters give intervals that are too short
# Counted over all instructions of all questions, instead of over questions.
PER_PART = {"instruction_loose", "instruction_strict"}


def picked_option(row: Row, metric: str) -> int | None:
    """The option that a model takes under one normalisation; None if it could not read them.

    Under any other metric it is the likeliest.
    """
    options, metric = row["options"], metric.removesuffix(MACRO)
    if any(option["logprob"] is None for option in options):
        return None
    if metric in UNCONDITIONAL:
        values = [option["logprob"] - option["logprob_alone"] for option in options]
    else:
        divisor = DIVISORS.get(metric, DIVISORS["acc"])
        values = [option["logprob"] / divisor(option) for option in options]
    return values.index(max(values))


def is_right(row: Row, metric: str) -> bool:
    """Whether the answer of one sample counts as correct under a metric that is an accuracy."""
    metric = metric.removesuffix(MACRO)
    if metric == "exact_match":
        return bool(row["correct"])
    if metric == "mc2":
        return _grade(row, metric) > 0.5
    if metric in JUDGED:
        return bool(row["correct"])
    if "scores" in row:
        return bool(row["scores"].get(metric) == 1.0)
    return picked_option(row, metric) == row["gold"]


def _grade(row: Row, metric: str) -> float:
    """A score between 0 and 1: a verifier's, or TruthfulQA's share of probability (mc2).

    mc2 is what the right options have of the probability of all (arXiv:2109.07958).
    """
    if metric != "mc2":
        return float(row["scores"][metric])
    logprobs = [option["logprob"] for option in row["options"]]
    if None in logprobs:
        return 0.0  # it could not be read
    largest = max(logprobs)
    shares = [math.exp(value - largest) for value in logprobs]
    return sum(shares[number] for number in row["golds"]) / sum(shares)


def _grades(rows: Sequence[Row], metric: str) -> list[float]:
    if metric != "lc_win_rate":
        return [_grade(row, metric) for row in rows]
    won = [row["scores"]["win_rate"] for row in rows]
    return length_controlled(won, [row["excess_length"] for row in rows])


def _surprise(row: Row, metric: str) -> tuple[float, float]:
    """Numerator and denominator of a perplexity-like metric for one sample."""
    if "options" in row:  # bits per byte of the right option, each question counting the same
        option = row["options"][row["gold"]]
        return -option["logprob"] / math.log(2) / len(option["text"].encode()), 1.0
    if metric == "bits_per_byte":
        return -row["logprob"] / math.log(2), row["num_bytes"]
    return -row["logprob"], row[PERPLEXITY_UNITS.get(metric, "num_tokens")]


def measured(kind: str, rows: Sequence[Row]) -> list[str]:
    """The metrics of a kind that these samples hold: unconditional ones not in every file."""
    if kind == "judged":
        return [*(["lc_win_rate"] if "excess_length" in rows[0] else []), *rows[0]["scores"]]
    if "scores" in rows[0]:
        return list(rows[0]["scores"])
    if kind == "lm_eval":
        return ["bits_per_byte", *PERPLEXITY_UNITS]
    names = list(METRICS[kind])
    if "acc_uncond" in names:
        read = [
            option for row in rows for option in row["options"] if option["logprob"] is not None
        ]
        if not read or any(option["logprob_alone"] is None for option in read):
            names.remove("acc_uncond")
    if "mc2" in names and not all("golds" in row for row in rows):
        names.remove("mc2")
    if not all(row.get("category") for row in rows):
        names = [name for name in names if not name.endswith(MACRO)]
    if not any(map(_is_readable, rows)):
        names = [name for name in names if name not in LOWER_IS_BETTER]
    return names


def estimate(rows: Sequence[Row], metric: str) -> Estimate:
    """One metric over the samples of a task."""
    if metric.endswith(MACRO):
        by_category = _by_category(rows)
        return macro_average(
            [estimate(part, metric.removesuffix(MACRO)) for part in by_category.values()]
        )
    if metric in PER_PART and len({row["scores"][metric] for row in rows}) > 1:
        numbers = [row["num_parts"] for row in rows]
        followed = [row["scores"][metric] * row["num_parts"] for row in rows]
        return _within_one(ratio(followed, numbers))
    is_fitted = metric == "lc_win_rate" and len({row["correct"] for row in rows}) > 1
    if metric == "mc2" or is_fitted or _is_graded(rows, metric):
        grades, clusters = _grades(rows, metric), _clusters(rows)
        found = mean(grades) if clusters is None else clustered_mean(grades, clusters)
        interval = bootstrap_interval(grades, clusters=clusters)
        return _within_one(Estimate(found.value, found.stderr, *interval, found.n))
    if metric not in LOWER_IS_BETTER and (clusters := _clusters(rows)) is not None:
        return clustered_proportion([is_right(row, metric) for row in rows], clusters)
    if metric not in LOWER_IS_BETTER:
        return proportion([is_right(row, metric) for row in rows])
    readable = [row for row in rows if _is_readable(row)]
    above, below = _by_document(readable, [_surprise(row, metric) for row in readable])
    if metric not in PERPLEXITY_UNITS:
        found = mean(above) if "options" in rows[0] else ratio(above, below)
        return dataclasses.replace(found, n=len(readable))
    nats = dataclasses.replace(ratio(above, below), n=len(readable))
    return Estimate(
        math.exp(nats.value),
        None if nats.stderr is None else math.exp(nats.value) * nats.stderr,
        None if nats.low is None else math.exp(nats.low),
        None if nats.high is None else math.exp(nats.high),
        nats.n,
    )


def _by_category(rows: Sequence[Row]) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row["category"], []).append(row)
    return parts


def _within_one(item: Estimate) -> Estimate:
    """A share's interval, cut where no share can be."""
    return Estimate(
        item.value,
        item.stderr,
        None if item.low is None else max(0.0, item.low),
        None if item.high is None else min(1.0, item.high),
        item.n,
    )


def _clusters(rows: Sequence[Row]) -> list[str] | None:
    """The cluster of each question, a question without one being its own; None if all are alone.

    Of answers that are judged; the blocks of predicted text are added up by document.
    """
    clusters = [
        f"cluster {row['cluster']}" if "cluster" in row else f"question {row['doc_id']}"
        for row in rows
    ]
    return clusters if len(set(clusters)) < len(clusters) else None


def _is_graded(rows: Sequence[Row], metric: str) -> bool:
    """Whether some answers are neither right nor wrong but have a score in between."""
    metric = "win_rate" if metric == "lc_win_rate" else metric
    return "scores" in rows[0] and any(row["scores"][metric] not in (0.0, 1.0) for row in rows)


def _is_readable(row: Row) -> bool:
    return "options" not in row or row["options"][row["gold"]]["logprob"] is not None


def compare(first: Sequence[Row], second: Sequence[Row], metric: str) -> Difference | None:
    """Second minus first on the questions that both were asked; None if they share none.

    A perplexity has no paired difference of its own: compare nats or bits. Nor has what lm-eval
    computes from all answers together.
    """
    is_held = "scores" not in first[0] or metric in {"lc_win_rate", *first[0]["scores"]}
    if metric in PERPLEXITY_UNITS or not is_held:
        return None
    if metric.endswith(MACRO):
        of_first_by_category = _by_category(first)
        parts = [
            compare(of_first_by_category[category], rows, metric.removesuffix(MACRO))
            for category, rows in _by_category(second).items()
            if category in of_first_by_category
        ]
        differences = [part for part in parts if part is not None]
        return macro_difference(differences) if differences else None
    of_first = {row["doc_id"]: row for row in first}
    pairs = [(of_first[row["doc_id"]], row) for row in second if row["doc_id"] in of_first]
    if metric in LOWER_IS_BETTER:
        pairs = [pair for pair in pairs if all(map(_is_readable, pair))]
    if not pairs:
        return None
    if metric in PER_PART:
        numbers = [row["num_parts"] for row, _ in pairs]
        before, after = (
            [pair[side]["scores"][metric] * pair[side]["num_parts"] for pair in pairs]
            for side in (0, 1)
        )
        return paired_ratios(before, after, numbers, lower_is_better=False)
    if metric in ("mc2", "lc_win_rate") or any(
        _is_graded(side, metric) for side in zip(*pairs, strict=True)
    ):
        before, after = (_grades([pair[side] for pair in pairs], metric) for side in (0, 1))
        return paired_bootstrap(before, after, clusters=_clusters([row for row, _ in pairs]))
    if metric not in LOWER_IS_BETTER:
        first_right, second_right = (
            [is_right(pair[side], metric) for pair in pairs] for side in (0, 1)
        )
        clusters = _clusters([row for row, _ in pairs])
        if clusters is not None:
            return paired_clusters(first_right, second_right, clusters)
        return paired_proportions(first_right, second_right)
    readable = [row for row, _ in pairs]
    sums = [
        _by_document(readable, [_surprise(pair[side], metric) for pair in pairs]) for side in (0, 1)
    ]
    return paired_ratios(sums[0][0], sums[1][0], sums[0][1], lower_is_better=True)


def _by_document(
    rows: Sequence[Row], pairs: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Numerators and denominators, the blocks of a document ("3:0", "3:1") added up.

    A document's blocks are alike, so documents are what varies; where there are too few to tell how
    much they do, blocks are.
    """
    sums: dict[str, tuple[float, float]] = {}
    for row, (above, below) in zip(rows, pairs, strict=True):
        document = str(row["doc_id"]).partition(":")[0]
        before = sums.get(document, (0.0, 0.0))
        sums[document] = (before[0] + above, before[1] + below)
    units = list(sums.values()) if len(sums) >= MIN_DOCUMENTS else list(pairs)
    return [above for above, _ in units], [below for _, below in units]


def chance_level(rows: Sequence[Row]) -> float | None:
    """The accuracy of guessing, where there are options to guess from."""
    if not rows or "options" not in rows[0] or "golds" in rows[0]:
        return None  # of mc2: depends on how likely the model finds texts of their lengths
    return sum(1 / len(row["options"]) for row in rows) / len(rows)


def guessing_p_value(rows: Sequence[Row], metric: str) -> float | None:
    """How likely guessing is to score as much; None where there is nothing to guess from.

    Of a mean over categories, that of all questions together.
    """
    metric = metric.removesuffix(MACRO)
    if not rows or "options" not in rows[0] or metric in LOWER_IS_BETTER:
        return None
    if metric == "mc2":
        return None
    if "scores" in rows[0] and (metric not in rows[0]["scores"] or _is_graded(rows, metric)):
        return None
    num_right = sum(is_right(row, metric) for row in rows)
    return chance_p_value(num_right, [1 / len(row["options"]) for row in rows])
