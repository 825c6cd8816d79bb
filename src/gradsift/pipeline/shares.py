"""How well upper layers rank, and what they cost: each share beside all layers and plain training steps, on real rows (ours).

Every micro-batch is run by every arm, in rotating order, so that all see the same machine: plain forward and backward,
the collector over all layers, the collector over each share. Costs are process CPU seconds over those of the plain arm;
logits exist at supervised positions only in all arms. Ranks are Spearman correlations with what all layers say of the
same rows. ``gradsift select --screen trained`` does not choose by what it measures but by a prediction from it, so the
same fit is made here on some of the rows and judged on the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradsift.data.batches import Tokens, collate, plan_batches
from gradsift.errors import ConfigError
from gradsift.evaluate.ranks import Correlation, spearman_interval
from gradsift.geometry.screen import fit_screen
from gradsift.gradients.directions import BuiltDirection, build_direction
from gradsift.gradients.folded import fold_directions, keep_parts
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.prefix import refuse_states
from gradsift.gradients.project import Projector
from gradsift.gradients.upper import Upper, choose_upper
from gradsift.methods import make_method
from gradsift.models.adapter import attach_lora
from gradsift.models.load import load_navigator
from gradsift.models.parameters import Parameters, choose_parameters
from gradsift.pipeline.prepare import Prepared, prepare
from gradsift.pipeline.progress import Clock, Progress
from gradsift.pipeline.screen import PLAIN_RIDGE, RIDGE, part_columns
from gradsift.recipe import Recipe
from gradsift.seeds import stream
from gradsift.types import TokenRow

TRAINED = "trained"  # every layer, with prompts held constant
SCREEN = "screen"  # the same with dots by folded factors, as ``--screen trained`` measures
PREDICTED = "predicted"  # what the screen makes of it by a fit on some rows
SHARES = ("12.5%", "25%", "50%", "75%", TRAINED, SCREEN)
HELD = {TRAINED: "all, at the trained positions", SCREEN: "all, at the trained positions, folded dots"}
ENOUGH = 0.9  # rank correlation from which a share may stand for all layers
LEAST_ROWS = 10


@dataclass(frozen=True)
class Ratio:
    """A cost over that of another arm, on the same micro-batches.

    Args:
        median: over rounds.
        low: least of them.
        high: largest of them.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class ShareLine:
    """One share of the layers.

    Args:
        share: as asked; ``trained`` for all layers with prompts held constant, ``screen`` for folded dots beside,
            ``predicted`` for the screen's prediction from these, ``all`` for all layers and positions.
        layers: which layers, in words.
        coverage: share of the chosen parameters that it measures.
        cost: CPU seconds over plain forward and backward that trains the chosen parameters.
        cost_whole: the same over one that trains all weights; equal to ``cost`` where all are chosen.
        ranks: direction's name, or ``norm`` -> Spearman's correlation with all layers; empty for all layers themselves.
    """

    share: str
    layers: str
    coverage: float
    cost: Ratio
    cost_whole: Ratio
    ranks: Mapping[str, Correlation]

    @property
    def option(self) -> str:
        """What a person types to measure so."""
        held = {TRAINED: "--set collect.positions=trained", SCREEN: "--screen trained", PREDICTED: "--screen trained"}
        return held.get(self.share, f"--layers {self.share}")

    @property
    def least(self) -> float:
        """Smallest of its rank correlations, 1 for all layers."""
        return min((rank.rho for rank in self.ranks.values()), default=1.0)


@dataclass(frozen=True)
class ShareTable:
    """All shares, cheapest first, and what to do.

    Args:
        lines: shares as asked, then all layers.
        num_rows: rows that were measured.
        num_tokens: their tokens.
        num_rounds: groups of micro-batches that medians are taken over.
        plain_seconds: CPU seconds of the plain arm that trains the chosen parameters.
        whole_seconds: of the one that trains all weights.
    """

    lines: tuple[ShareLine, ...]
    num_rows: int
    num_tokens: int
    num_rounds: int
    plain_seconds: float
    whole_seconds: float

    @property
    def recommended(self) -> ShareLine | None:
        """The cheapest share whose every rank correlation reaches :data:`ENOUGH`, or None."""
        good = [line for line in self.lines if line.ranks and line.least >= ENOUGH]
        return min(good, key=lambda line: line.cost.median) if good else None

    @property
    def advice(self) -> str:
        """What to do, in a sentence or two."""
        best = self.recommended
        if best is None:
            top = max((line for line in self.lines if line.ranks), key=lambda line: line.least)
            return (
                f"no share ranks as all layers do to {ENOUGH}: the best, {top.share}, reaches {top.least:.2f} at "
                f"{top.cost.median:.2f}x of a plain step; measure all layers, or screen and certify with --screen"
            )
        rank = min(best.ranks.values(), key=lambda one: one.rho)
        after = "; drawn rows and those that may be chosen are then measured exactly" if best.share == PREDICTED else ""
        return (
            f"{best.option} ranks as all layers do to {rank.rho:.2f} [{rank.low:.2f}, {rank.high:.2f}] or better, "
            f"at {best.cost.median:.2f}x of a plain step{after}"
        )


@dataclass
class _Arm:
    """One way to run a micro-batch."""

    key: str
    step: Callable[[Tokens], Any]
    seconds: list[float]
    part: str = "all"
    seen: int = 0


def measure_shares(
    recipe: Recipe, progress: Progress, *, shares: Sequence[str] = SHARES, num_rows: int = 64, num_rounds: int = 5
) -> ShareTable:
    """Measure cost and ranks of some shares on rows of the pool, drawn by id.

    Args:
        recipe: pool, anchors, target, navigator and data settings of the planned run.
        progress: who is told.
        shares: values of ``collect.layers``, ``trained``, or ``screen``, which is left out on a GPU; neither is measured
            for a model whose prompts cannot be held constant.
        num_rows: rows to draw; all where there are fewer.
        num_rounds: groups that the micro-batches are dealt into, short and long ones in each; fewer where there are fewer.

    Returns:
        The table.

    Raises:
        ConfigError: there is no direction to rank by, or fewer than 10 rows.
    """
    clock = Clock(progress)
    collect = recipe.collect.model_copy(update={"layers": None, "positions": "all"})
    recipe = recipe.model_copy(update={"collect": collect})
    prepared = prepare(recipe, make_method(recipe.method.name, recipe.method.settings), clock)
    rows = _draw(prepared, num_rows)
    with clock.stage("load"):
        navigator = load_navigator(prepared.resolved, dtype=recipe.navigator.dtype, device=recipe.navigator.device)
    model: Any = navigator.model
    if recipe.navigator.parameters == "lora":
        model = attach_lora(model, recipe.navigator.lora, recipe.seed)
    parameters = choose_parameters(model, recipe.navigator.parameters)
    shares = _holdable(model, shares, progress)
    uppers = {share: choose_upper(model, parameters, share) for share in shares if share not in HELD}
    with clock.stage("anchors", sum(row.num_tokens for source in prepared.directions for row in source.usable)):
        engines = _engines(prepared, model, parameters, uppers, bool(HELD.keys() & set(shares)), clock)
    shares = [share for share in shares if share in engines]
    batches = plan_batches(rows, range(len(rows)), recipe.collect.tokens_per_batch)
    num_rounds = min(num_rounds, len(batches))
    arms = [_Arm("plain", lambda tokens: plain_step(model, parameters.names, tokens), [])]
    if recipe.navigator.parameters == "lora":
        arms.append(_Arm("whole", lambda tokens: _without_adapter(model, tokens), []))
    texts = {"all": "all, and the embedding", **HELD}
    for key in (*shares, "all"):
        seen = uppers[key].parameters.numel if key in uppers else parameters.numel
        text = uppers[key].text if key in uppers else texts[key]
        arms.append(_Arm(key, engine_step(engines[key]), [], text, seen))
    with clock.stage("shares", len(arms) * sum(row.num_tokens for row in rows)):
        found = _run(arms, rows, batches, num_rounds, prepared.pad_id, clock)
    return _table(arms, found, parameters, prepared, rows, num_rounds)


def plain_step(model: nn.Module, names: Sequence[str], tokens: Tokens) -> float:
    """Run an ordinary forward and backward of the sum of the rows' mean losses, with logits at supervised positions only.

    Args:
        model: a frozen causal language model; frozen again and without gradients afterwards.
        names: parameters that get a gradient.
        tokens: a micro-batch.

    Returns:
        The summed loss.
    """
    device = next(model.parameters()).device
    input_ids, labels = tokens.input_ids.to(device), tokens.labels.to(device)
    supervised = labels[:, 1:] != -100
    chosen = set(names)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][:, :-1][supervised][None], *inputs[1:])

    handle = head.register_forward_pre_hook(gather)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits[0]
        nats = nn.functional.cross_entropy(logits.float(), labels[:, 1:][supervised], reduction="none")
        share = 1 / supervised.sum(1).repeat_interleave(supervised.sum(1))
        loss = (nats * share).sum()
        loss.backward()
        return float(loss.detach())
    finally:
        handle.remove()
        _freeze(model)


def _freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def _without_adapter(model: Any, tokens: Tokens) -> float:
    names = [name for name, _ in model.named_parameters() if ".lora_" not in name]
    try:
        with model.disable_adapter():
            return plain_step(model, names, tokens)
    finally:
        _freeze(model)  # peft lets the adapter have gradients again when it is switched on


@dataclass(frozen=True)
class Signals:
    """What an arm says of some rows.

    Args:
        dots: [n, M].
        norm: [n].
        facts: [n, 2] loss, and the log of the head's norm.
        parts: [n, P, M + 1] dots and squared norms of groups of layers, or None.
    """

    dots: Float[np.ndarray, "n M"]
    norm: Float[np.ndarray, " n"]
    facts: Float[np.ndarray, "n 2"]
    parts: Float[np.ndarray, "n P w"] | None

    @property
    def values(self) -> Float[np.ndarray, "n q"]:
        """Cosines, up to a factor, and the log of the norm: [n, M + 1]."""
        return np.concatenate([self.dots / self.norm[:, None], np.log(self.norm)[:, None]], axis=1)


def engine_step(engine: GradientEngine) -> Callable[[Tokens], Signals]:
    """Make the collector's arm.

    Args:
        engine: with directions, entered only while it measures, since the arms share one model.

    Returns:
        Micro-batch -> signals.
    """

    def step(tokens: Tokens) -> Signals:
        with engine:
            got = engine.measure(tokens.input_ids.to(engine.device), tokens.labels.to(engine.device), tokens.lengths)
        head = np.log(np.maximum(got.head_norm.double().numpy(), 1e-12))
        return Signals(
            got.dots.numpy(), got.square.clamp_min(0).sqrt().numpy(), np.stack([got.loss.double().numpy(), head], 1),
            None if got.parts is None else got.parts.numpy(),
        )  # fmt: skip

    return step


def _draw(prepared: Prepared, count: int) -> list[TokenRow]:
    rows = sorted(prepared.pool.usable, key=lambda row: row.id)
    if not prepared.directions or min(count, len(rows)) < LEAST_ROWS:
        raise ConfigError(
            "shares are compared by cosines on some rows",
            where="gradsift doctor --layers",
            got=f"{min(count, len(rows))} rows, {len(prepared.directions)} directions",
            expected=f"at least {LEAST_ROWS} rows of the pool, and a target or an anchor",
            do="give --target or --anchor, and more rows with --rows",
        )
    draws = stream(prepared.recipe.seed, "shares").uniform([row.id for row in rows])
    drawn = [rows[i] for i in np.argsort(draws, kind="stable")[:count]]
    return sorted(drawn, key=lambda row: (row.num_tokens, row.id))


def _holdable(model: nn.Module, shares: Sequence[str], progress: Progress) -> Sequence[str]:
    """Leave those with held prompts out where the model has a state, and say so."""
    try:
        refuse_states(model)
    except ConfigError as error:
        left = [share for share in shares if share not in HELD]
        if len(left) < len(shares):
            progress.say(f"held prompts are left out: {error.what} ({error.got})")
        return left
    return shares


def _engines(
    prepared: Prepared,
    model: nn.Module,
    parameters: Parameters,
    uppers: Mapping[str, Upper],
    trained: bool,
    clock: Clock,
) -> dict[str, GradientEngine]:
    """The whole collector and one per share; a direction that both have is one tensor.

    A share's direction is the whole one's part, which differs from its own unit direction by a factor that is the same for
    every row. A tied weight's part is that of the head, and is built apart.
    """
    recipe = prepared.recipe
    projector = Projector(recipe.seed, recipe.collect.sketch_dim)

    def build(names: Sequence[str], first: int | None, trained_only: bool = False) -> list[BuiltDirection]:
        return [
            build_direction(
                source.name,
                model,
                names,
                source.usable,
                projector,
                tokens_per_batch=recipe.collect.tokens_per_batch,
                pad_id=prepared.pad_id,
                first_layer=first,
                trained_only=trained_only,
                tick=lambda n, tokens: clock.tick("anchors", n, tokens),
            )
            for source in prepared.directions
        ]

    whole = GradientEngine(model, parameters.names, projector=projector)
    built = build(parameters.names, None)
    in_part = sorted({name for upper in uppers.values() for name in upper.in_part})
    heads = build(in_part, next(iter(uppers.values())).num_layers - 1) if in_part else []
    _point(whole, {name: [d.matrices[name] for d in built] for name in whole.blocks})
    engines = {"all": whole}
    for share, upper in uppers.items():
        engine = GradientEngine(model, upper.parameters.names, projector=projector, first_layer=upper.first)
        for name, block in engine.blocks.items():
            if name not in in_part:
                block.directions = whole.blocks[name].directions
        own = {name: [h.matrices[name] * (h.norm / d.norm) for h, d in zip(heads, built, strict=True)]
               for name in upper.in_part}  # fmt: skip
        _point(engine, own)
        engines[share] = engine
    if trained:
        del built, heads  # as large as the model, each
        engines[TRAINED] = GradientEngine(model, parameters.names, projector=projector, trained_only=True)
        own_built = build(parameters.names, None, True)
        _point(engines[TRAINED], {name: [d.matrices[name] for d in own_built] for name in engines[TRAINED].blocks})
        if engines[TRAINED].road == "tiles":
            engines[SCREEN] = _folded(engines[TRAINED], parameters.names)
    return engines


def _folded(exact: GradientEngine, names: Sequence[str]) -> GradientEngine:
    """The collector of ``--screen trained``, whose directions fold to a tenth of the exact one's."""
    engine = GradientEngine(exact.model, names, projector=exact.projector, trained_only=True)
    engine.num_directions = exact.num_directions
    for name, block in engine.blocks.items():
        block.directions = exact.blocks[name].directions
    keep_parts(engine)
    fold_directions(engine)
    return engine


def _point(engine: GradientEngine, matrices: Mapping[str, Sequence[Tensor]]) -> None:
    for name, some in matrices.items():
        engine.blocks[name].directions = engine.flatten(name, some)
    engine.num_directions = next(
        block.directions.shape[0] for block in engine.blocks.values() if block.directions is not None
    )


def _run(
    arms: Sequence[_Arm],
    rows: Sequence[TokenRow],
    batches: Sequence[Sequence[int]],
    rounds: int,
    pad_id: int,
    clock: Clock,
) -> dict[str, Signals]:
    """Run every micro-batch by every arm; CPU seconds go to the arms, signals are returned."""
    for arm in arms:
        arm.seconds[:] = [0.0] * rounds
        arm.step(collate(rows, batches[0], pad_id))  # nothing is built inside a timer
    found: dict[str, list[Any]] = {arm.key: [] for arm in arms}
    for number, batch in enumerate(batches):
        tokens = collate(rows, batch, pad_id)
        shift = (number * 3) % len(arms)  # a stride, so that no arm always follows the same one
        for arm in (*arms[shift:], *arms[:shift]):
            begun = time.process_time()
            got = arm.step(tokens)
            arm.seconds[number % rounds] += time.process_time() - begun
            found[arm.key].append(got)
            clock.tick("shares", 0, int(tokens.lengths.sum()))
    return {key: _joined(some) for key, some in found.items() if key not in ("plain", "whole")}


def _joined(some: Sequence[Signals]) -> Signals:
    parts = None if some[0].parts is None else np.concatenate([one.parts for one in some if one.parts is not None])
    dots, norm, facts = (np.concatenate([getattr(one, name) for one in some]) for name in ("dots", "norm", "facts"))
    return Signals(dots, norm, facts, parts)


def _table(
    arms: Sequence[_Arm],
    found: Mapping[str, Signals],
    parameters: Parameters,
    prepared: Prepared,
    rows: Sequence[TokenRow],
    rounds: int,
) -> ShareTable:
    by_key = {arm.key: arm for arm in arms}
    plain, whole = by_key["plain"], by_key.get("whole", by_key["plain"])
    truth = found["all"].values
    names = [*(source.name for source in prepared.directions), "norm"]

    def ranks(said: np.ndarray, true: np.ndarray) -> dict[str, Correlation]:
        return {name: spearman_interval(said[:, j], true[:, j]) for j, name in enumerate(names)}

    lines = []
    for arm in arms:
        if arm.key in ("plain", "whole"):
            continue
        own = {} if arm.key == "all" else ranks(found[arm.key].values, truth)
        costs = (arm.seen / parameters.numel, ratio(arm, plain), ratio(arm, whole))
        lines.append(ShareLine(arm.key, arm.part, *costs, own))
        if arm.key == SCREEN:
            order = np.argsort(
                stream(prepared.recipe.seed, "shares/fit").uniform([row.id for row in rows]), kind="stable"
            )
            fitted = min(prepared.recipe.screen.calibrate, 2 * len(rows) // 3)
            said = _predicted(found[SCREEN], truth, rows, order[:fitted])
            if said is not None:
                rest = order[fitted:]
                text = f"the same, predicted by a fit on {fitted} rows, judged on the other {len(rest)}"
                text += "" if said.parts else "; too few rows to fit groups of layers apart"
                lines.append(ShareLine(PREDICTED, text, *costs, ranks(said.values[rest], truth[rest])))
    return ShareTable(
        tuple(lines), len(rows), sum(row.num_tokens for row in rows), rounds, sum(plain.seconds), sum(whole.seconds)
    )


class _Said(NamedTuple):
    """A prediction [n, q], and whether groups of layers were fitted apart."""

    values: Float[np.ndarray, "n q"]
    parts: bool


def _predicted(
    cheap: Signals, truth: Float[np.ndarray, "n q"], rows: Sequence[TokenRow], at: Int[np.ndarray, " f"]
) -> _Said | None:
    """Predict exact signals as the screen does, or None where too few rows are fitted on or left."""
    lengths = np.log([[row.num_tokens, row.num_trained] for row in rows])
    columns, ridge = [cheap.values, cheap.facts, lengths], PLAIN_RIDGE
    parts = None if cheap.parts is None else part_columns(cheap.parts.astype(np.float64), cheap.norm, len(at))
    if parts is not None:
        columns, ridge = [*columns, parts], RIDGE
    features = np.concatenate(columns, axis=1)
    if len(at) <= features.shape[1] + 1 or len(rows) - len(at) < LEAST_ROWS:
        return None
    return _Said(fit_screen(features[at], truth[at], ridge=ridge).predict(features), parts is not None)


def ratio(arm: Any, against: Any) -> Ratio:
    """Divide the seconds of two arms round by round.

    Args:
        arm: has ``seconds``, one entry a round.
        against: likewise.

    Returns:
        Median, least and largest.
    """
    ratios = [a / b for a, b in zip(arm.seconds, against.seconds, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
