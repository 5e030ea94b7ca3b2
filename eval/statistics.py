"""Scores of single questions become a value with its uncertainty, and models are compared in pairs.

Every interval holds 95 % unless told otherwise. Nothing here knows models, files or tasks.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
NUM_RESAMPLES = 10_000
MAX_NEWTON_STEPS = 200


@dataclass(frozen=True)
class Estimate:
    """A value measured on ``n`` questions; ``stderr`` and the interval are None for one alone."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """How much more the second model scored than the first on the same questions.

    ``wins`` counts questions where the second did better, ``losses`` where it did worse.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None
    wins: int
    losses: int
    ties: int

    @property
    def is_separated(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def is_near_tie(self, margin: float) -> bool:
        """Whether the whole interval lies within the margin: not unknown, but as good as equal."""
        return (
            self.low is not None
            and self.high is not None
            and -margin <= self.low
            and self.high <= margin
        )

    @property
    def detectable(self) -> float | None:
        """The least true difference that this many questions would show in 80 % of comparisons."""
        if self.low is None or self.high is None:
            return None
        return minimal_detectable_effect((self.high - self.low) / (2 * z_value()))


def z_value(confidence: float = CONFIDENCE) -> float:
    """Standard errors on each side of the mean: 1.96 for 95 %."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


# ---------------------------------------------------------------- one model


def wilson_interval(
    num_correct: int, n: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Wilson's score interval of a proportion (J. Am. Stat. Assoc. 22, 1927).

    Unlike value ± error it stays within 0 and 1 and has a width at 0 of n too.
    """
    assert 0 <= num_correct <= n and n > 0, (num_correct, n)
    return _wilson(num_correct / n, n, confidence)


def _wilson(share: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The same of a share and a number of questions, which need not be whole."""
    z = z_value(confidence)
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if share == 0 else middle - half
    high = 1.0 if share == 1 else middle + half
    return low, high


def proportion(is_correct: Sequence[bool]) -> Estimate:
    """The share of questions answered correctly, with Wilson's interval."""
    n, num_correct = len(is_correct), sum(is_correct)
    low, high = wilson_interval(num_correct, n)
    share = num_correct / n
    stderr = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
    return Estimate(share, stderr, low, high, n)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of numbers, with its standard error and normal interval."""
    return ratio(values, [1.0] * len(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum over sum, as in bits per byte, with the linearised standard error of a ratio.

    The blocks (documents, say) are the units that vary: Cochran, Sampling Techniques, eq. 6.13.
    """
    n, total = len(numerators), sum(denominators)
    value = sum(numerators) / total
    if n < 2:
        return Estimate(value, None, None, None, n)
    residuals = [
        above - value * below for above, below in zip(numerators, denominators, strict=True)
    ]
    stderr = math.sqrt(sum(item * item for item in residuals) * n / (n - 1)) / total
    half = z_value() * stderr
    return Estimate(value, stderr, value - half, value + half, n)


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The mean of questions that come in clusters, such as those about one passage.

    Questions of a cluster are right or wrong together, so the clusters are the units that vary
    (arXiv:2411.00640, eq. 4, times G / (G - 1) for G clusters).
    """
    sums, sizes = _by_cluster(values, clusters)
    estimate = ratio(sums, sizes)
    return Estimate(estimate.value, estimate.stderr, estimate.low, estimate.high, len(values))


def clustered_proportion(is_correct: Sequence[bool], clusters: Sequence[Hashable]) -> Estimate:
    """A share of questions that come in clusters, with Wilson's interval.

    The interval is that of as many independent questions as would have the clustered standard
    error, never more than there are; where all are right or wrong, of as many as there are
    clusters.
    """
    estimate, num_clusters = clustered_mean(is_correct, clusters), len(set(clusters))
    share, stderr, n = estimate.value, estimate.stderr, estimate.n
    worth = float(num_clusters)
    if 0 < share < 1 and stderr:
        worth = min(float(n), 1 + share * (1 - share) / stderr**2)
    low, high = _wilson(share, worth)
    return Estimate(share, stderr, low, high, n)


def _by_cluster(
    values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[list[float], list[float]]:
    """Sum and number of the values of each cluster."""
    sums: dict[Hashable, float] = {}
    sizes: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
        sizes[cluster] = sizes.get(cluster, 0.0) + 1.0
    return [*sums.values()], [*sizes.values()]


def bootstrap_interval(
    values: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean; whole clusters are drawn, if there are any."""
    means = _resampled_means(values, clusters, num_resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resampled_means(
    values: Sequence[float], clusters: Sequence[Hashable] | None, num_resamples: int, seed: int
) -> np.ndarray:
    """Means of as many draws, each of as many questions (or clusters) as there are."""
    places = range(len(values)) if clusters is None else clusters
    sums, sizes = (np.array(column) for column in _by_cluster(values, places))
    chance = np.random.default_rng(seed)
    means: list[float] = []
    while len(means) < num_resamples:
        rows = min(num_resamples - len(means), 1 + 4_000_000 // len(sums))  # 32 MB at once
        drawn = chance.integers(len(sums), size=(rows, len(sums)))
        means += list(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.array(means)


def length_controlled(shares: Sequence[float], excess: Sequence[float]) -> list[float]:
    """A number for each question whose mean is the win rate if both answers were equally long.

    ``shares``: how much of each question was won, 0 to 1; ``excess``: how much longer the answer
    was than the other. The logistic regression of AlpacaEval 2 (arXiv:2404.04475) without its
    difficulty of each question, which takes many models to estimate:
    logit(won) = a + b tanh(excess / its standard deviation), b with a standard normal prior.
    Beyond their mean, the numbers (jackknife pseudo-values, linearised) vary as that value does.
    """
    won_N = np.asarray(shares, dtype=float)
    excess_N = np.asarray(excess, dtype=float)
    if won_N.min() == won_N.max():  # nothing for a length to explain, and no finite logit of 0
        return [float(value) for value in won_N]
    scale = excess_N.std()
    length_N = np.tanh(excess_N / scale) if scale > 0 else np.zeros_like(excess_N)
    features_N2 = np.stack([np.ones_like(length_N), length_N], axis=1)
    prior_22 = np.diag([0.0, 1.0])
    weights_2 = np.zeros(2)
    for _ in range(MAX_NEWTON_STEPS):
        fitted_N = _logistic(features_N2 @ weights_2)
        gradient_2 = features_N2.T @ (won_N - fitted_N) - prior_22 @ weights_2
        curvature_22 = (features_N2.T * (fitted_N * (1 - fitted_N))) @ features_N2 + prior_22
        step_2 = np.linalg.solve(curvature_22, gradient_2)
        weights_2 += step_2 / max(1.0, float(np.abs(step_2).max()))  # no step overshoots
        if np.abs(gradient_2).max() < 1e-10 * len(won_N):
            break
    value = float(_logistic(weights_2[:1])[0])
    scores_N2 = features_N2 * (won_N - fitted_N)[:, None]
    influence_N = np.linalg.solve(curvature_22, scores_N2.T)[0] * value * (1 - value)
    influence_N -= influence_N.mean()
    return [float(item) for item in value + len(won_N) * influence_N]


def _logistic(logits_N: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits_N))


def chance_p_value(num_correct: int, chances: Sequence[float]) -> float:
    """How likely guessing would get at least as many right; ``chances``: of each question.

    Exact: the distribution of the number of successes with these chances.
    """
    distribution = np.ones(1)  # of 0 questions: surely 0 right
    for chance in chances:
        distribution = np.append(distribution, 0.0) * (1 - chance) + (
            np.insert(distribution, 0, 0.0) * chance
        )
    return float(min(1.0, distribution[num_correct:].sum()))


def macro_average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several tasks' values, each task counting the same.

    The distances from value to bound add in squares, each side by itself (MOVER: Zou and Donner,
    Stat. Med. 27, 2008), so that tasks at 0 or 1 still contribute their Wilson width.
    """
    k = len(estimates)
    value = sum(item.value for item in estimates) / k
    n = sum(item.n for item in estimates)
    errors = [item.stderr for item in estimates if item.stderr is not None]
    lows = [item.value - item.low for item in estimates if item.low is not None]
    highs = [item.high - item.value for item in estimates if item.high is not None]
    return Estimate(
        value,
        math.hypot(*errors) / k if len(errors) == k else None,
        value - math.hypot(*lows) / k if len(lows) == k else None,
        value + math.hypot(*highs) / k if len(highs) == k else None,
        n,
    )


# ---------------------------------------------------------------- two models, the same questions


def mcnemar_p_value(wins: int, losses: int) -> float:
    """Exact two-sided p-value of McNemar's test (Psychometrika 12, 1947).

    The chance that a fair coin, tossed once for each question on which the models disagree, is at
    least as one-sided as seen.
    """
    n = wins + losses
    tail = sum(math.comb(n, count) for count in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_proportions(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Second's share of correct answers minus first's: Agresti and Min's interval, McNemar's p.

    The interval (Stat. Med. 24, 2005) adds half a question to each of the four cells, which gives
    it a sensible width even where two models never disagree.
    """
    pairs = list(zip(first, second, strict=True))
    wins = sum(after and not before for before, after in pairs)
    losses = sum(before and not after for before, after in pairs)
    n = len(pairs)
    n_padded, wins_padded, losses_padded = n + 2, wins + 0.5, losses + 0.5
    middle = (wins_padded - losses_padded) / n_padded
    spread = (wins_padded + losses_padded) - (wins_padded - losses_padded) ** 2 / n_padded
    half = z_value() * math.sqrt(spread) / n_padded
    return Difference(
        value=(wins - losses) / n,
        low=max(-1.0, middle - half),
        high=min(1.0, middle + half),
        p_value=mcnemar_p_value(wins, losses),
        wins=wins,
        losses=losses,
        ties=n - wins - losses,
    )


def paired_ratios(
    first: Sequence[float],
    second: Sequence[float],
    denominators: Sequence[float],
    *,
    lower_is_better: bool,
) -> Difference:
    """Second's ratio minus first's over the same blocks, with a normal interval and p-value."""
    gains = [after - before for before, after in zip(first, second, strict=True)]
    estimate = ratio(gains, denominators)
    sign = -1 if lower_is_better else 1
    wins, losses = sum(sign * gain > 0 for gain in gains), sum(sign * gain < 0 for gain in gains)
    return Difference(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        p_value=_normal_p_value(estimate.value, estimate.stderr),
        wins=wins,
        losses=losses,
        ties=len(gains) - wins - losses,
    )


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Second's mean minus first's, with interval and p-value from resampled questions.

    No assumption about the scores' distribution. The p-value is twice the share of resamples on
    the other side of zero, the difference itself counted as one of them so that it is never 0.
    """
    gains = [after - before for before, after in zip(first, second, strict=True)]
    means = _resampled_means(gains, clusters, num_resamples, seed)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return Difference(
        value=sum(gains) / len(gains),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (tail + 1) / (num_resamples + 1)),
        wins=wins,
        losses=losses,
        ties=len(gains) - wins - losses,
    )


def minimal_detectable_effect(
    stderr: float, *, confidence: float = CONFIDENCE, power: float = POWER
) -> float:
    """The least true difference found significant with this power (arXiv:2411.00640, eq. 9).

    ``stderr``: of the paired difference.
    """
    return (z_value(confidence) + NormalDist().inv_cdf(power)) * stderr


def holm(p_values: Iterable[float | None]) -> list[float | None]:
    """p-values corrected for their number, in the same order (Holm, Scand. J. Stat. 6, 1979).

    The chance that any of the comparisons called significant is a false alarm stays below the
    level. None, where there was nothing to test, stays None and does not count.
    """
    given = list(p_values)
    tested = sorted((value, index) for index, value in enumerate(given) if value is not None)
    corrected: list[float | None] = [None] * len(given)
    largest = 0.0
    for rank, (value, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * value))
        corrected[index] = largest
    return corrected


def paired_clusters(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]
) -> Difference:
    """Second's mean minus first's where questions come in clusters; see ``clustered_mean``."""
    gains = [after - before for before, after in zip(first, second, strict=True)]
    estimate = clustered_mean(gains, clusters)
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return Difference(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        p_value=_normal_p_value(estimate.value, estimate.stderr),
        wins=wins,
        losses=losses,
        ties=len(gains) - wins - losses,
    )


def macro_difference(differences: Sequence[Difference]) -> Difference:
    """The mean of several tasks' differences, each task counting the same; bounds as in MOVER."""
    k = len(differences)
    value = sum(item.value for item in differences) / k
    lows = [item.value - item.low for item in differences if item.low is not None]
    highs = [item.high - item.value for item in differences if item.high is not None]
    low = high = p_value = None
    if len(lows) == k and len(highs) == k:
        # An interval of Agresti and Min may end short of the plain difference when nearly all
        # questions changed sides; a negative distance is then none.
        low = value - math.hypot(*(max(0.0, distance) for distance in lows)) / k
        high = value + math.hypot(*(max(0.0, distance) for distance in highs)) / k
        p_value = _normal_p_value(value, (high - low) / (2 * z_value()))
    return Difference(
        value,
        low,
        high,
        p_value,
        wins=sum(item.wins for item in differences),
        losses=sum(item.losses for item in differences),
        ties=sum(item.ties for item in differences),
    )


def _normal_p_value(value: float, stderr: float | None) -> float | None:
    if stderr is None:
        return None
    if stderr == 0:
        return 1.0 if value == 0 else 0.0
    return 2 * (1 - NormalDist().cdf(abs(value) / stderr))
