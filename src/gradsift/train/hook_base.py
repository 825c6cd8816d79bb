"""What all gradient-surgery step hooks share: when references are measured, what is counted, how gradients are written back.

A hook acts once per optimizer step on the accumulated gradient, before clipping and the optimizer (surgery.md 3.1). Adam's
preconditioning and momentum and decoupled weight decay act after it, so the step that is taken may still oppose a reference:
what it did is measured after every refresh.
"""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from gradsift.errors import ConfigError, NumericsError
from gradsift.train.hook_reference import Sources, flat_gradient, mean_gradient, reference_cost
from gradsift.train.hook_tally import Tally, cosines, remarks, summarize
from gradsift.train.parts import Cost, trainable
from gradsift.train.surgery import dot
from gradsift.types import Note

PATIENCE = 3  # unusable references in a row
ROUNDING = 1e-3  # cosines of a difference of float32 weights are not known better


@dataclass(frozen=True)
class HookSettings:
    """Settings of every step hook.

    Args:
        num_reference: rows drawn from each source at a refresh.
        num_pool: rows of each source that are drawn from, fixed for the run.
        refresh: optimizer steps between refreshes; 0 measures once, before the first step.
        tokens_per_batch: longest row times rows of a reference micro-batch.
        measure_update: after every refresh keep the weights for one step and measure what the optimizer did.
    """

    num_reference: Annotated[int, Field(ge=1)] = 64
    num_pool: Annotated[int, Field(ge=1)] = 400
    refresh: Annotated[int, Field(ge=0)] = 10
    tokens_per_batch: Annotated[int, Field(ge=1)] = 2048
    measure_update: bool = True


@dataclass(frozen=True)
class Moment:
    """What a rule looks at.

    Args:
        g: [P] the step's gradient.
        references: [M, P] the sources' gradients.
        names: names of the trainable tensors.
        shapes: their shapes, in the order of ``g``.
        step: optimizer step.
    """

    g: Float[Tensor, " P"]
    references: Float[Tensor, "M P"]
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    step: int

    @property
    def spans(self) -> tuple[slice, ...]:
        """Place of every tensor in ``g``."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        return tuple(slice(int(end) - math.prod(shape), int(end)) for end, shape in zip(ends, self.shapes, strict=True))


@dataclass(frozen=True)
class Outcome:
    """What a rule decided.

    Args:
        z: [P] the gradient for the optimizer; the moment's ``g`` itself where nothing is to be done.
        projected: whether something was taken out.
    """

    z: Float[Tensor, " P"]
    projected: bool


class SurgeryHook(ABC):
    """Base of the step hooks; a subclass gives :meth:`rule` and may change what is measured.

    Args:
        name: registered name.
        settings: of the hook.
        sources: reference rows.
    """

    def __init__(self, name: str, settings: Any, sources: Sources) -> None:
        self.name, self.settings, self.sources = name, settings, sources
        self.cost = Cost()
        self.tally = Tally()
        self.references: Tensor | None = None
        self.refreshed_at = 0
        self.bad_in_row = 0
        self._before: Tensor | None = None  # weights at the last refresh, for one step

    def __call__(self, model: nn.Module, step: int) -> None:
        """Edit ``.grad`` of the trainable parameters; a step whose gradient vanishes is skipped (gradients None)."""
        started = time.perf_counter()
        model = unwrap(model)
        named = trainable(model)
        parameters = [p for _, p in named]
        self._measure_update(parameters)
        g = flat_gradient(parameters, [p.grad for p in parameters])
        self.tally.count("num_steps")
        length = math.sqrt(dot(g, g))
        if not math.isfinite(length):
            self.tally.count("num_nonfinite_steps")
        elif self._ready(model, step, g, parameters):
            assert self.references is not None
            names, shapes = tuple(name for name, _ in named), tuple(p.shape for p in parameters)
            outcome = self.rule(Moment(g, self.references, names, shapes, step))
            self._record(g, outcome, length)
            if outcome.z is not g:
                write_back(parameters, outcome.z)
        self.cost += Cost(seconds=time.perf_counter() - started)

    @abstractmethod
    def rule(self, moment: Moment) -> Outcome:
        """Decide what the optimizer gets."""

    def measure(self, model: nn.Module, step: int) -> Float[Tensor, "M P"]:
        """Measure the sources' gradients at the current weights."""
        found = []
        for name in self.sources.names:
            rows = self.sources.draw(name, step)
            found.append(mean_gradient(model, rows, self.sources))
            self.spend(model, rows)
        return torch.stack(found)

    def directions(self, references: Float[Tensor, "M P"]) -> Float[Tensor, "K P"]:
        """Return what the rule divides by the length of; one of length 0 makes the references unusable."""
        return references

    def spend(self, model: nn.Module, rows: Sequence[Any], *, forwards: int = 1, backwards: int = 1) -> None:
        """Count a pass over reference rows."""
        self.cost += reference_cost(model, rows, forwards=forwards, backwards=backwards)
        self.tally.count("reference_passes")

    def _ready(self, model: nn.Module, step: int, g: Tensor, parameters: list[nn.Parameter]) -> bool:
        """Refresh if it is time; False where the step must pass as it is."""
        refresh = self.settings.refresh
        if self.references is not None and (refresh == 0 or step - self.refreshed_at < refresh):
            return True
        stale = self.references
        self.references = self._usable(self.measure(model, step), step)
        self.refreshed_at = step
        if self.references is None:
            return False
        self._record_refresh(g, stale)
        if self.settings.measure_update:
            self._before = torch.cat([p.detach().reshape(-1) for p in parameters])
        return True

    def _usable(self, references: Tensor, step: int) -> Tensor | None:
        """Return the references, or None where one is zero or not finite; three such in a row are an error."""
        lengths = [math.sqrt(dot(row, row)) for row in self.directions(references)]
        if all(math.isfinite(length) and length > 0 for length in lengths):
            self.bad_in_row = 0
            return references
        self.tally.count("num_bad_references")
        self.bad_in_row += 1
        if self.bad_in_row >= PATIENCE:
            raise NumericsError(
                f"the reference gradient is zero or not finite {PATIENCE} times in a row",
                where=f"step hook {self.name}, step {step}, sources {', '.join(self.sources.names)}",
                got=f"lengths {', '.join(f'{length:.3g}' for length in lengths)}",
                expected="finite lengths above 0",
                do="look at the reference rows, or lower the learning rate",
            )
        return None

    def _record_refresh(self, g: Tensor, stale: Tensor | None) -> None:
        assert self.references is not None
        fresh = cosines(self.references, g)
        for name, value in zip(self.sources.names, fresh, strict=False):
            self.tally.add(f"fresh_cosine/{name}", value)
        if stale is not None:
            old = cosines(stale, g)
            self.tally.count("stale_checks", len(old))
            self.tally.count("stale_disagreements", int((np.sign(old) != np.sign(fresh)).sum()))

    def _record(self, g: Tensor, outcome: Outcome, length: float) -> None:
        assert self.references is not None
        before = cosines(self.references, g)
        for name, value in zip(self.sources.names, before, strict=False):
            self.tally.add(f"cosine/{name}", value)
            self.tally.count(f"conflicts/{name}", int(value < 0))
        left = math.sqrt(dot(outcome.z, outcome.z))
        self.tally.add("norm_ratio", left / length if length > 0 else 1.0)
        if outcome.projected:
            self.tally.count("num_projected")
            if left > 0 and len(before):
                self.tally.worst_after = min(self.tally.worst_after, float(cosines(self.references, outcome.z).min()))
        elif (before < 0).any():
            self.tally.count("num_hidden")
        if left == 0 and length > 0:
            self.tally.count("num_skipped")

    def _measure_update(self, parameters: list[nn.Parameter]) -> None:
        """Cosine of what the optimizer took off the weights with the references measured just before it."""
        before, self._before = self._before, None
        if before is None or self.references is None:
            return
        taken = before - torch.cat([p.detach().reshape(-1) for p in parameters])
        if not taken.any():
            return  # a learning rate of 0, as in the first step of a warm-up
        for name, value in zip(self.sources.names, cosines(self.references, taken.to(self.references)), strict=False):
            self.tally.add("update_cosine", value)
            self.tally.add(f"update_cosine/{name}", value)
            self.tally.count("updates_opposed", int(value < -ROUNDING))

    def summary(self) -> Mapping[str, float]:
        """Return figures for the report; see :func:`gradsift.train.hook_tally.summarize`."""
        return summarize(self.tally, self.sources.names, self.cost)

    def notes(self) -> tuple[Note, ...]:
        """Return counted remarks for the report."""
        sizes = {name: len(rows) for name, rows in self.sources.rows.items()}
        return remarks(self.tally, sizes, self.settings.num_reference)

    def state(self) -> dict[str, Any]:
        """Copy what later steps depend on, in plain values and tensors, so that a resumed run goes the same way.

        Returns:
            Independent of the hook.
        """
        kept = {"references": self.references, "before": self._before}
        return {
            **{name: None if value is None else value.detach().clone() for name, value in kept.items()},
            "refreshed_at": self.refreshed_at,
            "bad_in_row": self.bad_in_row,
            "tally": dataclasses.asdict(self.tally),
            "cost": dataclasses.asdict(self.cost),
        }

    def restore(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Go back to a state.

        Args:
            state: from :meth:`state`.
            device: where the tensors go; where they are by default.
        """
        kept = {name: state[name] for name in ("references", "before")}
        moved = {name: None if value is None else value.clone().to(device) for name, value in kept.items()}
        self.references, self._before = moved["references"], moved["before"]
        self.refreshed_at, self.bad_in_row = state["refreshed_at"], state["bad_in_row"]
        self.tally = Tally(dict(state["tally"]["counts"]), dict(state["tally"]["sums"]), state["tally"]["worst_after"])
        self.cost = Cost(**state["cost"])


def write_back(parameters: Sequence[nn.Parameter], z: Float[Tensor, " P"]) -> None:
    """Put a flat gradient into ``.grad``; where nothing is left at all, the gradients become None.

    None makes every optimizer skip the step; zeros would still move the weights by momentum.

    Args:
        parameters: the trainable parameters in model order.
        z: the gradient.
    """
    skip, at = not bool(z.any()), 0
    for parameter in parameters:
        part = z[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
        if skip:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad.copy_(part)
        elif part.any():
            parameter.grad = part.to(parameter.dtype, copy=True)


def unwrap(model: nn.Module) -> nn.Module:
    """Take the model out of DistributedDataParallel, and refuse sharded parameters.

    Args:
        model: as the trainer holds it.

    Returns:
        The plain model.

    Raises:
        ConfigError: parameters are sharded over processes, so that a local dot would decide for one shard alone.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    for name, parameter in model.named_parameters():
        if (
            hasattr(parameter, "device_mesh")
            or hasattr(parameter, "ds_id")
            or type(parameter).__name__ == "FlatParameter"
        ):
            raise ConfigError(
                "step hooks need whole parameters on every process",
                where=name,
                got=f"a parameter sharded over processes ({type(parameter).__name__})",
                expected="one process, or data-parallel processes with whole copies",
                do="train without sharding, or without a step hook",
            )
    return model
