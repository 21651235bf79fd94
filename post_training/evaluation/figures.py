"""Figures and their 95 % intervals from counts and values. Pure: no torch, no files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from post_training.run.results import Figure

Z = 1.96
"""Half the width of a 95 % interval, in standard errors."""


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ------------------------------------------------------------------------------------------- intervals


def wilson_interval(successes: float, trials: float, z: float = Z) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927): for z=1.96, 95 %.

    centre = (p + z^2/2n) / (1 + z^2/n), half width = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)
    """
    p, z2 = successes / trials, z * z
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(hits: Sequence[bool]) -> Figure:
    """The share that is true, with Wilson's interval."""
    low, high = wilson_interval(sum(hits), len(hits))
    return Figure(sum(hits) / len(hits), low, high, len(hits))


def average(values: Sequence[float]) -> Figure:
    """The mean, with the normal interval, mean +- 1.96 s / sqrt(n); none from one value."""
    n, centre = len(values), mean(values)
    if n < 2:
        return Figure(centre, count=n)
    half = Z * math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1) / n)
    return Figure(centre, centre - half, centre + half, n)


def ratio(totals: Sequence[float], counts: Sequence[float]) -> Figure:
    """sum(totals) / sum(counts), as a mean per token over texts of many lengths, with the ratio estimator's interval.

    The texts are the sample. By the delta method (Cochran 1977, Sampling Techniques, ch. 6)
    var(R) = n / (n - 1) * sum (t_i - R c_i)^2 / (sum c_i)^2. Texts that count nothing are left out. Raises ValueError
    where none is left.
    """
    kept = [(t, c) for t, c in zip(totals, counts, strict=True) if c]
    if not kept:
        raise ValueError("nothing was counted")
    n, whole = len(kept), math.fsum(c for _, c in kept)
    value = math.fsum(t for t, _ in kept) / whole
    if n < 2:
        return Figure(value, count=n)
    half = Z * math.sqrt(n / (n - 1) * math.fsum((t - value * c) ** 2 for t, c in kept)) / whole
    return Figure(value, value - half, value + half, n)


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> Figure:
    """exp of the mean negative log-likelihood of all texts' tokens together; the interval's ends too are exp of it.

    nll: of each text, nats; tokens: predicted ones of each text. At most e^50. Raises ValueError without a token.
    """
    found = ratio(nll, tokens)
    value, low, high = (None if x is None else math.exp(min(x, 50.0)) for x in (found.value, found.low, found.high))
    assert value is not None
    return Figure(value, low, high, found.count)


# --------------------------------------------------------------------------------------- sampled answers


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from `right` of `samples`.

    1 - C(samples - right, k) / C(samples, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def powers_of_two(up_to: int) -> list[int]:
    """1, 2, 4, ... up to `up_to`."""
    return [1 << i for i in range(up_to.bit_length())]


def pass_figure(right: Sequence[int], samples: int, k: int) -> Figure:
    """pass@k over problems, of each of which `right` of `samples` answers are right, with an interval over problems.

    Wilson's interval with the problems' own variance v in place of p(1-p), that is for n p(1-p) / v trials. Those are
    never fewer than the problems nor more than all samples. For k = samples, or one sample, it is Wilson's.
    """
    values = [pass_at_k(samples, r, k) for r in right]
    n, p = len(values), mean(values)
    variance = mean([(v - p) ** 2 for v in values])
    most = n * samples
    trials = most if variance == 0 and 0 < p < 1 else n if variance == 0 else n * p * (1 - p) / variance
    low, high = wilson_interval(p * trials, trials) if trials <= most else wilson_interval(p * most, most)
    return Figure(p, low, high, n)


def majority(votes: Sequence[Hashable | None]) -> Hashable | None:
    """The most frequent vote (self-consistency, arXiv:2203.11171); of equals the earliest. None votes for nothing."""
    counted = Counter(v for v in votes if v is not None)
    return counted.most_common(1)[0][0] if counted else None  # a Counter keeps the order of first votes


# ---------------------------------------------------------------------------------------------- the text


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that occurred in it before: 0 where none repeats."""
    grams = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams in all texts, of all their n-grams (Li et al. 2016, arXiv:1510.03055); None without any."""
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


# ------------------------------------------------------------------------------------------ reward models


def calibration(margins: Sequence[float], bins: int = 10) -> dict[str, float]:
    """How well sigmoid(margin), a Bradley-Terry model's probability that the chosen answer is the better one, is met.

    margins: reward(chosen) - reward(rejected), [pairs]. `brier`: mean of (1 - sigmoid(margin))^2 (Brier 1950).
    `calibration_error`: expected calibration error (Guo 2017), the mean over pairs of |accuracy - confidence| of the
    pair's bin. Confidence is sigmoid(|margin|), that of the answer which the model prefers, in equal bins of 0.5 to 1;
    a margin of 0 is half right.
    """
    confident = [_sigmoid(abs(m)) for m in margins]
    right = [0.5 if m == 0 else float(m > 0) for m in margins]
    gaps = [0.0] * bins
    for confidence, ok in zip(confident, right, strict=True):
        gaps[min(int((confidence - 0.5) * 2 * bins), bins - 1)] += ok - confidence
    return {
        "brier": mean([(1 - _sigmoid(m)) ** 2 for m in margins]),
        "calibration_error": sum(map(abs, gaps)) / len(margins),
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
