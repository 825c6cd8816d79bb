"""Small worlds of clusters for the tests of policies: losses are quadratic in where the learner stands."""

from __future__ import annotations

import itertools

import numpy as np

from gradsift.policy.episodes import NO_ROW, Episodes, Losses, Table, Terms
from gradsift.policy.plan import Effects
from gradsift.seeds import stream


class Quadratic:
    """Learners move by -eta times the mean of their rows; loss A is slope_A . x + bend/2 |x|^2."""

    def __init__(self, rows, slopes, eta=0.1, bend=0.0):
        self.rows, self.slopes, self.eta, self.bend = np.asarray(rows, float), np.asarray(slopes, float), eta, bend
        self.sources = tuple(f"source{m}" for m in range(len(slopes) - 1))

    def reset(self, num):
        self.x = np.zeros((num, self.rows.shape[1]))
        return self._losses()

    def step(self, rows):
        there = rows != NO_ROW
        mean = (self.rows[rows] * there[:, :, None]).sum(1) / np.maximum(there.sum(1), 1)[:, None]
        self.x = self.x - self.eta * mean
        return self._losses()

    def effects(self, members):
        means = np.stack([self.rows[list(some)].mean(0) for some in members])
        slopes = self.slopes + self.bend * self.x[:, None, :]  # [E, A, q]
        fall = self.eta * np.einsum("eaq,kq->eka", slopes, means)
        return Effects(fall[:, :, 0], -fall[:, :, 1:])

    def _losses(self):
        values = self.x @ self.slopes.T + self.bend / 2 * (self.x**2).sum(1, keepdims=True)
        return Losses(1.0 + values[:, 0], 2.0 + values[:, 1:])


def make_world(seed=0, sizes=(5, 3, 4), num_sources=1, width=2, budget=8, tokens=False, bend=0.3, limits=None, q=4):
    """Episodes over random rows; everything follows from the seed."""
    random = np.random.default_rng(seed)
    n = sum(sizes)
    shuffled = random.permutation(n)
    cuts = np.cumsum((0, *sizes))
    members = tuple(tuple(int(i) for i in shuffled[a:b]) for a, b in itertools.pairwise(cuts))
    centers = random.normal(size=(len(sizes), q))
    rows = np.zeros((n, q))
    for k, some in enumerate(members):
        rows[list(some)] = centers[k] + 0.2 * random.normal(size=(len(some), q))
    price = random.integers(1, 6, n) if tokens else np.ones(n, dtype=np.int64)
    table = Table(members, price, random.normal(size=(len(sizes), 3)), ("a", "b", "c"), np.arange(len(sizes)) == 0)
    dynamics = Quadratic(rows, random.normal(size=(1 + num_sources, q)), bend=bend)
    limits = np.full(num_sources, 0.1) if limits is None else np.asarray(limits, float)
    return Episodes(table, dynamics, Terms(width, budget, limits), stream(seed, "order"))


def permuted(episodes, order):
    """The same process with its clusters in another order: new cluster j is old cluster order[j]."""
    old = episodes.table
    table = Table(
        tuple(old.members[k] for k in order), old.price, old.features[order], old.feature_names, old.general[order]
    )
    return Episodes(table, episodes.dynamics, episodes.terms, episodes.stream)
