"""ogs_rounds: the set-level choice solved anew each round, on signals rescored at the weights training has reached (ours).

After OGS (arXiv 2602.06359), whose policy also chooses batch after batch; here the linear program of ``ogs_dual`` takes the
policy's place. A converged anchor says little at the starting weights and much once something is being lost
(trials.md, section 13).

Algorithm, for round r = 1..R with T/R steps and B/R rows each:
  1  signals of the rows not yet chosen at the current weights; mean loss of every anchor
  2  rise_m = max(0, anchor loss now - anchor loss at the start); demand tau_m = min(tau_max, tau_per_nat * rise_m)
  3  ogs_dual in cosines with sum_i w_i cos_im >= k tau_m; a demand that no choice meets is halved until one does, and counted
  4  train on all rows chosen so far, with the replay so far (training on the new rows alone forgot the earlier rounds'
     rows: on two development seeds of the arithmetic world its hypervolume was below that of random)

Departures from the paper: no learned policy; demand follows the measured loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradsift.errors import ConfigError, InfeasibleError
from gradsift.methods.base import make_method
from gradsift.seeds import Stream, stream
from gradsift.train.loop import Loop
from gradsift.train.masking import measure_nats
from gradsift.train.parts import Cost
from gradsift.train.plan import plan_steps
from gradsift.train.rescore import RescoreConfig, rescore, restrict
from gradsift.types import Budget, Problem, Selection, TokenRow

HALVINGS = 6


@dataclass(frozen=True)
class RoundsConfig:
    """Settings of the method.

    Args:
        num_rounds: R.
        scale: how rows count in the program, as in ``ogs_dual``.
        tau_per_nat: demanded mean cosine with an anchor per nat that its loss has risen.
        tau_max: largest demand.
    """

    num_rounds: int = 6
    scale: str = "unit"
    tau_per_nat: float = 0.05
    tau_max: float = 0.2

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ConfigError("a count is out of range", where="num_rounds", got=self.num_rounds, expected=">= 1")
        for name in ("tau_per_nat", "tau_max"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(
                    "a demand is out of range", where=name, got=getattr(self, name), expected="finite and at least 0"
                )


@dataclass(frozen=True)
class Board:
    """What rounds are played on.

    Args:
        pool: candidate rows.
        anchors: rows of each protected source.
        target: rows of what is to be learned.
        replay: general rows that are mixed into each round; drawn in the order given.
        copy_of: row id -> id of its first exact copy.
        pad_id: padding token.
        rescoring: how signals are measured.
        seed: of data orders.
    """

    pool: Sequence[TokenRow]
    anchors: Mapping[str, Sequence[TokenRow]]
    target: Sequence[TokenRow]
    replay: Sequence[TokenRow]
    copy_of: Mapping[str, str]
    pad_id: int
    rescoring: RescoreConfig
    seed: int


@dataclass(frozen=True)
class Round:
    """What one round did.

    Args:
        ids: rows chosen in it.
        rise: anchor -> nats its loss has risen since the start, when the round began.
        demand: anchor -> demanded mean cosine, after halving.
        prices: anchor -> price in the program.
        num_halved: how often the demand was halved because no choice met it.
    """

    ids: tuple[str, ...]
    rise: Mapping[str, float]
    demand: Mapping[str, float]
    prices: Mapping[str, float]
    num_halved: int


@dataclass(frozen=True)
class Played:
    """A finished run in rounds.

    Args:
        rounds: one by one.
        cost: of rescoring; training is in the loop's own cost.
    """

    rounds: tuple[Round, ...]
    cost: Cost

    @property
    def ids(self) -> tuple[str, ...]:
        """All rows chosen, in order."""
        return tuple(i for r in self.rounds for i in r.ids)


def play_rounds(
    loop: Loop,
    board: Board,
    config: RoundsConfig,
    *,
    num_rows: int,
    num_steps: int,
    batch_size: int,
    draw: Stream,
    tick: Callable[[int], None] = lambda n: None,
) -> Played:
    """Choose and train in turn.

    Args:
        loop: the model in training.
        board: rows.
        config: settings.
        num_rows: pool rows over all rounds.
        num_steps: optimizer steps over all rounds.
        batch_size: rows per step.
        draw: handed to the method, which draws nothing.
        tick: told the rounds done.

    Returns:
        The rounds and what rescoring cost; fewer than ``num_rows`` rows are chosen where the pool has no more.

    Raises:
        ConfigError: there are more rounds than rows to choose.
    """
    if num_rows < config.num_rounds:
        raise ConfigError(
            "there are more rounds than rows to choose",
            where="ogs_rounds",
            got=f"{config.num_rounds} rounds, {num_rows} rows",
            expected="at least one row per round",
            do="lower num_rounds or raise the budget",
        )
    rows = {row.id: row for row in (*board.pool, *board.replay)}
    left = {row.id for row in board.pool}
    start, cost = _anchor_losses(loop, board)
    done: list[Round] = []
    for r in range(config.num_rounds):
        count = _share(num_rows, config.num_rounds, r)
        steps = _share(num_steps, config.num_rounds, r)
        scored = rescore(
            loop.model,
            board.pool,
            board.anchors,
            board.target,
            board.rescoring,
            pad_id=board.pad_id,
            copy_of=board.copy_of,
        )
        now, spent = _anchor_losses(loop, board)
        cost += scored.cost + spent
        rise = {name: max(0.0, now[name] - start[name]) for name in start}
        problem = restrict(scored.problem, sorted(left))
        if problem.size:
            done.append(_choose(problem, rise, config, min(count, problem.size), draw))
        else:  # the pool is used up: train on with what there is
            done.append(Round((), rise, {}, {}, 0))
        left -= set(done[-1].ids)
        general = board.replay[: len(board.replay) * (r + 1) // config.num_rounds]
        mixed = [*(i for one in done for i in one.ids), *(row.id for row in general)]
        plan = plan_steps(mixed, batch_size=batch_size, num_steps=steps, stream=stream(board.seed, f"train/rounds/{r}"))
        loop.run(plan.steps, rows.__getitem__, {})
        tick(r + 1)
    return Played(tuple(done), cost)


def _share(total: int, parts: int, k: int) -> int:
    """The k-th of ``parts`` nearly equal parts of ``total``."""
    return total * (k + 1) // parts - total * k // parts


def _anchor_losses(loop: Loop, board: Board) -> tuple[dict[str, float], Cost]:
    losses, cost = {}, Cost()
    for name, rows in board.anchors.items():
        nats = measure_nats(loop.model, rows, board.pad_id, board.rescoring.tokens_per_batch)
        losses[name] = float(np.mean([nats.nats[row.id].sum() / row.num_trained for row in rows]))
        cost += nats.cost
    return losses, cost


def _choose(problem: Problem, rise: Mapping[str, float], config: RoundsConfig, count: int, draw: Stream) -> Round:
    names = [a.name for a in problem.anchors]
    demand = {name: min(config.tau_max, config.tau_per_nat * rise[name]) for name in names}
    for halved in range(HALVINGS + 2):
        tau = demand if halved <= HALVINGS else dict.fromkeys(names, -1.0)  # at last: no demand at all
        # The program demands -eps in units of summed cosines; row_scale makes them cosines for scale "unit".
        eps = {name: -count * value for name, value in tau.items()}
        method = make_method("ogs_dual", {"scale": config.scale, "eps": eps, "order": "score"})
        try:
            chosen: Selection = method.select(problem, Budget(rows=count), draw)
        except InfeasibleError:
            demand = {name: value / 2 for name, value in demand.items()}
            continue
        prices = dict(chosen.certificate.prices) if chosen.certificate else {}
        return Round(tuple(chosen.ids), rise, tau, prices, halved)
    raise AssertionError("a program without demand has a solution")
