"""From the fractional optimum to whole rows: round the split rows, swap, fill (ours).

At most M + 1 rows are split, so all their subsets are tried. Where none fits, every allowance is tightened by one row's
spread and the program solved again. Then single swaps near the cut are taken while they gain, and under a token budget
rows that still fit are added. A swap that keeps the constraints gains at most lambda'slack - (s_out - s_in), so only
rows near the cut can gain. Every choice carries the ratio of its distance from flipping to the error of its numbers.
N rows, M anchors.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import InfeasibleError
from gradsift.geometry.dual import WHOLE, DualSolution, solve_dual
from gradsift.geometry.feasible import NoChoiceError
from gradsift.geometry.program import Program
from gradsift.geometry.stability import stability

WINDOW = 200
TIGHTENINGS = 5


@dataclass(frozen=True)
class WholeChoice:
    """Whole rows that meet every allowance.

    Args:
        chosen: bool [N].
        base: the fractional solution that was rounded (of the tightened program where it was tightened), its weights
            dealt to equal rows as the choice is.
        value: gain of the rows.
        slack: float64 [M] against the allowances asked for, >= 0 up to rounding of sums.
        added: rows added because they still fitted the budget.
        num_swaps: swaps made.
        num_tightened: times the allowances were tightened before a rounding fitted.
        num_repaired: swaps that were needed because no rounding fitted.
        ratio: least distance over error bound of all decisions; above 1 the choice is certain.
        movable: bool [N], rows outside of which no error within the bounds changes the choice; none when it is certain.
    """

    chosen: Bool[np.ndarray, " N"]
    base: DualSolution
    value: float
    slack: Float[np.ndarray, " M"]
    added: Int[np.ndarray, " a"]
    num_swaps: int
    num_tightened: int
    num_repaired: int
    ratio: float
    movable: Bool[np.ndarray, " N"]


@dataclass
class _Work:
    """The choice in the making."""

    program: Program
    noise: Float[np.ndarray, " N"]
    allowance_noise: float
    chosen: Bool[np.ndarray, " N"]
    ratio: float = np.inf
    least_start: float = -np.inf  # gain of a rounding that fits whatever the errors

    @property
    def slack(self) -> Float[np.ndarray, " M"]:
        """Slack of the rows chosen so far plus the tolerance of long sums; [M], 0 and above is feasible."""
        program = self.program
        return program.dots[self.chosen].sum(axis=0) + program.allowance + program.tolerance

    @property
    def left(self) -> float:
        """Budget not yet used."""
        return self.program.total - float(self.program.cost[self.chosen].sum())

    @property
    def slack_noise(self) -> float:
        """Error bound of a slack."""
        return float(self.noise[self.chosen].sum()) + self.allowance_noise

    def note(self, ratio: float) -> None:
        """Remember a decision's ratio."""
        self.ratio = min(self.ratio, ratio)


def round_whole(
    program: Program, solution: DualSolution, noise: Float[np.ndarray, " N"], allowance_noise: float = 0.0
) -> WholeChoice:
    """Turn the fractional optimum into whole rows (ogs_dual's rounding).

    Args:
        program: the program with the allowances asked for.
        solution: its solution.
        noise: float64 [N] error bound of every dot of row i; zeros when exact.
        allowance_noise: error bound of the allowances.

    Returns:
        The rows; they meet every allowance and the budget. Where a fractional choice exists but no whole one was found
        the program is refused (InfeasibleError).
    """
    base, tightened, best = solution, program, solution
    work = _Work(program, noise, allowance_noise, np.zeros(len(noise), dtype=bool))
    repaired, num_tightened = 0, 0
    while not _round_split(work, base):
        if num_tightened == 0:
            best = base
        if num_tightened == TIGHTENINGS:
            base, repaired = best, _repair(work, best)
            break
        num_tightened += 1
        tightened = dataclasses.replace(tightened, allowance=tightened.allowance - tightened.dots.std(axis=0))
        try:
            base = solve_dual(tightened)
        except NoChoiceError:
            base, repaired = best, _repair(work, best)
            break
    num_swaps, added = 0, np.zeros(len(noise), dtype=bool)
    while True:
        added[_fill(work, base)] = True
        swaps = _swap(work, base)
        num_swaps += swaps
        if not swaps:
            break
    place = _smaller_index_first(work, base.w)
    work.chosen, added = work.chosen[place], added[place]
    return WholeChoice(
        chosen=work.chosen,
        base=dataclasses.replace(base, w=base.w[place]),
        value=float(program.gain[work.chosen].sum()),
        slack=program.dots[work.chosen].sum(axis=0) + program.allowance,
        added=np.flatnonzero(added & work.chosen),
        num_swaps=num_swaps,
        num_tightened=num_tightened,
        num_repaired=repaired,
        ratio=work.ratio,
        movable=_movable(work, solution),
    )


def _pick(
    work: _Work,
    gain: Float[np.ndarray, " n"],
    gain_noise: Float[np.ndarray, " n"],
    slack: Float[np.ndarray, " n"],
    slack_noise: Float[np.ndarray, " n"],
    floor: float = -np.inf,
) -> int:
    """Index of the largest gain above the floor with slack >= 0, or -1; the first among equals. Notes its ratio."""
    if not len(gain):
        return -1
    allowed = (slack >= 0) & (gain > floor)
    best = int(np.argmax(np.where(allowed, gain, -np.inf))) if allowed.any() else -1
    if not work.noise.any() and not work.allowance_noise:
        return best
    top, top_noise = (float(gain[best]), float(gain_noise[best])) if best >= 0 else (floor, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.nan_to_num((top - gain) / (gain_noise + top_noise), nan=0.0, posinf=np.inf, neginf=-np.inf)
        outside = np.nan_to_num(-slack / slack_noise, nan=0.0, posinf=np.inf, neginf=-np.inf)
        ratio = np.maximum(np.maximum(below, outside), 0.0)
        if best >= 0:
            above = (top - floor) / top_noise if top_noise > 0 else np.inf
            ratio[best] = max(0.0, min(above, float(slack[best] / slack_noise[best])))
    work.note(float(ratio.min()))
    return best


def _round_split(work: _Work, base: DualSolution) -> bool:
    """Take the best subset of the split rows that fits budget and allowances; False when none does."""
    program = work.program
    state = stability(program, base, work.noise, work.allowance_noise)
    work.note(state.ratio)
    work.chosen = base.w > 1 - WHOLE
    split = np.flatnonzero((base.w > WHOLE) & (base.w < 1 - WHOLE))
    subsets = np.array(list(itertools.product((1.0, 0.0), repeat=len(split)))).reshape(2 ** len(split), len(split))
    used = subsets @ program.cost[split]
    fits = used <= work.left + 1e-9
    if program.by_rows and program.fill == "full":
        fits &= used >= work.left - 1e-9
    subsets = subsets[fits]
    slack = (work.slack + subsets @ program.dots[split]).min(axis=1, initial=np.inf)
    slack_noise = work.slack_noise + subsets @ work.noise[split]
    certain = slack > slack_noise
    if state.ratio > 1 and certain.any():
        start = float(program.gain[work.chosen].sum())
        work.least_start = start + float((subsets[certain] @ program.gain[split]).max())
    best = _pick(
        work,
        subsets @ program.gain[split],
        subsets @ work.noise[split],
        slack,
        slack_noise,
    )
    if best >= 0:
        work.chosen[split[subsets[best] > 0]] = True
    return best >= 0


def _window(work: _Work, base: DualSolution) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """The kept rows of least and the dropped rows of largest reduced score, at most 200 each."""
    program = work.program
    reduced = program.score(base.prices) - base.threshold * program.cost
    sides = []
    for rows, sign in ((np.flatnonzero(work.chosen), 1.0), (np.flatnonzero(~work.chosen), -1.0)):
        ordered = rows[np.lexsort((rows, sign * reduced[rows]))]
        sides.append(ordered[:WINDOW])
        if len(ordered) > WINDOW and work.noise.any():
            inside, outside = ordered[WINDOW - 1], ordered[WINDOW]
            reach = float(base.prices @ np.maximum(0.0, work.slack + work.slack_noise))
            if sign * reduced[outside] <= reach:  # rows past the window could still gain: its edge is a decision
                noise = 2 * work.noise[[inside, outside]].sum() * (1 + base.prices.sum())
                work.note(abs(reduced[outside] - reduced[inside]) / noise)
    return sides[0], sides[1]


def _swap(work: _Work, base: DualSolution) -> int:
    """Swap one kept for one dropped row, the largest gain first, until no swap gains; return their number."""
    program, swaps = work.program, 0
    floor = 1e-12 * max(1e-300, float(np.abs(program.gain).max()))
    out, into = _window(work, base)
    while len(out) and len(into):
        gain = program.gain[into][None] - program.gain[out][:, None]
        slack = (work.slack + program.dots[into][None] - program.dots[out][:, None]).min(axis=2, initial=np.inf)
        fits = (program.cost[into][None] - program.cost[out][:, None] <= work.left + 1e-9).ravel()
        pairs = np.stack(np.broadcast_arrays(out[:, None], into[None]), axis=-1).reshape(-1, 2)
        noise = work.noise[pairs]
        best = _pick(
            work,
            gain.ravel()[fits],
            noise.sum(axis=1)[fits],
            slack.ravel()[fits],
            (work.slack_noise + noise[:, 1])[fits],
            floor,
        )
        if best < 0:
            return swaps
        a, b = pairs[fits][best]
        work.chosen[a], work.chosen[b] = False, True
        out[out == a], into[into == b] = b, a
        swaps += 1
    return swaps


def _fill(work: _Work, base: DualSolution) -> list[int]:
    """Add rows that fit what is left: by score when the budget is to be used up, else only those that gain."""
    program, added = work.program, []
    full = program.fill == "full"
    value = program.score(base.prices) / program.cost if full else program.gain
    noise = work.noise * (1 + base.prices.sum()) / program.cost if full else work.noise
    while True:
        rows = np.flatnonzero(~work.chosen & (program.cost <= work.left + 1e-9))
        slack = (work.slack + program.dots[rows]).min(axis=1, initial=np.inf)
        slack_noise = work.slack_noise + work.noise[rows]
        floor = -np.inf if full else 0.0
        best = _pick(work, value[rows], noise[rows], slack, slack_noise, floor)
        if best < 0:
            return added
        work.chosen[rows[best]] = True
        added.append(int(rows[best]))


def _repair(work: _Work, base: DualSolution) -> int:
    """No rounding fits: from the nearest one, make the swaps that help the worst anchor most until all are met."""
    program, swaps = work.program, 0
    work.chosen = base.w > 1 - WHOLE
    split = np.flatnonzero((base.w > WHOLE) & (base.w < 1 - WHOLE))
    for row in split[np.argsort(-base.w[split], kind="stable")]:
        if program.cost[row] <= work.left + 1e-9:
            work.chosen[row] = True
    work.note(0.0)
    while (worst := float((work.slack / program.units).min(initial=0.0))) < 0:
        anchor = int(np.argmin(work.slack / program.units))
        r = program.dots[:, anchor]
        kept, dropped = np.flatnonzero(work.chosen), np.flatnonzero(~work.chosen)
        out = kept[np.argsort(r[kept], kind="stable")[:WINDOW]]
        into = dropped[np.argsort(-r[dropped], kind="stable")[:WINDOW]]
        change = program.dots[into][None] - program.dots[out][:, None]
        after = ((work.slack + change) / program.units).min(axis=2, initial=np.inf)
        after[program.cost[into][None] - program.cost[out][:, None] > work.left + 1e-9] = -np.inf
        if not after.size or after.max() <= worst:
            raise _no_whole_choice(work)
        gain = program.gain[into][None] - program.gain[out][:, None]
        good = after >= min(0.0, float(after.max()))
        a, b = np.unravel_index(int(np.argmax(np.where(good, gain, -np.inf))), gain.shape)
        work.chosen[out[a]], work.chosen[into[b]] = False, True
        swaps += 1
    return swaps


def _no_whole_choice(work: _Work) -> InfeasibleError:
    short = {n: -s for n, s in zip(work.program.names, work.slack, strict=True) if s < 0}
    text = ", ".join(f"{name} by {value:.4g}" for name, value in short.items())
    return InfeasibleError(
        "rows can be split so that every anchor keeps its allowance, but no choice of whole rows was found",
        where="the anchors " + ", ".join(work.program.names),
        got=f"the nearest choice falls short of {text}",
        expected="no shortfall",
        do=f"raise the allowance (--set eps=...) by {max(short.values()):.4g} or change the budget by a few rows",
    )


def _movable(work: _Work, solution: DualSolution) -> Bool[np.ndarray, " N"]:
    """Rows that an error within the bounds could exchange.

    While the vertex is certain and some rounding fits whatever the errors, every choice that could be reached gains at
    least as much as that rounding. A choice whose gain is G below the dual bound differs from the cut only in rows
    whose score is at most G away from it. Otherwise nothing is known, and every row is listed.
    """
    if work.ratio > 1:
        return np.zeros(len(work.chosen), dtype=bool)
    program = work.program
    state = stability(program, solution, work.noise, work.allowance_noise)
    if state.ratio <= 1 or not np.isfinite(work.least_start):
        return np.ones(len(work.chosen), dtype=bool)
    reach = solution.upper_bound - work.least_start + float(solution.prices.sum()) * work.slack_noise
    reach += 2 * (solution.num_fractional + 2) * float(state.score_noise.max())
    reduced = program.score(solution.prices) - solution.threshold * program.cost
    return np.abs(reduced) <= reach + state.score_noise


def _smaller_index_first(work: _Work, weights: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """For every row the row whose part it takes: of rows with equal numbers those of smaller index are the chosen ones."""
    program = work.program
    table = np.column_stack([program.gain, program.dots, program.cost])
    order = np.lexsort((np.arange(len(table)), *table.T))
    fresh = np.append(True, (table[order][1:] != table[order][:-1]).any(axis=1))
    group = np.cumsum(fresh) - 1
    place = np.empty(len(order), dtype=np.int64)
    place[order] = order[np.lexsort((-weights[order], ~work.chosen[order], group))]
    return place
