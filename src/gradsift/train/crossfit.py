"""crossfit: domain rows that probes trained on other rows believe, and pool rows that the model already knows (ours).

After co-teaching's small-loss rule (Han et al., arXiv 1804.06872), cross-fitting (Chernozhukov et al., arXiv 1608.00060) and
replay. It was developed on the arithmetic world, where ranking by gradient cosine lost to drawing at random among the
rows that pass (docs/results/LOG.md): gradients play no part in it, and it says so.

Algorithm:
  1  base loss l0_i of every pool row at the starting weights, and of the anchor rows
  2  prior: the ``prior_share`` of the pool whose tokens look most like the target (:func:`token_likeness`), at most
     ``max_copies`` of a row's exact copies
  3  ``num_repeats`` times: deal the rows into two folds, exact copies together; train a probe on each fold's prior rows
     with a share of replay; l1_i = mean loss of row i under the probes that did not train on it
  4  trusted: the ``trust`` share of the prior of smallest l1
  5  known: rows outside the prior with l0_i at most the ``known_quantile`` of the anchor rows' l0
  6  ``protect`` of the budget is drawn from the known rows, the rest from the trusted ones, both by keyed draw
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from gradsift.errors import ConfigError
from gradsift.geometry.likeness import token_likeness
from gradsift.seeds import Stream, stream
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.masking import measure_nats
from gradsift.train.parts import Cost
from gradsift.train.plan import plan_steps
from gradsift.types import TokenRow


@dataclass(frozen=True)
class CrossfitConfig:
    """Settings of the method.

    Args:
        prior_share: share of the pool that may be domain.
        max_copies: exact copies of a row that may be chosen.
        num_repeats: times the rows are dealt into two folds.
        num_steps: optimizer steps of a probe.
        batch_size: rows per step of a probe.
        lr: learning rate of a probe.
        replay: share of a probe's rows that come from the replay rows.
        trust: share of the prior that is trusted.
        protect: share of the budget that is drawn from the known rows.
        known_quantile: quantile of the anchor rows' base loss up to which a row counts as known.
        tokens_per_batch: of the measurements.
    """

    prior_share: float = 0.53
    max_copies: int = 3
    num_repeats: int = 1
    num_steps: int = 40
    batch_size: int = 32
    lr: float = 1e-3
    replay: float = 0.25
    trust: float = 0.65
    protect: float = 0.4
    known_quantile: float = 0.95
    tokens_per_batch: int = 8192

    def __post_init__(self) -> None:
        for name in ("prior_share", "trust", "known_quantile"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError("a share is out of range", where=name, got=getattr(self, name), expected="in (0, 1]")
        for name in ("replay", "protect"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError("a share is out of range", where=name, got=getattr(self, name), expected="in [0, 1)")
        for name in ("max_copies", "num_repeats", "num_steps", "batch_size", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ConfigError("a count is out of range", where=name, got=getattr(self, name), expected=">= 1")
        if not 0 < self.lr < float("inf"):
            raise ConfigError("a learning rate is out of range", where="lr", got=self.lr, expected="finite and above 0")


@dataclass(frozen=True)
class Material:
    """What the method reads.

    Args:
        make_model: gives a fresh copy of the starting weights, trainable.
        pool: candidate rows.
        anchors: rows of everything protected.
        target: rows of what is to be learned.
        replay: general rows that probes may train on; may be empty.
        copy_of: row id -> id of its first exact copy.
        pad_id: padding token.
        seed: of folds, orders and draws.
    """

    make_model: Callable[[], nn.Module]
    pool: Sequence[TokenRow]
    anchors: Sequence[TokenRow]
    target: Sequence[TokenRow]
    replay: Sequence[TokenRow]
    copy_of: Mapping[str, str]
    pad_id: int
    seed: int


@dataclass(frozen=True)
class Crossfit:
    """What the method found out.

    Args:
        prior: ids that may be domain, in id order.
        likeness: id -> nats per token.
        base_loss: id -> loss at the starting weights.
        held_out_loss: prior id -> mean loss under probes that did not train on it.
        known: ids that the model knows, in id order.
        threshold: base loss up to which a row counts as known.
        cost: by part: ``base`` and ``probes``.
    """

    prior: tuple[str, ...]
    likeness: Mapping[str, float]
    base_loss: Mapping[str, float]
    held_out_loss: Mapping[str, float]
    known: tuple[str, ...]
    threshold: float
    cost: Mapping[str, Cost]


def crossfit(material: Material, config: CrossfitConfig) -> Crossfit:
    """Measure what the choice rests on.

    Args:
        material: rows and starting weights.
        config: settings.

    Returns:
        Prior, losses and known rows; nothing is chosen yet.

    Raises:
        ConfigError: there are no pool, anchor or target rows, two rows have one id, or the prior is too small for two
            folds.
    """
    for name in ("pool", "anchors", "target"):
        if not getattr(material, name):
            raise ConfigError("crossfit lacks rows", where=name, got="none", expected="at least one row")
    ids = [row.id for row in (*material.pool, *material.anchors, *material.replay)]
    if len(set(ids)) < len(ids):  # losses and rows are looked up by id
        twice = next(i for i, n in Counter(ids).items() if n > 1)
        raise ConfigError("an id stands for two rows of pool, anchors and replay", where="crossfit", got=twice)
    pool = sorted(material.pool, key=lambda row: row.id)
    like = token_likeness([row.input_ids for row in pool], [row.input_ids for row in material.target])
    likeness = {row.id: float(value) for row, value in zip(pool, like, strict=True)}
    first = {row.id: material.copy_of.get(row.id, row.id) for row in pool}
    top = sorted(likeness, key=lambda i: (-likeness[i], i))[: max(1, round(config.prior_share * len(pool)))]
    prior = _capped(top, first, config.max_copies)
    inside = set(top)
    base, spent = _losses(material.make_model(), [*pool, *material.anchors], material.pad_id, config)
    threshold = float(np.quantile([base[row.id] for row in material.anchors], config.known_quantile))
    known = [row.id for row in pool if row.id not in inside and base[row.id] <= threshold]
    held_out, probes = _probe(material, prior, first, config)
    return Crossfit(
        tuple(sorted(prior)),
        likeness,
        {row.id: base[row.id] for row in pool},
        held_out,
        tuple(_capped(known, first, config.max_copies)),
        threshold,
        {"base": spent, "probes": probes},
    )


def choose_crossfit(
    found: Crossfit, config: CrossfitConfig, count: int, draw: Stream
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw the rows.

    Args:
        found: from :func:`crossfit`.
        config: settings.
        count: rows to choose.
        draw: keyed draw.

    Returns:
        Ids, trusted rows first, and remarks on shortages; a shortage of known rows is filled with trusted ones and the
        other way round, and said.
    """
    held = found.held_out_loss
    trusted = sorted(held, key=lambda i: (held[i], i))[: max(1, round(config.trust * len(held)))]
    num_known = min(len(found.known), round(config.protect * count))
    num_trusted = min(len(trusted), count - num_known)
    wanted = round(config.protect * count)
    num_known = min(len(found.known), count - num_trusted)
    notes: list[str] = []
    if num_known != wanted:
        notes.append(
            f"{num_known} known rows instead of {wanted}: {len(found.known)} are known, {len(trusted)} are trusted"
        )
    if num_known + num_trusted < count:
        notes.append(f"shortage: {num_known + num_trusted} of {count} rows")
    ids = [*_draw(trusted, num_trusted, draw), *_draw(found.known, num_known, draw)]
    return tuple(ids), tuple(notes)


def _draw(ids: Sequence[str], count: int, draw: Stream) -> list[str]:
    keys = draw.uniform(ids)
    return [str(ids[int(k)]) for k in np.lexsort((np.array(ids), keys))[:count]]


def _capped(ids: Sequence[str], first: Mapping[str, str], cap: int) -> list[str]:
    """Keep at most ``cap`` exact copies of each row, in the order given."""
    seen: Counter[str] = Counter()
    kept = []
    for i in ids:
        seen[first[i]] += 1
        if seen[first[i]] <= cap:
            kept.append(i)
    return kept


def _losses(
    model: nn.Module, rows: Sequence[TokenRow], pad_id: int, config: CrossfitConfig
) -> tuple[dict[str, float], Cost]:
    nats = measure_nats(model, rows, pad_id, config.tokens_per_batch)
    return {row.id: float(nats.nats[row.id].sum()) / row.num_trained for row in rows}, nats.cost


@dataclass(frozen=True)
class ProbePlan:
    """What one probe learns from and what it judges.

    Args:
        repeat: which dealing into folds.
        fold: 0 or 1, the fold that is left out.
        train: rows of the other fold, and replay rows.
        test: prior rows of the fold that is left out.
        steps: row ids per optimizer step.
    """

    repeat: int
    fold: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...]


def plan_probes(
    prior: Sequence[str], first: Mapping[str, str], general: Sequence[str], config: CrossfitConfig, seed: int
) -> tuple[ProbePlan, ...]:
    """Deal the prior into folds, exact copies together, and lay out every probe's steps.

    Args:
        prior: ids that may be domain.
        first: id -> what its exact copies share.
        general: ids of replay rows; may be empty.
        config: settings.
        seed: of folds and orders.

    Returns:
        Two plans per repeat, in order.

    Raises:
        ConfigError: a fold is empty.
    """
    plans = []
    general = sorted(general) if config.replay else []
    for repeat in range(config.num_repeats):
        folds = stream(seed, f"crossfit/fold/{repeat}").uniform([first[i] for i in prior]) < 0.5
        for fold in (False, True):
            train = sorted(i for i, side in zip(prior, folds, strict=True) if side != fold)
            test = [i for i, side in zip(prior, folds, strict=True) if side == fold]
            if not train or not test:
                raise ConfigError(
                    "the prior is too small to be dealt into two folds",
                    where="crossfit",
                    got=f"{len(prior)} rows",
                    do="raise prior_share",
                )
            extra = round(len(train) * config.replay / (1 - config.replay)) if general else 0
            train += [general[k % len(general)] for k in range(extra)]
            plan = plan_steps(
                train,
                batch_size=config.batch_size,
                num_steps=config.num_steps,
                stream=stream(seed, f"crossfit/probe/{repeat}/{int(fold)}"),
            )
            plans.append(ProbePlan(repeat, int(fold), tuple(train), tuple(test), plan.steps))
    return tuple(plans)


def _probe(
    material: Material, prior: Sequence[str], first: Mapping[str, str], config: CrossfitConfig
) -> tuple[dict[str, float], Cost]:
    """Mean held-out loss of the prior's rows over the repeats, and what the probes cost."""
    rows = {row.id: row for row in (*material.pool, *material.replay)}
    found: dict[str, list[float]] = defaultdict(list)
    cost = Cost()
    for plan in plan_probes(prior, first, [row.id for row in material.replay], config, material.seed):
        model = material.make_model()
        settings = LoopConfig(lr=config.lr, total_steps=config.num_steps, seed=material.seed)
        loop = Loop(model, settings, material.pad_id)
        loop.run(plan.steps, rows.__getitem__, {})
        losses, spent = _losses(model, [rows[i] for i in plan.test], material.pad_id, config)
        cost += loop.cost + spent
        for i, value in losses.items():
            found[i].append(value)
    return {i: float(np.mean(values)) for i, values in sorted(found.items())}, cost
