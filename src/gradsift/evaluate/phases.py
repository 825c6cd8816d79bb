"""One phase and both: every set under the base model, then under the tuned one, in that order.

The base model is measured before the tuned one is made or loaded, and never through an object that an adapter has been
put on: peft changes a model in place, so the figures "before" would be those after (as happened in peft#3419).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import nn

from gradsift.errors import ConfigError, ModelError
from gradsift.evaluate.benchmarks import BenchResult, run_benchmarks
from gradsift.evaluate.choice import ChoiceResult, EncodedChoices, answer_choices
from gradsift.evaluate.config import LmEvalConfig
from gradsift.evaluate.divergence import RowDivergence, has_adapter, kl_rows, without_adapter
from gradsift.evaluate.forgetting import Transitions, align, transitions
from gradsift.evaluate.losses import RowLosses, Tick, evaluate_rows
from gradsift.evaluate.table import EvalRow, EvalTable, Phase, Role
from gradsift.train.parts import Cost
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# lm-eval's own default: the examples before a question are part of the benchmark, whatever run is measured.
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class RowSet:
    """Rows of one task.

    Args:
        name: of the task.
        role: domain or general.
        rows: n rows that train at least one token each, with different ids.
        sources: n labels of the part each row belongs to.
    """

    name: str
    role: Role
    rows: tuple[TokenRow, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceSet:
    """Multiple-choice questions of one task.

    Args:
        name: of the task.
        role: domain or general.
        encoded: the questions.
    """

    name: str
    role: Role
    encoded: EncodedChoices


@dataclass(frozen=True)
class Benchmarks:
    """Benchmarks of lm-eval.

    Args:
        config: which, and how.
        tokenizer: the model's.
    """

    config: LmEvalConfig
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sets:
    """Everything that is measured in a phase.

    Args:
        rows: sets of rows.
        choices: sets of questions.
        benchmarks: lm-eval, or None.

    Raises:
        ConfigError: two sets of one role and kind share a name, or there is nothing to measure.
    """

    rows: tuple[RowSet, ...] = ()
    choices: tuple[ChoiceSet, ...] = ()
    benchmarks: Benchmarks | None = None

    def __post_init__(self) -> None:
        for group, flag in ((self.rows, "--domain, --general"), (self.choices, "--choice")):
            names = [(one.role, one.name) for one in group]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ConfigError("a name is used twice", where=flag, got=" ".join(twice[0]), do="rename one of them")
        if not (self.rows or self.choices or self.benchmarks):
            raise ConfigError(
                "there is nothing to measure",
                where="gradsift evaluate",
                expected="at least one of --domain, --general, --choice, --lm-eval",
                do="add --domain NAME=PATH and --general NAME=PATH",
            )


@dataclass(frozen=True)
class How:
    """How the sets are measured.

    Args:
        pad_id: padding token.
        tokens_per_batch: the budget of a micro-batch.
        seed: of the fine-tuning run; stands beside every figure.
        divergence: measure KL(base || tuned) on the row sets.
        tick: told rows and tokens after every micro-batch.
    """

    pad_id: int
    tokens_per_batch: int = 2048
    seed: int = 0
    divergence: bool = True
    tick: Tick | None = None


Key = tuple[Role, str]


@dataclass(frozen=True)
class PhaseResult:
    """What one model gave.

    Args:
        phase: before or after.
        losses: per role and name of a row set.
        answers: per role and name of a question set.
        bench: lm-eval's figures, or None.
        figures: rows of the table.
        cost: of the passes over rows and questions; lm-eval's own are not counted.
    """

    phase: Phase
    losses: Mapping[Key, RowLosses]
    answers: Mapping[Key, ChoiceResult]
    bench: BenchResult | None
    figures: tuple[EvalRow, ...]
    cost: Cost


@dataclass(frozen=True)
class Measured:
    """Both phases.

    Args:
        before: the base model's results.
        after: the tuned model's, or None.
        divergence: per role and name of a row set.
        table: all figures.
        cost: of everything but lm-eval.
    """

    before: PhaseResult
    after: PhaseResult | None
    divergence: Mapping[Key, RowDivergence]
    table: EvalTable
    cost: Cost

    def transitions(
        self, metric: Literal["correct", "correct_norm"] = "correct"
    ) -> dict[tuple[Role, str, str], Transitions]:
        """Count per source what was right and is wrong now, and the reverse, with guessing taken out.

        Args:
            metric: by summed log-likelihood, or per character.

        Returns:
            Per role, task and source of the question sets; empty when nothing was measured after.
        """
        found: dict[tuple[Role, str, str], Transitions] = {}
        if self.after is None:
            return found
        for (role, name), first in self.before.answers.items():
            last = self.after.answers[(role, name)]
            right = getattr(last, metric)[list(align(first.ids, last.ids))]
            for source, where in _parts(first.sources):
                found[(role, name, source)] = transitions(
                    getattr(first, metric)[where], right[where], 1 / first.num_options[where]
                )
        return found


def measure_phase(model: nn.Module, sets: Sets, how: How, phase: Phase) -> PhaseResult:
    """Measure every set under one model.

    Args:
        model: a causal language model; it is measured as it is, an adapter included.
        sets: what to measure.
        how: batches and seed.
        phase: what the figures are marked as.

    Returns:
        The results.
    """
    passes = {"pad_id": how.pad_id, "tokens_per_batch": how.tokens_per_batch, "tick": how.tick}
    losses: dict[Key, RowLosses] = {(s.role, s.name): evaluate_rows(model, s.rows, **passes) for s in sets.rows}
    answers: dict[Key, ChoiceResult] = {
        (s.role, s.name): answer_choices(model, s.encoded, **passes) for s in sets.choices
    }
    bench = _bench(model, sets.benchmarks, how.seed) if sets.benchmarks else None
    figures = [*_loss_figures(sets, losses, how.seed, phase), *_choice_figures(answers, how.seed, phase)]
    if bench is not None and sets.benchmarks is not None:
        roles: dict[str, Role] = {task.name: task.role for task in sets.benchmarks.config.tasks}
        figures += [
            EvalRow(s.task, roles.get(s.task, "general"), s.metric, phase, s.value, s.n, how.seed, s.task)
            for s in bench.scores
        ]
    cost = sum((result.cost for result in (*losses.values(), *answers.values())), Cost())
    return PhaseResult(phase, losses, answers, bench, tuple(figures), cost)


def measure_pair(
    before: nn.Module, after: nn.Module | Callable[[], nn.Module] | None, sets: Sets, how: How
) -> Measured:
    """Measure the base model, then the tuned one.

    Args:
        before: the base model, or a PeftModel whose adapter is switched off while it is measured.
        after: the tuned model, or what makes it; called after the base model has been measured, so it may put an
            adapter on ``before``. None measures the base model alone.
        sets: what to measure.
        how: batches, seed, divergence.

    Returns:
        Both phases and their table.

    Raises:
        ModelError: ``before`` carries an adapter that cannot be switched off, or both are the same function.
    """
    with without_adapter(before):
        first = measure_phase(before, sets, how, "before")
    if after is None:
        return Measured(first, None, {}, EvalTable(first.figures), first.cost)
    tuned = after if isinstance(after, nn.Module) else after()
    adapted = has_adapter(tuned)
    if tuned is before and not adapted:
        raise ModelError(
            "base and tuned model are the same object, so there is nothing to compare",
            where="evaluate",
            do="load the base model apart, or give a function that makes the tuned one",
        )
    last = measure_phase(tuned, sets, how, "after")
    # An adapter on ``before`` itself leaves only the way of switching it off; otherwise the two are apart.
    base = None if adapted and (has_adapter(before) or tuned is before) else before
    divergence: dict[Key, RowDivergence] = {}
    if how.divergence:
        for one in sets.rows:
            divergence[(one.role, one.name)] = kl_rows(
                tuned, one.rows, base=base, pad_id=how.pad_id, tokens_per_batch=how.tokens_per_batch, tick=how.tick
            )
    figures = [*first.figures, *last.figures, *_divergence_figures(sets, divergence, how.seed)]
    cost = sum((d.cost for d in divergence.values()), first.cost + last.cost)
    return Measured(first, last, divergence, EvalTable(tuple(figures)), cost)


def evaluate_model(
    before: nn.Module, after: nn.Module | Callable[[], nn.Module] | None, sets: Sets, how: How
) -> EvalTable:
    """Give the table of :func:`measure_pair` alone.

    Args:
        before: the base model.
        after: the tuned model, what makes it, or None.
        sets: what to measure.
        how: batches, seed, divergence.

    Returns:
        Figures before and after.
    """
    return measure_pair(before, after, sets, how).table


def _bench(model: nn.Module, bench: Benchmarks, seed: int) -> BenchResult:
    config = bench.config
    if config.folder is None:
        raise ConfigError("no folder of tasks is named", where="--lm-eval-dir", do="add --lm-eval-dir DIR")
    return run_benchmarks(
        model,
        bench.tokenizer,
        [task.name for task in config.tasks],
        Path(config.folder),
        seed=FEWSHOT_SEED,
        batch_size=config.batch_size,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
    )


def _parts(sources: Sequence[str]) -> Iterable[tuple[str, np.ndarray]]:
    """Positions of every source, sources in order of their name."""
    for name in sorted(set(sources)):
        yield name, np.array([i for i, source in enumerate(sources) if source == name], dtype=np.int64)


def _loss_figures(sets: Sets, losses: Mapping[Key, RowLosses], seed: int, phase: Phase) -> Iterable[EvalRow]:
    for one in sets.rows:
        for source, where in _parts(one.sources):
            some = losses[(one.role, one.name)].take(where)
            values = {"loss": some.token_mean, "row_loss": some.row_mean, "exact": some.exact_share}
            for metric, value in values.items():
                yield EvalRow(one.name, one.role, metric, phase, value, len(where), seed, source)


def _choice_figures(answers: Mapping[Key, ChoiceResult], seed: int, phase: Phase) -> Iterable[EvalRow]:
    for (role, name), result in answers.items():
        for source in sorted(set(result.sources)):
            some = result.of(source)
            for metric in ("accuracy", "accuracy_norm", "accuracy_adjusted"):
                yield EvalRow(name, role, metric, phase, getattr(some, metric), len(some.ids), seed, source)


def _divergence_figures(sets: Sets, divergence: Mapping[Key, RowDivergence], seed: int) -> Iterable[EvalRow]:
    for one in sets.rows:
        found = divergence.get((one.role, one.name))
        if found is None:
            continue
        for source, where in _parts(one.sources):
            value = float(found.kl[where] @ found.num_trained[where] / found.num_trained[where].sum())
            yield EvalRow(one.name, one.role, "kl_base", "after", value, len(where), seed, source)
