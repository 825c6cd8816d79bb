"""Step hooks with one reference gradient per source: A-GEM, GEM, PCGrad, SafeGrad's projection, OGPSA.

The rules themselves are in :mod:`gradsift.train.surgery`; here is which references each is given and what it counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from gradsift.seeds import stream
from gradsift.train.hook_base import HookSettings, Moment, Outcome, SurgeryHook
from gradsift.train.hook_reference import BaseKL, Sources, agree, mean_gradient
from gradsift.train.hook_tally import Tally
from gradsift.train.surgery import Combine, OgpsaMode, agem, gem, gram_matrix, ogpsa, pcgrad, pcgrad_coefficients
from gradsift.types import Note

Granularity = Literal["model", "tensor"]
ORIGIN = 1e-5  # mean total variation to the original model below which a KL has no direction but rounding


@dataclass(frozen=True)
class AgemSettings(HookSettings):
    """Settings of ``agem``.

    Args:
        granularity: ``model`` is A-GEM; ``tensor`` constrains every tensor by itself, is stronger, and is called
            ``agem_per_tensor``.
    """

    granularity: Granularity = "model"


@dataclass(frozen=True)
class GemSettings(HookSettings):
    """Settings of ``gem``.

    Args:
        granularity: as in ``agem``.
        eps: diagonal term of the dual, relative to the mean diagonal.
        margin: lower bound on the multipliers (``memory_strength``).
    """

    granularity: Granularity = "model"
    eps: Annotated[float, Field(gt=0)] = 1e-6
    margin: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True)
class PcgradSettings(HookSettings):
    """Settings of ``pcgrad``.

    Args:
        combine: sum as in the paper, or mean.
    """

    combine: Combine = "sum"


@dataclass(frozen=True)
class SafegradSettings(HookSettings):
    """Settings of ``safegrad``.

    Args:
        alpha: weight of the alignment gradient added after projection; 0 is the pure projection.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True)
class OgpsaSettings(HookSettings):
    """Settings of ``ogpsa``.

    Args:
        mode: ``orthogonal_projection`` always, ``threshold`` only where a tensor opposes a reference.
        base_scale: factor for tensors that oppose none, in ``threshold``.
    """

    mode: OgpsaMode = "orthogonal_projection"
    base_scale: Annotated[float, Field(gt=0)] = 1.0


class AgemHook(SurgeryHook):
    """A-GEM against the mean of the sources' gradients, not scaled to one length (arXiv 1812.00420)."""

    def directions(self, references: Float[Tensor, "M P"]) -> Float[Tensor, "K P"]:
        """Return the mean, whose length the rule divides by."""
        return references.mean(0, keepdim=True)

    def rule(self, moment: Moment) -> Outcome:
        """Project on the plane of the mean reference where the step opposes it."""
        mean = dataclasses.replace(moment, references=moment.references.mean(0, keepdim=True))
        z = apply(mean, self.settings.granularity, lambda g, parts: agem(g, parts[0]), self.tally)
        return Outcome(z, z is not moment.g)

    def notes(self) -> tuple[Note, ...]:
        """Return the remarks of every hook, and one where the mean may hide an opposed source."""
        if len(self.sources.names) < 2:
            return super().notes()
        text = "the mean of several sources can hide one that is opposed (steps counted); gem constrains each"
        return (*super().notes(), Note("agem_mean_hides", text, self.tally.counts.get("num_hidden", 0)))


class GemHook(SurgeryHook):
    """GEM: the nearest gradient that opposes no source (arXiv 1706.08840)."""

    def _usable(self, references: Tensor, step: int) -> Tensor | None:
        usable = super()._usable(references, step)
        if usable is not None:
            gram = gram_matrix(usable)
            scale = np.sqrt(np.diag(gram))
            condition = float(np.linalg.cond(gram / np.outer(scale, scale)))
            self.tally.sums["gram_condition"] = max(self.tally.sums.get("gram_condition", 1.0), condition)
        return usable

    def rule(self, moment: Moment) -> Outcome:
        """Solve the dual where the step opposes a source."""
        kind = {"eps": self.settings.eps, "margin": self.settings.margin}
        z = apply(moment, self.settings.granularity, lambda g, parts: gem(g, parts, **kind), self.tally)
        return Outcome(z, z is not moment.g)

    def summary(self) -> Mapping[str, float]:
        """Return the figures of every hook and the worst condition number of the sources' Gram matrix."""
        return {**super().summary(), "gram_condition": self.tally.sums.get("gram_condition", float("nan"))}


class PcgradHook(SurgeryHook):
    """PCGrad between the step and the sources; it trains on the references too (arXiv 2001.06782)."""

    def rule(self, moment: Moment) -> Outcome:
        """Take conflicts out of every task, and add the tasks up."""
        tasks = torch.cat([moment.g[None], moment.references])
        coefficients = pcgrad_coefficients(gram_matrix(tasks), self.orders(moment.step))
        z = pcgrad(tasks, coefficients, combine=self.settings.combine)
        return Outcome(z, bool((coefficients != np.eye(len(tasks))).any()))

    def orders(self, step: int) -> list[list[int]]:
        """Return for each task the others in this step's seeded order, keyed by the tasks' names."""
        names = ["\x1dstep", *self.sources.names]
        found = []
        for i, name in enumerate(names):
            draws = stream(self.sources.seed, f"hook/pcgrad/{step}/{name}").uniform(names)
            found.append([int(j) for j in np.argsort(draws, kind="stable") if j != i])
        return found

    def summary(self) -> Mapping[str, float]:
        """Return the figures of every hook and the reference tokens as ``replay_tokens``: they count as data."""
        return {**super().summary(), "replay_tokens": float(self.cost.backward_tokens)}


class SafegradHook(AgemHook):
    """The projection part of SafeGrad: A-GEM against the KL to the original model (arXiv 2508.07172, abstract).

    At the original weights the KL has no gradient: such steps pass as they are, are counted, and the next one measures
    again.
    """

    def __init__(self, name: str, settings: SafegradSettings, sources: Sources, kl: BaseKL) -> None:
        super().__init__(name, settings, sources)
        self.kl = kl

    def measure(self, model: nn.Module, step: int) -> Float[Tensor, "M P"]:
        """Measure the gradient of the KL on every source."""
        self.kl.reset()
        found = []
        for name in self.sources.names:
            rows = self.sources.draw(name, step)
            found.append(mean_gradient(model, rows, self.sources, self.kl))
            self.spend(model, rows, forwards=2)
        return torch.stack(found)

    def _usable(self, references: Tensor, step: int) -> Tensor | None:
        if float(agree(torch.tensor([self.kl.distance], device=references.device))) < ORIGIN:
            self.tally.count("num_at_origin")
            return None
        return super()._usable(references, step)

    def rule(self, moment: Moment) -> Outcome:
        """Project, then add ``alpha`` times the alignment gradient."""
        mean = moment.references.mean(0)
        z = agem(moment.g, mean)
        projected = z is not moment.g
        return Outcome(z + self.settings.alpha * mean if self.settings.alpha else z, projected)

    def summary(self) -> Mapping[str, float]:
        """Return the figures of every hook and how often the model was still the original one."""
        return {**super().summary(), "num_at_origin": float(self.tally.counts.get("num_at_origin", 0))}


class OgpsaHook(SurgeryHook):
    """OGPSA: per tensor, the span of the references is removed (arXiv 2602.07892)."""

    def rule(self, moment: Moment) -> Outcome:
        """Apply the rule to every tensor."""
        kind = {"mode": self.settings.mode, "base_scale": self.settings.base_scale}
        z = by_tensor(moment, lambda g, parts: ogpsa(g, parts, **kind), self.tally)
        return Outcome(z, z is not moment.g)

    def summary(self) -> Mapping[str, float]:
        """Return the figures of every hook and how often a tensor had no reference."""
        name = "num_tensors_without_reference"
        return {**super().summary(), name: float(self.tally.counts.get(name, 0))}


def apply(moment: Moment, granularity: Granularity, rule: Callable[[Tensor, Tensor], Tensor], tally: Tally) -> Tensor:
    """Apply a rule to the whole vector or tensor by tensor.

    Args:
        moment: gradient and references.
        granularity: model or tensor.
        rule: takes a gradient and references.
        tally: see :func:`by_tensor`.

    Returns:
        [P]; the moment's ``g`` itself where the rule changed nothing.
    """
    return rule(moment.g, moment.references) if granularity == "model" else by_tensor(moment, rule, tally)


def by_tensor(moment: Moment, rule: Callable[[Tensor, Tensor], Tensor], tally: Tally) -> Tensor:
    """Apply a rule to every trainable tensor by itself.

    Args:
        moment: gradient and references.
        rule: takes a tensor's gradient [p] and the references' parts [m, p] that are not zero.
        tally: tensors without a reference (such as a LoRA A while B is zero) pass as they are and are counted.

    Returns:
        [P]; the moment's ``g`` itself where no tensor changed.
    """
    pieces, changed = [], False
    for span in moment.spans:
        piece, parts = moment.g[span], moment.references[:, span]
        live = parts[parts.any(dim=1)]
        if len(live) == 0:
            tally.count("num_tensors_without_reference")
        new = rule(piece, live) if len(live) else piece
        changed |= new is not piece
        pieces.append(new)
    return torch.cat(pieces) if changed else moment.g
