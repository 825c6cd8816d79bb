"""A cheap screen before an exact measurement: predicting signals, finding rows that may be chosen, and the proof (ours).

Three steps on arrays. A linear fit on rows that were measured both ways turns cheap signals into exact ones and leaves
residuals. Drawn residuals make plausible worlds, and a row that is chosen in one of them may be chosen. What the screen
leaves out is then sampled at random and measured, and the number of the sampled rows that are chosen after all bounds the
number of those never measured that an exact pass would choose. The last step does not depend on the first two being right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from gradsift.errors import ConfigError


@dataclass(frozen=True)
class ScreenFit:
    """Least squares from cheap signals to exact ones.

    Args:
        center: float64 [p] means of the cheap signals.
        spread: float64 [p] their standard deviations, 1 for constants.
        coefficients: float64 [p + 1, q], the constant first.
        residual: float64 [n, q] what each row's exact signals differ by from a fit without that row.
    """

    center: Float[np.ndarray, " p"]
    spread: Float[np.ndarray, " p"]
    coefficients: Float[np.ndarray, "c q"]
    residual: Float[np.ndarray, "n q"]

    def predict(self, cheap: Float[np.ndarray, "N p"]) -> Float[np.ndarray, "N q"]:
        """Predict exact signals.

        Args:
            cheap: float64 [N, p].

        Returns:
            float64 [N, q].
        """
        return _design((cheap - self.center) / self.spread) @ self.coefficients


def fit_screen(cheap: Float[np.ndarray, "n p"], exact: Float[np.ndarray, "n q"], *, ridge: float = 1e-3) -> ScreenFit:
    """Fit exact signals to cheap ones on rows that have both, by least squares on standardized columns.

    Args:
        cheap: float64 [n, p], n > p + 1.
        exact: float64 [n, q].
        ridge: penalty on the squared coefficients per row; keeps columns that repeat each other harmless.

    Returns:
        The fit, with the residuals of leaving each row out: r_i / (1 - h_i), h the leverage.

    Raises:
        ConfigError: too few rows.
    """
    n, p = cheap.shape
    if n <= p + 1:
        raise ConfigError(
            "too few rows were measured both ways to fit the screen",
            where="screen.calibrate",
            got=f"{n} rows",
            expected=f"more than {p + 1}, better {5 * (p + 1)}",
            do="raise screen.calibrate, or measure every row exactly (leave --screen out)",
        )
    center = cheap.mean(axis=0)
    spread = cheap.std(axis=0)
    spread = np.where(spread > 1e-12 * np.maximum(1.0, np.abs(center)), spread, 1.0)
    design = _design((cheap - center) / spread)
    penalty = np.diag([0.0] + [ridge * n] * p)
    inverse = np.linalg.inv(design.T @ design + penalty)
    coefficients = inverse @ design.T @ exact
    leverage = np.einsum("ni,ij,nj->n", design, inverse, design)
    residual = (exact - design @ coefficients) / np.maximum(1 - leverage, 1e-3)[:, None]
    return ScreenFit(center, spread, coefficients, residual)


def _design(standard: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n c"]:
    return np.concatenate([np.ones((len(standard), 1)), standard], axis=1)


@dataclass(frozen=True)
class Possible:
    """Rows that may be chosen.

    Args:
        rows: those chosen in at least one world.
        num_worlds: worlds that were drawn.
        unseen: Good-Turing estimate of the share of a further world's choice that is not among ``rows``.
    """

    rows: frozenset[Hashable]
    num_worlds: int
    unseen: float


def possible_rows(choose: Callable[[int], Set[Hashable]], *, miss: float, least: int = 20, most: int = 200) -> Possible:
    """Collect what is chosen in plausible worlds until a further world would bring little that is new.

    The share of the next world's choice that none has chosen before is estimated by Good and Turing (Good 1953): rows
    chosen exactly once over all choices made. It needs the worlds to be exchangeable draws.

    Args:
        choose: number of a world, from 0 -> what is chosen there; not empty.
        miss: stop at this estimate, in (0, 1).
        least: worlds before that.
        most: worlds at most.

    Returns:
        The union, and the estimate at the end, which exceeds ``miss`` where ``most`` was reached.
    """
    counts: Counter[Hashable] = Counter()
    total, number, unseen = 0, 0, 1.0
    while number < most and (number < least or unseen > miss):
        found = choose(number)
        counts.update(found)
        total += len(found)
        number += 1
        unseen = sum(count == 1 for count in counts.values()) / max(1, total)
    return Possible(frozenset(counts), number, unseen)


@dataclass(frozen=True)
class ScreenCertificate:
    """How many of the rows that an exact pass over everything would choose were never measured.

    Args:
        num_out: rows that the screen left out, the sampled ones included.
        num_drawn: rows sampled among them at random and measured exactly.
        num_found: of these, the rows that were chosen in the end.
        num_chosen: rows chosen in the end.
        likely: estimate of the rows never measured that an exact pass would choose.
        high: upper bound on them; the interval begins at 0.
        confidence: of the bound, in (0, 1).
    """

    num_out: int
    num_drawn: int
    num_found: int
    num_chosen: int
    likely: int
    high: int
    confidence: float

    @property
    def estimate(self) -> float:
        """Estimated share of the rows that an exact pass would choose that were never measured, in [0, 1]."""
        return self.likely / self.num_chosen if self.num_chosen else 0.0

    @property
    def high_share(self) -> float:
        """Upper bound on that share, in [0, 1]."""
        return self.high / self.num_chosen if self.num_chosen else 0.0


def certify_screen(
    num_out: int, num_drawn: int, places: Sequence[int], num_chosen: int, confidence: float = 0.95
) -> ScreenCertificate:
    """Bound what a screen has lost, exactly, by the hypergeometric distribution.

    Let E be the k rows that the method chooses when every row is measured exactly, and let n of the N rows that the screen left
    out be drawn and measured. If m rows of E were never measured, the other k - m are the best k - m of the rows chosen in the
    end, and z(m) of the drawn rows are among these. E then has m + z(m) rows among the N, and if the draw is a simple random
    sample the number of them in it is hypergeometric: an m with P(at most z(m) | m + z(m) of N) <= 1 - confidence is excluded.
    The bound is the largest m that is not. It assumes
    (1) the sample is drawn at random from what was left out, after the screen has decided and by nothing that the rows
        say; a sample of the screen's own favorites or of its surest rejects makes it worthless;
    (2) the method ranks rows one by one: of the rows with exact signals it takes those of E first, and fills up with the next
        best. It is exact where a row's score depends on that row alone, and an approximation where prices tie them together;
    (3) the exact pass would choose as many rows as were chosen, true of budgets in rows.
    Nothing is assumed of how good the screen is, or of the distribution of its errors.

    Args:
        num_out: N, rows left out, those of the sample included.
        num_drawn: n, rows of the sample, at most N.
        places: places, from 0 for the best, that rows of the sample have among the rows chosen in the end.
        num_chosen: k, rows chosen in the end.
        confidence: of the bound.

    Returns:
        Estimate and bound of the rows of E among the N - n that were never measured.

    Raises:
        ValueError: the counts contradict one another (our own mistake).
    """
    at = np.sort(np.asarray(places, dtype=np.int64))
    found = len(at)
    inside = found == 0 or (at[0] >= 0 and at[-1] < num_chosen and len(np.unique(at)) == found)
    if not (found <= num_drawn <= num_out and inside and 0 < confidence < 1):
        raise ValueError(f"impossible counts {num_out, num_drawn, found, num_chosen}, confidence {confidence}")
    unmeasured = num_out - num_drawn
    lost = np.arange(min(unmeasured, num_chosen) + 1)  # m
    among = np.searchsorted(at, num_chosen - lost)  # z(m)
    few = stats.hypergeom.cdf(among, num_out, lost + among, num_drawn) if num_out else np.ones(len(lost))
    high = int(lost[few > 1 - confidence].max(initial=0))
    likely = int(lost[among * unmeasured <= lost * max(1, num_drawn)].min(initial=lost[-1])) if num_drawn else high
    return ScreenCertificate(num_out, num_drawn, found, num_chosen, likely, high, confidence)
