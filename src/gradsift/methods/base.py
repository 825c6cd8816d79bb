"""What a method is: its needs, the protocol and the registry; with the helpers that every method uses.

A method is a frozen dataclass whose fields are its settings. It declares what it needs, so a missing anchor or target
is refused before a model loads, and it never walks the pool itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
from pydantic import TypeAdapter, ValidationError

from gradsift.errors import ConfigError, NumericsError, SignalError
from gradsift.geometry.checkpoints import Warmup
from gradsift.geometry.trust import Prior
from gradsift.methods.audit import NO_CUT, build_selection, refuse_empty, select_ranked
from gradsift.methods.taking import Allowance, Taken, refuse_empty_pool, resolve_budget, shortage_note, take_ranked
from gradsift.seeds import Stream
from gradsift.types import SIGNALS, Budget, Column, Problem, Selection

__all__ = [
    "NO_CUT",
    "Allowance",
    "Method",
    "Needs",
    "Taken",
    "build_selection",
    "make_method",
    "methods",
    "refuse_empty",
    "refuse_empty_pool",
    "register",
    "require",
    "resolve_budget",
    "select_ranked",
    "shortage_note",
    "take_ranked",
]

FORWARD_SIGNALS = frozenset({"loss", "embedding", "prompt_loss", "alone_loss", "hidden"})
TEXT_SIGNALS = frozenset({"lexical", "likeness", "num_prompt", "importance"})
PROBE_SIGNALS = frozenset({"held_out_loss"})
GRADIENT_SIGNALS = frozenset(SIGNALS) - FORWARD_SIGNALS - TEXT_SIGNALS - PROBE_SIGNALS


@dataclass(frozen=True)
class Needs:
    """What a method must be given.

    Args:
        signals: names out of :data:`gradsift.types.SIGNALS`.
        anchors: at least one protect anchor.
        target: a target set.
        constrains: the method constrains on anchors, so weak ones need ``allow_weak_anchor``.
        probes: which rows short trainings of the navigator learn from, or None where none are trained.
        rollouts: short trainings of the navigator on schedules that the method makes, measured on held-out rows.
        domains: pool rows of at least two given labels.
        proxy: a training of the navigator that is measured round by round and whose mixture the method steers.
        columns: columns of the raw rows; a pool without them is refused before a model loads.
        layers: which layers' hidden states, rising; given exactly when ``hidden`` is a signal.
        texts: prompt and response of every row as plain text, and ``num_prompt``.
        warmup: the navigator is trained on the pool first, and measured at checkpoints of that; None measures it as it is.
        least_rows: usable rows below which the pool is refused before a model loads.
        each_label: ``least_rows`` are those of every label of the pool that has any.
        by_row: rows are judged one by one: a row chosen out of all rows is also chosen out of any part of them that holds
            it, at the same budget of rows. What a screen loses can then be bounded.
    """

    signals: frozenset[str] = frozenset()
    anchors: bool = False
    target: bool = False
    constrains: bool = False
    probes: Prior | None = None
    rollouts: bool = False
    domains: bool = False
    proxy: bool = False
    columns: tuple[Column, ...] = ()
    layers: tuple[int, ...] = ()
    texts: bool = False
    warmup: Warmup | None = None
    least_rows: int = 0
    each_label: bool = False
    by_row: bool = False

    def __post_init__(self) -> None:
        if bool(self.layers) != ("hidden" in self.signals):
            raise ValueError("layers are named exactly when hidden states are a signal")
        if (self.probes is not None) != bool(self.signals & PROBE_SIGNALS):
            raise ValueError("probes are named exactly when a signal needs them")

    @property
    def gradients(self) -> bool:
        """Whether a signal needs a backward pass."""
        return bool(self.signals & GRADIENT_SIGNALS)

    @property
    def cost_class(self) -> str:
        """What measuring takes, the dearest part.

        ``text`` no model, ``forward`` one forward per row, ``probe`` one forward and several short trainings,
        ``proxy`` one forward and one training of the navigator in rounds, ``gradient`` one forward and backward per row
        (and the probes, roll-outs or proxy, where there are any), ``trained`` a training of the navigator on the pool before
        that, and such a pass per checkpoint.
        """
        if self.gradients:
            return "trained" if self.warmup is not None and self.warmup.epochs else "gradient"
        if self.proxy:
            return "proxy"
        if self.probes is not None:
            return "probe"
        return "forward" if self.signals & FORWARD_SIGNALS else "text"


@runtime_checkable
class Method(Protocol):
    """The protocol of an offline method."""

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    evidence: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """What must be given; may depend on the settings."""
        ...

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Choose rows of the problem within the budget."""
        ...


_REGISTRY: dict[str, type[Any]] = {}
C = TypeVar("C", bound=type[Any])


def register(cls: C) -> C:
    """Class decorator: put a method into the registry under its ``name``.

    Args:
        cls: a frozen dataclass that satisfies :class:`Method`.

    Returns:
        The class, unchanged.

    Raises:
        ConfigError: the name is taken by another class.
    """
    taken = _REGISTRY.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(
            "a method name is registered twice", got=cls.name, where=f"{taken!r} and {cls!r}", do="rename one of them"
        )
    _REGISTRY[cls.name] = cls
    return cls


def methods() -> Mapping[str, type[Any]]:
    """List every registered method, third-party ones included.

    Returns:
        Classes by name, sorted.
    """
    _register_third_parties()
    return dict(sorted(_REGISTRY.items()))


@functools.cache  # reading every installed package's metadata takes milliseconds
def _register_third_parties() -> None:
    for point in entry_points(group="gradsift.methods"):
        register(point.load())


def make_method(name: str, settings: Mapping[str, Any], where: str = "--set") -> Method:
    """Build a method from its name and settings, checking both.

    Args:
        name: registered name.
        settings: the method's own fields.
        where: what a person is told is wrong.

    Returns:
        The method.

    Raises:
        ConfigError: the name or a setting is unknown, or a value has the wrong type; the known ones are listed.
    """
    known = methods()
    if name not in known:
        raise ConfigError(
            "there is no such method", where="--method", got=name, expected=", ".join(known), do="run gradsift methods"
        )
    cls = known[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(settings) - fields)
    if unknown:
        raise ConfigError(
            f"{name} has no such setting",
            where=where,
            got=", ".join(unknown),
            expected=", ".join(sorted(fields)) or "no settings",
            do="run gradsift methods",
        )
    adapter: TypeAdapter[Any] = TypeAdapter(cls)
    try:
        return adapter.validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"a setting of {name} has a wrong value",
            where=f"{where} {'.'.join(map(str, first['loc']))}",
            got=repr(first["input"]),
            expected=first["msg"],
        ) from None


def require(problem: Problem, method: Method) -> None:
    """Refuse a problem that lacks a signal or a direction the method needs.

    Args:
        problem: the eligible rows.
        method: the method about to run.

    Raises:
        SignalError: a needed signal is None, or an anchor or the target is missing; it is named.
        NumericsError: a gradient norm is not above 0, so the row has no direction.
    """
    refuse_empty_pool(problem)
    _require_directions(problem, method)
    for name in sorted(method.needs.signals):
        if getattr(problem, name) is None:
            raise SignalError(
                f"{method.name} needs the signal {name}",
                where="the collected signals",
                got="not measured",
                expected=f"a store that holds {name}",
                do="collect again with the same --out",
            )
    _require_text(problem, method)
    _require_checkpoints(problem, method)
    if method.needs.proxy and problem.proxy is None:
        raise SignalError(
            f"{method.name} needs a proxy run of the navigator",
            where="the problem",
            got="no proxy",
            expected="a navigator in training",
            do="run it by gradsift select or gradsift compare",
        )
    if method.needs.rollouts and problem.learner is None:
        raise SignalError(
            f"{method.name} needs roll-outs of the navigator",
            where="the problem",
            got="no learner",
            expected="a navigator in training",
            do="run it by gradsift select or gradsift compare",
        )
    if "grad_norm" in method.needs.signals and problem.grad_norm is not None and (problem.grad_norm <= 0).any():
        bad = int(np.flatnonzero(problem.grad_norm <= 0)[0])
        raise NumericsError(
            "signal grad_norm is not above 0",
            where=f"row {problem.ids[bad]}",
            got=str(problem.grad_norm[bad]),
            expected="a positive norm: a zero gradient has no direction",
            do="give such rows the status ZERO_GRAD before selecting",
        )


def _require_text(problem: Problem, method: Method) -> None:
    """Columns, texts and layers: what is asked for by more than a signal's name."""
    missing = [f"column {c.name}" for c in method.needs.columns if c.name not in problem.external]
    missing += ["texts"] if method.needs.texts and not problem.texts else []
    missing += [f"hidden layer {n}" for n in method.needs.layers if problem.hidden is not None
                and n not in problem.hidden_layers]  # fmt: skip
    if missing:
        raise SignalError(
            f"{method.name} needs what the rows do not have: {', '.join(missing)}",
            where="the problem",
            got="not there",
            do="run it by gradsift select on rows that have it",
        )


def _require_checkpoints(problem: Problem, method: Method) -> None:
    warmup = method.needs.warmup
    if warmup is None or warmup.direction == "none":
        return
    found = len(problem.checkpoints)
    if found != warmup.num_checkpoints:
        raise SignalError(
            f"{method.name} needs the rows' directions at checkpoints of a warm-up",
            where="the problem",
            got=f"{found} checkpoints",
            expected=f"{warmup.num_checkpoints}",
            do="run it by gradsift select or gradsift compare",
        )


def _require_directions(problem: Problem, method: Method) -> None:
    # Probes compare with the losses of anchor rows and need no direction.
    given = problem.anchor_loss is not None and problem.anchor_loss.size if method.needs.probes else problem.anchors
    if method.needs.proxy:  # anchors are tasks of the training, whose rows need no direction
        given = given or (problem.proxy is not None and len(problem.proxy.tasks) > 1)
    if method.needs.anchors and not given:
        raise SignalError(
            f"{method.name} needs at least one protect anchor",
            where="anchors",
            got="none",
            do="give one: --anchor NAME=PATH",
        )
    # BM25 compares with the target's words: it needs the rows of a target, not their gradient.
    if method.needs.target and method.needs.gradients and problem.target is None:
        raise SignalError(f"{method.name} needs a target", where="target", got="none", do="give one: --target PATH")
    if method.needs.target and "embedding" in method.needs.signals and problem.target_embedding is None:
        raise SignalError(
            f"{method.name} needs the embeddings of target rows",
            where="target",
            got="none",
            do="give one: --target PATH",
        )
