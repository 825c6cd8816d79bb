"""Arms of a comparison: which rows an arm trains on, with what, and what choosing them cost (ours).

An arm is a method with its settings, an optional share of replay and training options. Every method reads the same
signals of the same pass; what that pass cost is charged to each arm that needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from torch import nn

from gradsift.compare.checkpoint import choose_trained, is_trained
from gradsift.compare.forward_arm import with_forward
from gradsift.compare.policy_arm import choose_by_policy
from gradsift.compare.proxy_arm import choose_by_proxy, is_proxied
from gradsift.compare.world import World
from gradsift.data.lexical import lexical_scores
from gradsift.errors import ConfigError
from gradsift.evaluate.divergence import BaseLogProbs, cache_base
from gradsift.evaluate.losses import RowLosses, evaluate_rows
from gradsift.methods.base import make_method, methods
from gradsift.recipe import Strict, build_section
from gradsift.seeds import Stream, stream
from gradsift.train.config import StmConfig
from gradsift.train.crossfit import CrossfitConfig, Material, choose_crossfit, crossfit
from gradsift.train.hooks import step_hooks
from gradsift.train.parts import Cost
from gradsift.train.rescore import RescoreConfig, rescore
from gradsift.types import SIGNALS, Budget, Problem, TokenRow

# Arms that only a planted world can have, or that choose by a rule of the comparison itself.
ORACLE, DOMAIN, CROSSFIT = "oracle", "domain_looking", "crossfit"
POLICY = "ogs"
EVALUATION_TOKENS = 2048  # longest row times rows of an evaluation batch; nothing but memory depends on it
TRAINING_SECTIONS = frozenset({"rollout", "warmup", "proxy"})  # how the world's model is trained for a method's sake
FREE_OPTIONS = frozenset({"lr_factor", "wise_ft"})  # training options that add nothing to the cost of a step


class TrainOptions(Strict):
    """What an arm changes about training.

    Args:
        lr_factor: times the grid's learning rate.
        wise_ft: alpha of WiSE-FT; 1 keeps the trained weights.
        kl: weight of the divergence from the starting weights.
        l2sp: weight of the distance from the starting weights.
        ewc: weight of the distance in Fisher's metric.
        stm: token masking.
        hook: registered step hook.
        hook_settings: its own.
    """

    lr_factor: float = Field(default=1.0, gt=0)
    wise_ft: float = Field(default=1.0, ge=0, le=1)
    kl: float = Field(default=0.0, ge=0)
    l2sp: float = Field(default=0.0, ge=0)
    ewc: float = Field(default=0.0, ge=0)
    stm: StmConfig | None = None
    hook: Literal[*step_hooks()] | None = None  # pyright: ignore[reportInvalidTypeForm]
    hook_settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _masks(self) -> TrainOptions:
        if self.stm is not None and not self.stm.on:
            raise ValueError("stm: give one of tau and drop_share")
        return self


@dataclass(frozen=True)
class ArmSpec:
    """What distinguishes an arm.

    Args:
        name: unique in its comparison.
        method: a registered method, ``ogs_rounds``, ``domain_looking`` (rows that look like the domain by a word cue,
            drawn at random) or ``oracle`` (planted worlds: clean and replay rows).
        settings: the method's own.
        replay: share of the training rows that come from the replay set, within the same budget.
        train: overrides of the training options (``lr_factor``, ``wise_ft``, ``kl``, ``l2sp``, ``ewc``, ``hook`` ...).
        total_of: name of another arm whose total cost this arm may spend on choosing and training.
        placebo: ``permuted_scores`` or ``shuffled_anchors``; empty for none.
        family: ``cheap`` (no gradients of the pool), ``gradient``, ``gradsift``, ``training``, ``surgery``, ``bound`` or
            ``placebo``; decides what is compared with what.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    replay: float = 0.0
    train: Mapping[str, Any] = field(default_factory=dict)
    total_of: str = ""
    placebo: str = ""
    family: str = "cheap"

    def __post_init__(self) -> None:
        if not 0.0 <= self.replay < 1.0:
            raise ConfigError(
                "a replay share is out of range", where=f"arm {self.name}", got=self.replay, expected="0 <= replay < 1"
            )
        where = f"arm {self.name}"
        if unknown := sorted(set(self.train) - set(TrainOptions.model_fields)):
            known = ", ".join(sorted(TrainOptions.model_fields))
            raise ConfigError("no such training option", where=where, got=", ".join(unknown), expected=known)
        build_section(TrainOptions, self.train, f"the section train of {where}")
        if self.total_of and (dear := sorted(set(self.train) - FREE_OPTIONS)):
            raise ConfigError(
                "an arm that spends another's total is trained in plain steps: what these cost is not known beforehand",
                where=where, got=", ".join(dear), expected=", ".join(sorted(FREE_OPTIONS)), do="leave total_of or these out",
            )  # fmt: skip
        if self.method in methods() and self.method != CROSSFIT:  # that one has settings of its own here
            own = {k: v for k, v in self.settings.items() if k not in TRAINING_SECTIONS}
            make_method(self.method, own, f"{where}, settings")
        scoreless = self.method in (ORACLE, DOMAIN, CROSSFIT, POLICY) or is_proxied(self)
        if self.placebo == "permuted_scores" and scoreless:
            # It would run undisguised, and be shown as a placebo.
            raise ConfigError("this method reads no scores to permute", where=where, got=self.method)


@dataclass(frozen=True)
class Choice:
    """The rows an arm trains on.

    Args:
        ids: training rows in the method's order, replay rows last; an id may occur several times.
        weights: id -> weight; 1 where absent.
        cost: of choosing them, by part.
        notes: what a reader must know.
        extra: figures of the choice.
    """

    ids: tuple[str, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, Cost] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Desk:
    """One seed of a world with everything its arms share; signals at the starting weights are measured once.

    Args:
        world: the world.
        budget: rows an arm trains on.
    """

    world: World
    budget: int

    @cached_property
    def rows(self) -> dict[str, TokenRow]:
        """Pool and replay rows by id."""
        return {row.id: row for row in (*self.world.pool, *self.world.replay)}

    @cached_property
    def lexical(self) -> dict[str, float]:
        """BM25 of every pool row against the target rows."""
        texts, ids = self.world.texts, [row.id for row in self.world.pool]
        targets = [texts[row.id] for row in self.world.target]
        return dict(zip(ids, lexical_scores(ids, [texts[i] for i in ids], targets).tolist(), strict=True))

    @cached_property
    def start(self) -> tuple[Problem, Cost]:
        """Signals at the starting weights, and what the pass cost."""
        got = measure(self.world, self.world.make_model(), self.lexical)
        return got

    @cached_property
    def trained(self) -> dict[Any, Any]:
        """Signals at checkpoints of warm-ups, by what was asked for (:mod:`gradsift.compare.checkpoint`)."""
        return {}

    @cached_property
    def forward(self) -> dict[Any, Any]:
        """Forward and text signals beside those of ``start``, by what was asked for (:mod:`gradsift.compare.forward_arm`)."""
        return {}

    @cached_property
    def unmeasured(self) -> Problem:
        """Rows and words without any signal, for methods that need no model."""
        rows = sorted(self.world.pool, key=lambda row: row.id)
        return Problem(
            ids=tuple(row.id for row in rows),
            sources=tuple(self.world.sources.get(row.id, "pool") for row in rows),
            num_tokens=np.array([row.num_tokens for row in rows], dtype=np.int64),
            num_trained=np.array([row.num_trained for row in rows], dtype=np.int64),
            num_read=len(rows),
            num_trained_read=sum(row.num_trained for row in rows),
            lexical=np.array([self.lexical[row.id] for row in rows]),
        )

    @cached_property
    def base(self) -> nn.Module:
        """The starting weights, for measuring; never trained."""
        return self.world.make_model()

    @cached_property
    def before(self) -> dict[str, RowLosses]:
        """Losses of the held-out rows at the starting weights, by evaluation set; measured once for all arms."""
        pad = self.world.pad_id
        return {
            one.name: evaluate_rows(self.base, one.rows, pad_id=pad, tokens_per_batch=EVALUATION_TOKENS)
            for one in self.world.evaluations
        }

    @cached_property
    def base_log_probs(self) -> dict[str, BaseLogProbs]:
        """Log-probabilities of the starting weights on the held-out rows, by evaluation set; every divergence reads them."""
        pad = self.world.pad_id
        return {
            one.name: cache_base(self.base, one.rows, pad_id=pad, tokens_per_batch=EVALUATION_TOKENS)
            for one in self.world.evaluations
        }

    def with_budget(self, budget: int) -> Desk:
        """Give another number of rows to choose; what was measured stays.

        Args:
            budget: rows an arm trains on.

        Returns:
            The desk.
        """
        other = Desk(self.world, budget)
        vars(other).update({name: value for name, value in vars(self).items() if name != "budget"})
        return other

    def stream(self, name: str) -> Stream:
        """Return a stream of this seed; the same name gives the same draws to every arm."""
        return stream(self.world.seed, f"compare/{name}")


def rescoring(model: nn.Module, seed: int) -> RescoreConfig:
    """Say how signals are measured: over the adapter where the world trains one, and over all weights elsewhere.

    A model with an adapter is a large one: every layer's input is kept during a pass, so its batches are smaller. On a GPU
    batches are as large as its memory easily takes: a small model waits for its launches there.
    """
    if any(".lora_A." in name for name, _ in model.named_parameters()):
        size = 512 if next(model.parameters()).device.type == "cpu" else 4096
        return RescoreConfig(parameters="lora", tokens_per_batch=size, seed=seed)
    return RescoreConfig(seed=seed)


def measure(world: World, model: Any, lexical: Mapping[str, float] | None = None) -> tuple[Problem, Cost]:
    """Measure the pool at a model's weights.

    Args:
        world: rows and anchors.
        model: any weights of the world's model.
        lexical: BM25 scores to hand on.

    Returns:
        The problem and the pass's cost.
    """
    got = rescore(
        model,
        world.pool,
        world.anchors,
        world.target,
        replace(rescoring(model, world.seed), embedding=True, keep_sketch=True),
        pad_id=world.pad_id,
        copy_of=world.copy_of,
        sources=world.sources,
        lexical=lexical,
    )
    return got.problem, got.cost


def choose(desk: Desk, arm: ArmSpec) -> Choice:
    """Choose an arm's training rows.

    Args:
        desk: the shared part.
        arm: the arm.

    Returns:
        Rows within the budget, replay included, and what choosing cost.
    """
    num_replay = round(arm.replay * desk.budget)
    own = choose_own(desk, arm, desk.budget - num_replay)
    return replace(own, ids=(*own.ids, *draw_replay(desk, num_replay)))


def choose_own(desk: Desk, arm: ArmSpec, count: int) -> Choice:
    """Choose the rows that do not come from the replay set.

    Args:
        desk: the shared part.
        arm: the arm.
        count: how many rows.

    Returns:
        The choice without replay.
    """
    if arm.method in (ORACLE, DOMAIN):
        looks = [i for i in keyed_order(desk) if i in desk.world.looks_domain]
        ids = _oracle(desk, count) if arm.method == ORACLE else tuple(looks[:count])
        return Choice(ids, notes=(f"shortage: {len(ids)} of {count} rows",) if len(ids) < count else ())
    if arm.method == CROSSFIT:
        return _crossfit(desk, arm, count)
    if arm.method == POLICY:
        return choose_by_policy(desk, arm, count)
    if is_trained(arm):
        return choose_trained(desk, arm, count)
    if is_proxied(arm):
        return choose_by_proxy(desk, arm, count)
    method = make_method(arm.method, arm.settings)
    text_only = method.needs.cost_class == "text" and not arm.placebo
    problem, cost = (desk.unmeasured, Cost()) if text_only else desk.start
    problem, more = with_forward(desk, method, problem)
    if arm.placebo:
        problem = disguise(problem, arm.placebo, desk.stream(f"placebo/{arm.placebo}"))
    needs = method.needs.cost_class
    spent: dict[str, Cost] = {}
    if needs == "gradient":
        spent["collect"] = cost
    elif needs == "forward":
        spent["collect"] = Cost(cost.flops / 3, cost.forward_tokens, 0, cost.seconds / 3)
    spent |= more
    lost = len(desk.world.pool) - problem.size
    said = (f"{lost} rows have no finite signal and cannot be chosen",) if lost else ()
    if arm.method == "full":
        return Choice(tuple(problem.ids), cost=spent, notes=said)
    selection = method.select(problem, Budget(rows=count), desk.stream("select/random"))
    weights = dict(zip(selection.ids, selection.weights.tolist(), strict=True))
    notes = tuple(note.text for note in selection.notes)
    return Choice(tuple(selection.ids), weights, spent, said + notes)


def keyed_order(desk: Desk) -> list[str]:
    """Pool ids in a random order of the seed's own, whatever the order of the pool.

    It is not the order of the random arm, whose method draws from a child of the same stream.
    """
    ids = [row.id for row in desk.world.pool]
    draws = desk.stream("select/random").uniform(ids)
    return [ids[k] for k in np.lexsort((np.array(ids), draws))]


def draw_replay(desk: Desk, count: int) -> tuple[str, ...]:
    """Draw replay rows, each as often as any other.

    Args:
        desk: the shared part.
        count: how many; more than there are repeats them.

    Returns:
        Ids in keyed order.

    Raises:
        ConfigError: replay is asked of a world without replay rows.
    """
    ids = [row.id for row in desk.world.replay]
    if count and not ids:
        raise ConfigError("the world has no replay rows", where=desk.world.name, do="leave replay out")
    draws = desk.stream("replay").uniform(ids)
    order = [ids[k] for k in np.lexsort((np.array(ids), draws))]
    return tuple(order[k % len(order)] for k in range(count))


def _crossfit(desk: Desk, arm: ArmSpec, count: int) -> Choice:
    world = desk.world
    config = build_settings(CrossfitConfig, arm.settings, f"arm {arm.name}")
    anchors = [row for rows in world.anchors.values() for row in rows]
    material = Material(
        world.make_model, world.pool, anchors, world.target, world.replay, world.copy_of, world.pad_id, world.seed
    )
    found = crossfit(material, config)
    ids, notes = choose_crossfit(found, config, count, desk.stream("select/random"))
    return Choice(ids, cost=found.cost, notes=notes)


S = TypeVar("S")


def build_settings(kind: type[S], settings: Mapping[str, Any], where: str) -> S:
    """Build a settings dataclass, refusing unknown names and wrong values.

    Args:
        kind: a dataclass.
        settings: its fields.
        where: what a person is told is wrong.

    Returns:
        The settings.

    Raises:
        ConfigError: a field is unknown or its value has the wrong type.
    """
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(settings) - known):
        raise ConfigError("no such setting", where=where, got=", ".join(unknown), expected=", ".join(sorted(known)))
    try:
        return TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            "a setting has a wrong value",
            where=f"{where}, {first['loc']}",
            got=repr(first["input"]),
            expected=first["msg"],
        ) from None


def _oracle(desk: Desk, count: int) -> tuple[str, ...]:
    """Clean and replay rows of the pool, 5 to 3 as the pool holds them; the bound of what selection can do."""
    order, kinds = keyed_order(desk), desk.world.kinds
    clean = [i for i in order if kinds.get(i) == "clean"]
    replay = [i for i in order if kinds.get(i) == "replay"]
    num_replay = min(len(replay), round(0.375 * count))
    return tuple(clean[: count - num_replay] + replay[:num_replay])


def disguise(problem: Problem, how: str, draw: Stream) -> Problem:
    """Make a placebo: signals that belong to other rows.

    Args:
        problem: real signals.
        how: ``permuted_scores`` deals every row's signals to another row.
        draw: which row gets which.

    Returns:
        A problem without information.

    Raises:
        ConfigError: ``how`` is unknown.
    """
    if how != "permuted_scores":
        raise ConfigError("there is no such placebo", where="arm", got=how, expected="permuted_scores")
    order = draw.numpy().permutation(problem.size)

    def dealt(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[order].copy()

    moved = tuple(replace(one, features=one.features[order]) for one in problem.checkpoints)
    return replace(problem, checkpoints=moved, **{name: dealt(getattr(problem, name)) for name in SIGNALS})


def composition(world: World, ids: Sequence[str]) -> dict[str, float]:
    """Share of each planted kind (or source) among some training rows; replay rows count as ``replay set``.

    Args:
        world: the planted truth.
        ids: training rows.

    Returns:
        Shares by kind, summing to 1.
    """
    kinds = world.kinds or world.sources
    counts = Counter(kinds.get(i, "replay set") for i in ids)  # none where training in rounds diverged
    return {kind: counts[kind] / len(ids) for kind in sorted(counts)}
