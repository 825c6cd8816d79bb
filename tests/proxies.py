"""A proxy run in a few numbers: every loss is a linear or quadratic function of a point, so that gradients are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.geometry.reweight import token_excess
from gradsift.geometry.trajectory import Domains, Feedback, Plan, Round, Rule, Trajectory, play


@dataclass(repr=False)
class PointBench:
    """Domains with losses 2 + g'x + curvature |x|^2 / 2, one such loss per task; plain gradient descent of step ``lr``."""

    gradients: np.ndarray  # [k, P]
    tasks: np.ndarray  # [m, P]
    plan: Plan
    lr: float = 0.05
    curvature: float = 0.0
    reference: np.ndarray | None = None  # [P] where the reference stands
    honest: bool = True  # False: the measured falls are those of the domains in reverse order

    def __post_init__(self):
        self.x = np.zeros(self.gradients.shape[1])
        self.trained = []

    def loss(self, slopes, x=None):
        x = self.x if x is None else x
        return 2.0 + slopes @ x + 0.5 * self.curvature * x @ x

    def slope(self, slopes):
        return slopes + self.curvature * self.x

    def read(self, at):
        return None

    def probe(self, at, weights):
        g, h = self.slope(self.gradients), self.slope(self.tasks)
        both = np.vstack([g, h])
        extra = {"gram": both @ both.T}
        if "excess" in self.plan.measures:
            there = np.zeros_like(self.x) if self.reference is None else self.reference
            pairs = [token_excess(self.loss(s[None]), self.loss(s[None], there)) for s in self.gradients]
            extra["excess"], extra["positive"] = (np.array(c) for c in zip(*pairs, strict=True))
        if "fisher" in self.plan.measures and at:
            f = np.ones(len(self.x))
            extra["fisher"] = (both * f) @ both.T
        losses = self.loss(self.tasks) if len(self.tasks) else None
        if self.plan.test_every and at % self.plan.test_every == 0:
            drops = np.stack([losses - self.loss(self.tasks, self.x - self.lr * one) for one in g])
            extra["drops"] = drops if self.honest else -drops
        present = np.ones(len(g), dtype=bool)
        return Feedback(self.lr, self.loss(self.gradients), present, task_losses=losses, **extra)

    def train(self, at, weights, before, counts):
        used = {"combined": weights, "weighted": before}.get(self.plan.training)
        if used is None:
            used = counts / max(1, counts.sum())  # nothing is left of a pool of a few rows
        self.trained.append(used)
        self.x = self.x - self.lr * used @ self.slope(self.gradients)

    def write(self, at, done: Round):
        pass

    def finish(self, num_rounds):
        return self.loss(self.tasks)


class PlantedProxy:
    """A proxy whose domains' gradients are the token means of their rows' gradients; the anchors come first in ``rest``."""

    def __init__(self, gradients, weights, target, rest=(), lr=5e-4):
        self.gradients, self.row_weights, self.lr = gradients, np.asarray(weights, dtype=float), lr
        self.slopes = {"target": target, **{f"anchor{m}": one for m, one in enumerate(rest)}}
        self.tasks = tuple(self.slopes)
        self.runs: list[tuple[str, Trajectory]] = []

    def run(self, rule: Rule, plan: Plan, domains: Domains, name: str) -> Trajectory:
        means = np.stack([
            np.average(self.gradients[domains.of_row == d], axis=0, weights=self.row_weights[domains.of_row == d])
            for d in range(len(domains.names))
        ])  # fmt: skip
        tasks = np.array([self.slopes[task] for task in domains.tasks]).reshape(len(domains.tasks), means.shape[1])
        reference = -self.lr * plan.num_rounds * np.average(means, axis=0, weights=domains.sizes)
        done = play(rule, plan, domains, PointBench(means, tasks, plan, self.lr, reference=reference))
        self.runs.append((name, done))
        return done
