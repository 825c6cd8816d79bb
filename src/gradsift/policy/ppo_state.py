"""Where the training of a policy stands, as a value that can be written as plain arrays and read back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from gradsift.errors import SpecError, StoreError
from gradsift.policy.descent import Descent
from gradsift.policy.multiplier import MultiplierConfig, MultiplierState
from gradsift.policy.network import Shape
from gradsift.policy.ppo_update import PPOConfig

T = TypeVar("T")
DUALS = ("pi", "paper")


@dataclass(frozen=True)
class Probe:
    """What simple episodes reach before any training (ogs.md 3.4, step 1).

    Args:
        gain: float64 [K+1] fall of the target loss, preferring each single cluster, and drawing uniformly.
        rise: float64 [K+1, M] rises of the sources' losses, in nats.
        fits: whether one of them, or the cost-only policy, kept every limit.
        num_cost_epochs: epochs of the cost-only policy; 0 when it was not needed.
        smallest: float64 [M] smallest rise of each source that any of these reached, not necessarily together.
        num_decisions: decisions played for it, those of the cost-only policy included.
    """

    gain: Float[np.ndarray, " S"]
    rise: Float[np.ndarray, "S M"]
    fits: bool
    num_cost_epochs: int
    smallest: Float[np.ndarray, " M"]
    num_decisions: int


@dataclass(frozen=True)
class Kept:
    """A policy worth keeping, as it was deployed: greedy or dealt.

    Args:
        actor: float32 [P].
        prices: float64 [M] what it saw.
        dealt: whether its mode is ``deal``; else ``greedy``.
        gain: fall of the target loss over its one episode, in nats.
        rise: float64 [M] rises of the sources' losses.
        feasible: whether every limit was kept.
        epoch: after which it stood; 0 for the cost-only policy.
    """

    actor: Float[np.ndarray, " P"]
    prices: Float[np.ndarray, " M"]
    dealt: bool
    gain: float
    rise: Float[np.ndarray, " M"]
    feasible: bool
    epoch: int


@dataclass(frozen=True)
class History:
    """One row per finished epoch.

    Args:
        gain: float64 [n] mean fall of the target loss of the sampled episodes, in nats.
        rise: float64 [n, M] mean rises of the sources' losses of the sampled episodes.
        price: float64 [n, M] multipliers after the epoch's step.
        kl: float64 [n] divergence of the epoch's update, in nats.
        greedy_gain: float64 [n] of the greedy episode after the epoch.
        greedy_rise: float64 [n, M] of the greedy episode.
        dealt_gain: float64 [n] of the dealt episode after the epoch.
        dealt_rise: float64 [n, M] of the dealt episode.
        decisions: int64 [n] decisions played in the epoch, those of both deployed episodes included.
    """

    gain: Float[np.ndarray, " n"]
    rise: Float[np.ndarray, "n M"]
    price: Float[np.ndarray, "n M"]
    kl: Float[np.ndarray, " n"]
    greedy_gain: Float[np.ndarray, " n"]
    greedy_rise: Float[np.ndarray, "n M"]
    dealt_gain: Float[np.ndarray, " n"]
    dealt_rise: Float[np.ndarray, "n M"]
    decisions: np.ndarray

    def add(self, **row: Any) -> History:
        """Append an epoch.

        Args:
            **row: one value per field.

        Returns:
            A longer history.
        """
        return History(**{f.name: np.concatenate([getattr(self, f.name), np.asarray(row[f.name])[None]]) for f in fields(self)})  # fmt: skip


def empty_history(num_sources: int) -> History:
    """No epoch yet.

    Args:
        num_sources: M.

    Returns:
        A history of length 0.
    """
    one, many = np.zeros(0), np.zeros((0, num_sources))
    return History(one, many, many, one, one, many, one, many, np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class TrainState:
    """Everything the next epoch depends on.

    Args:
        seed: of the run.
        config: settings of the run.
        shape: sizes of the networks.
        actor: weights and moments.
        critic: weights and moments.
        multiplier: prices.
        scale: float64 [1+M] unit of reward and costs for the critics, in nats.
        probe: what was found before.
        best: the policy kept so far; None before the first greedy episode.
        history: of finished epochs.
    """

    seed: int
    config: PPOConfig
    shape: Shape
    actor: Descent
    critic: Descent
    multiplier: MultiplierState
    scale: Float[np.ndarray, " A"]
    probe: Probe
    best: Kept | None
    history: History

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.history.gain)


PARTS = ("shape", "actor", "critic", "multiplier", "probe", "best", "history")


def _flat(config: PPOConfig) -> dict[str, Any]:
    settings = asdict(config)
    return settings | {f"multiplier.{k}": v for k, v in settings.pop("multiplier").items()}


def to_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Write a state as named arrays of numbers: no object, no text, so that any plain format holds them.

    Args:
        state: the state.

    Returns:
        Copies, ``part/field`` -> array; numbers are 0-d arrays.
    """
    out = {"seed": np.array(state.seed), "scale": state.scale.copy()}
    for name, value in _flat(state.config).items():
        out[f"config/{name}"] = np.array(DUALS.index(value) if name == "multiplier.dual" else value)
    for part in PARTS:
        value = getattr(state, part)
        if value is not None:
            out |= {f"{part}/{f.name}": np.array(getattr(value, f.name)) for f in fields(value)}
    return out


def from_arrays(arrays: Mapping[str, np.ndarray]) -> TrainState:
    """Read a state back.

    Args:
        arrays: what :func:`to_arrays` gave.

    Returns:
        The same state, bit for bit.

    Raises:
        StoreError: an array is missing.
    """
    try:
        best = _read(Kept, "best", arrays) if "best/actor" in arrays else None
        return TrainState(
            int(arrays["seed"]), _config(arrays), _read(Shape, "shape", arrays), _read(Descent, "actor", arrays),
            _read(Descent, "critic", arrays), _read(MultiplierState, "multiplier", arrays), np.array(arrays["scale"]),
            _read(Probe, "probe", arrays), best, _read(History, "history", arrays),
        )  # fmt: skip
    except KeyError as missing:
        raise StoreError("the checkpoint of the policy's training is incomplete", where=str(missing),
                         do="delete it; the epochs before it are done again") from missing  # fmt: skip


def _read(kind: type[T], part: str, arrays: Mapping[str, np.ndarray]) -> T:
    return kind(**{f.name: _value(arrays[f"{part}/{f.name}"]) for f in fields(kind)})  # type: ignore[arg-type]


def _config(arrays: Mapping[str, np.ndarray]) -> PPOConfig:
    settings = {f.name: _value(arrays[f"config/{f.name}"]) for f in fields(PPOConfig) if f.name != "multiplier"}
    dual = {f.name: _value(arrays[f"config/multiplier.{f.name}"]) for f in fields(MultiplierConfig)}
    return PPOConfig(**settings, multiplier=MultiplierConfig(**dual | {"dual": DUALS[dual["dual"]]}))


def _value(array: np.ndarray) -> Any:
    return np.array(array) if array.ndim else array.item()


def check_continues(state: TrainState, config: PPOConfig, seed: int, shape: Shape) -> None:
    """Refuse to go on under other settings than those a state was made with.

    Args:
        state: where to go on.
        config: settings asked for; the number of epochs counts too, as the step size follows it.
        seed: of the run asked for.
        shape: sizes that the process asks for.

    Raises:
        SpecError: something differs; it is named.
    """
    old, new = _flat(state.config), _flat(config)
    asked = {"seed": seed} | {f"shape.{k}": v for k, v in asdict(shape).items()} | new
    had = {"seed": state.seed} | {f"shape.{k}": v for k, v in asdict(state.shape).items()} | old
    for name, value in asked.items():
        if had[name] != value:
            raise SpecError("the checkpoint was made with another setting", where=name, got=value,
                            expected=str(had[name]), do="use the old setting, or start again without it")  # fmt: skip
