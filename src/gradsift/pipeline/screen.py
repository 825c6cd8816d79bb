"""Two stages: a cheap pass over every row, then an exact one over the rows that may be chosen (ours).

    1  measure every row cheaply: with prompts held constant and dots by folded factors, or by the upper layers only
    2  measure ``screen.calibrate`` rows drawn at random exactly too; fit the exact signals to the cheap ones
    3  draw residuals of the fit onto the other rows: plausible worlds. The method chooses in each; a row that is chosen in one
       of them may be chosen
    4  of the rows left out, draw ``screen.certify`` at random; measure these and the rows of step 3 exactly
    5  the method chooses among the rows with exact signals; how many of those drawn in step 4 it takes bounds what was lost

Rows without exact signals cannot be chosen: they have the status SCREENED_OUT. The proof is
:func:`gradsift.geometry.screen.certify_screen`, with its assumptions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gradsift.data.token_rows import TokenRows
from gradsift.errors import InfeasibleError
from gradsift.evaluate.ranks import spearman_interval
from gradsift.geometry.screen import (
    Possible,
    ScreenCertificate,
    ScreenFit,
    certify_screen,
    fit_screen,
    possible_rows,
)
from gradsift.gradients.taps import PARTS
from gradsift.methods.taking import resolve_budget
from gradsift.pipeline.measure import Measurement, Part, measure, refuse_weak
from gradsift.pipeline.pass_cost import cheap_collect, refuse_small
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.problem import build_problem
from gradsift.pipeline.progress import Clock
from gradsift.seeds import stream
from gradsift.types import Budget, Note, Problem, RowStatus, Selection, TokenRow

SIGNALS = "screen"  # folder of the screen's store in the run folder
PLAIN_RIDGE, RIDGE = 1e-3, 1e-2  # of the fit; parts of a row's gradient repeat one another
PER_COLUMN = 2.5  # calibration rows that a column of the parts must have, or the parts are left out


@dataclass(frozen=True)
class Screened:
    """What the two stages left.

    Args:
        prepared: the run's inputs; rows without exact signals have the status SCREENED_OUT.
        measured: the exact signals.
        budget: the budget in rows or tokens of the whole pool.
        drawn: ids of the rows left out by the screen that were drawn and measured exactly.
        num_out: rows left out by the screen, those included.
        facts: rows, costs and ranks of the stages, as plain JSON values.
    """

    prepared: Prepared
    measured: Measurement
    budget: Budget
    drawn: frozenset[str]
    num_out: int
    facts: Mapping[str, Any]

    def certificate(self, selection: Selection) -> ScreenCertificate:
        """Bound what the screen has lost.

        Args:
            selection: the choice among the rows with exact signals.

        Returns:
            The certificate.
        """
        rank = dict(zip(selection.problem_ids, selection.rank.tolist(), strict=True))
        best_first = sorted(selection.ids, key=lambda row: rank[row])
        places = [place for place, row in enumerate(best_first) if row in self.drawn]
        confidence = self.prepared.recipe.screen.confidence
        return certify_screen(self.num_out, len(self.drawn), places, len(best_first), confidence)

    def note(self, selection: Selection) -> Note:
        """Say what was screened out and what that may have cost.

        Args:
            selection: the choice.

        Returns:
            A note that counts the rows without exact signals.
        """
        proof, rows, seconds = self.certificate(selection), self.facts["rows"], self.facts["seconds"]
        text = (
            f"a screen by {self.facts['by']} left {rows['out'] - rows['certify']} of {rows['eligible']} rows without "
            f"exact signals; with {proof.confidence:.0%} confidence at most {proof.high_share:.1%} of the rows that an exact pass "
            f"would choose are among them ({proof.num_found} of {proof.num_drawn} rows drawn there were chosen); "
            f"screen {seconds['screen']:.1f} s, {rows['exact']} rows exactly {seconds['exact']:.1f} s"
        )
        return Note("screen", text, rows["out"] - rows["certify"])

    def summary(self, selection: Selection) -> dict[str, Any]:
        """Give the manifest's ``screen`` section.

        Args:
            selection: the choice.

        Returns:
            Facts and certificate as plain JSON values.
        """
        proof = self.certificate(selection)
        shares = {"estimate": proof.estimate, "high_share": proof.high_share}
        return {**self.facts, "certificate": {**dataclasses.asdict(proof), **shares}}


def measure_screened(prepared: Prepared, budget: Budget, out: Path, clock: Clock) -> Screened:
    """Run both stages; the same call resumes.

    Args:
        prepared: the run's inputs.
        budget: what was asked.
        out: the run folder; exists.
        clock: timing and progress.

    Returns:
        Inputs and exact signals of the rows that may be chosen.

    Raises:
        ConfigError: the pool is too small for a screen to leave anything out.
    """
    config, seed = prepared.recipe.screen, prepared.recipe.seed
    assert config.by is not None
    cheap_clock, exact_clock = Clock(clock.progress), Clock(clock.progress)
    cheap = measure(_cheaply(prepared, config.by), out, cheap_clock, part=Part(SIGNALS))
    problem = build_problem(prepared, cheap)
    refuse_small(problem.size, config)
    allowance = resolve_budget(problem, budget)
    budget = Budget(rows=allowance.rows, tokens=allowance.tokens)
    calibrate = _draw(problem.ids, config.calibrate, seed, "screen/calibrate")
    exact = measure(prepared, out, exact_clock, part=Part(ids=calibrate))
    refuse_weak(prepared, {d.name: d for d in exact.directions})
    with clock.stage("worlds"):
        known = build_problem(_only(prepared, calibrate, cheap), exact)
        parts = part_signals(problem, cheap, len(calibrate))
        ridge = PLAIN_RIDGE if parts is None else RIDGE
        fit = fit_screen(cheap_signals(problem, known.ids, parts), exact_signals(known), ridge=ridge)
        possible = _possible(prepared, problem, known, fit, budget, parts)
    kept = calibrate | {str(row) for row in possible.rows}
    left = [row for row in problem.ids if row not in kept]
    drawn = _draw(left, config.certify, seed, "screen/certify")
    exact = measure(prepared, out, exact_clock, part=Part(ids=frozenset(kept | drawn)))
    facts = {
        "by": "the trained positions" if cheap.spec.layers is None else f"layers {cheap.spec.layers}",
        "coverage": cheap.coverage.share,
        "parts": 0 if parts is None else parts.shape[1],
        "rows": {"eligible": problem.size, "calibrate": len(calibrate), "possible": len(possible.rows), "out": len(left),
                 "certify": len(drawn), "exact": len(kept | drawn)},
        "worlds": possible.num_worlds,
        "unseen": possible.unseen,
        "ranks": _ranks(problem, known, fit),
        "seconds": {"screen": sum(cheap_clock.seconds.values()), "exact": sum(exact_clock.seconds.values())},
        "tokens": {"screen": dict(cheap_clock.tokens), "exact": dict(exact_clock.tokens)},
    }  # fmt: skip
    for inner in (cheap_clock, exact_clock):
        clock.add(inner)
    return Screened(_only(prepared, kept | drawn, cheap), exact, budget, frozenset(drawn), len(left), facts)


def part_signals(problem: Problem, cheap: Measurement, num_fitted: int) -> Float[np.ndarray, "N k"] | None:
    """Collect what each group of layers adds to a row's signals, where the screen kept groups apart.

    A group's weight in the exact signals is not its weight in the screen's: low layers lose most by a held prompt.

    Args:
        problem: every row with the screen's signals.
        cheap: the screen's measurement.
        num_fitted: rows that the fit is made on.

    Returns:
        float64 [N, k] in the problem's order: each group's dots over the row's norm, and the log of its share of the squared
        norm; None where groups were not kept apart, or are too many for the fit's rows.
    """
    if PARTS not in cheap.spec.extras or problem.grad_norm is None:
        return None
    width = len(cheap.directions) + 1
    found = np.asarray(cheap.store.extra(PARTS, problem.ids), dtype=np.float64).reshape(problem.size, -1, width)
    return part_columns(found, problem.grad_norm, num_fitted)


def part_columns(
    parts: Float[np.ndarray, "N P w"], norm: Float[np.ndarray, " N"], num_fitted: int
) -> Float[np.ndarray, "N k"] | None:
    """Turn groups' dots and squared norms into columns for the fit.

    Args:
        parts: float64 [N, P, M + 1] each group's dots with M directions and its squared norm.
        norm: float64 [N] of the whole.
        num_fitted: rows that the fit is made on.

    Returns:
        float64 [N, P * (M + 1)], see :func:`part_signals`; None where they are too many for the fit's rows.
    """
    if num_fitted < PER_COLUMN * parts[0].size:
        return None
    dots = parts[:, :, :-1] / norm[:, None, None]
    share = np.maximum(parts[:, :, -1] / norm[:, None] ** 2, 1e-12)
    return np.concatenate([dots.reshape(len(norm), -1), np.log(share)], axis=1)


def cheap_signals(
    problem: Problem, ids: Sequence[str], parts: Float[np.ndarray, "N k"] | None = None
) -> Float[np.ndarray, "n p"]:
    """Collect what the screen knows of some rows and the fit reads.

    Args:
        problem: every row with the screen's signals.
        ids: n of its ids.
        parts: what :func:`part_signals` gives of every row.

    Returns:
        float64 [n, p]: cosines with the anchors and the target, logs of norm, head's norm and lengths, and the loss.
    """
    place = {row: i for i, row in enumerate(problem.ids)}
    at = np.array([place[row] for row in ids], dtype=np.int64)
    assert problem.loss is not None
    columns = [exact_signals(problem), problem.loss[:, None], np.log(problem.num_tokens)[:, None],
               np.log(problem.num_trained)[:, None]]  # fmt: skip
    if problem.head_grad_norm is not None:
        columns.append(np.log(np.maximum(problem.head_grad_norm, 1e-12))[:, None])
    columns += [] if parts is None else [parts]
    return np.concatenate(columns, axis=1)[at]


def exact_signals(problem: Problem) -> Float[np.ndarray, "n q"]:
    """Collect what the fit predicts.

    Args:
        problem: rows with signals.

    Returns:
        float64 [n, q]: cosines with the anchors and the target, where there are any, and the log of the norm.
    """
    assert problem.grad_norm is not None
    columns = [] if problem.anchor_cos is None else [problem.anchor_cos]
    columns += [] if problem.target_cos is None else [problem.target_cos[:, None]]
    return np.concatenate([*columns, np.log(problem.grad_norm)[:, None]], axis=1)


def with_signals(problem: Problem, known: Problem, values: Float[np.ndarray, "N q"]) -> Problem:
    """Put predicted signals in the place of the screen's.

    Args:
        problem: every row with the screen's signals.
        known: rows with exact signals, whose directions hold.
        values: float64 [N, q] as from :func:`exact_signals`.

    Returns:
        The problem; cosines are cut to [-1, 1], sketches and the embedding's norms are not there.
    """
    norm, cos = np.exp(values[:, -1]), np.clip(values[:, :-1], -1, 1)
    num = len(known.anchors)
    return dataclasses.replace(
        problem,
        grad_norm=norm,
        anchor_dot=cos[:, :num] * norm[:, None] if num else None,
        target_dot=cos[:, num] * norm if known.target is not None else None,
        anchors=known.anchors,
        target=known.target,
        gram=known.gram,
        direction_sketch=None,
        sketch=None,
        emb_grad_norm=None,
        noise=known.noise,
    )


def _possible(
    prepared: Prepared,
    problem: Problem,
    known: Problem,
    fit: ScreenFit,
    budget: Budget,
    parts: Float[np.ndarray, "N k"] | None,
) -> Possible:
    """Choose in plausible worlds; rows that are known exactly are the same in all of them."""
    recipe, method = prepared.recipe, prepared.method
    predicted = fit.predict(cheap_signals(problem, problem.ids, parts))
    truth = dict(zip(known.ids, exact_signals(known), strict=True))
    at = [i for i, row in enumerate(problem.ids) if row in truth]
    there = np.array([truth[problem.ids[i]] for i in at])

    def choose(number: int) -> Set[str]:
        draws = stream(recipe.seed, f"screen/world/{number}").uniform(problem.ids)
        values = predicted + fit.residual[(draws * len(fit.residual)).astype(np.int64)]
        values[at] = there
        world = with_signals(problem, known, values)
        try:
            return set(method.select(world, budget, stream(recipe.seed, f"select/{method.name}")).ids)
        except InfeasibleError:
            return set()  # a world without a choice has no row that may be chosen

    return possible_rows(choose, miss=recipe.screen.miss)


def _ranks(problem: Problem, known: Problem, fit: ScreenFit) -> dict[str, Any]:
    """Rank correlation of the screen's signals and of the prediction with the exact ones, on the calibration rows."""
    exact, raw = exact_signals(known), cheap_signals(problem, known.ids)
    names = [*(anchor.name for anchor in known.anchors), *(["target"] if known.target is not None else []), "norm"]
    out = {}
    for j, name in enumerate(names):
        pairs = {"screen": raw[:, j], "predicted": exact[:, j] - fit.residual[:, j]}
        out[name] = {key: dataclasses.asdict(spearman_interval(value, exact[:, j])) for key, value in pairs.items()}
    return out


def _draw(ids: Sequence[str], count: int, seed: int, name: str) -> frozenset[str]:
    """Draw rows at random by their ids: a row's draw depends on nothing else."""
    draws = stream(seed, name).uniform(ids)
    return frozenset(ids[int(i)] for i in np.argsort(draws, kind="stable")[:count])


def _cheaply(prepared: Prepared, by: str) -> Prepared:
    recipe = prepared.recipe.model_copy(update={"collect": cheap_collect(prepared, by)})
    return dataclasses.replace(prepared, recipe=recipe)


def _only(prepared: Prepared, ids: Set[str], cheap: Measurement) -> Prepared:
    """Give usable rows without exact signals the status SCREENED_OUT, or the one that the screen's measurement gave them."""
    why = (RowStatus.SCREENED_OUT, "the screen left it out, so its exact signals were not measured")
    store = cheap.store
    failed = {
        row: (status, reason)
        for row, status, reason in zip(store.ids, store.status, store.reason, strict=True)
        if not status.usable
    }

    def told(row: str) -> tuple[RowStatus, str]:
        return failed.get(row, why)

    tokens = prepared.pool.tokens
    if isinstance(tokens, TokenRows):
        out = [(i, told(row.id)) for i, row in enumerate(tokens) if row.status.usable and row.id not in ids]
        tokens = TokenRows(tokens.table.with_statuses({int(tokens.at[i]): new for i, new in out}), tokens.at)
    else:
        tokens = tuple(
            row if row.id in ids or not row.status.usable else _with_status(row, *told(row.id)) for row in tokens
        )
    return dataclasses.replace(prepared, pool=dataclasses.replace(prepared.pool, tokens=tokens))


def _with_status(row: TokenRow, status: RowStatus, reason: str) -> TokenRow:
    return dataclasses.replace(row, status=status, reason=reason)
