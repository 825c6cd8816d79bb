"""The worked examples of grads and less: eight pairs of norms, and two rows with six target rows."""

from __future__ import annotations

import numpy as np
import torch

from gradsift.geometry import density
from gradsift.geometry.checkpoints import CheckpointSignals, checkpoint_weights
from gradsift.gradients.adam import gamma
from gradsift.methods import make_method
from gradsift.seeds import stream
from gradsift.types import Budget, Direction, Problem

EMB = (0.10, 0.12, 0.15, 0.16, 0.18, 0.20, 0.40, 1.5)
HEAD = (0.5, 0.7, 0.6, 0.8, 0.75, 0.9, 1.6, 6.0)
COSINES = np.array([[0.10, 0.20, 0.30, 0.40, 0.00, 0.05], [0.20, 0.25, 0.15, 0.10, 0.10, 0.10]])


def grads_lines() -> list[str]:
    """A line per row: norms, signal, density and its rank by three rules."""
    points = density.combine_norms(np.array(EMB), np.array(HEAD), "mean_log")
    before, density.MIN_ROWS = density.MIN_ROWS, 2  # the page has eight rows to be read; the method wants twenty
    try:
        rho = density.kernel_density(points).rho
        raw = density.kernel_density(density.combine_norms(np.array(EMB), np.array(HEAD), "sum_raw")).rho
    finally:
        density.MIN_ROWS = before
    s = points.line

    def rank(values: np.ndarray) -> list[int]:
        return (np.argsort(np.argsort(-values, kind="stable"), kind="stable") + 1).tolist()

    ranks = zip(rank(rho), rank(raw), rank(s), strict=True)
    lines = [
        f"| {k + 1} | {EMB[k]:.2f} | {HEAD[k]:.2f} | {s[k]:+.3f} | {rho[k]:.4f} | {a} | {b} | {c} |"
        for k, (a, b, c) in enumerate(ranks)
    ]
    return [*lines, f"b = {float(density.scott_bandwidth(points.values)[0]):.3f}"]


def less_problem() -> Problem:
    """Two rows whose cosines with six orthogonal target rows are those of the page."""
    rest = np.sqrt(1 - np.square(COSINES).sum(axis=1))
    one = CheckpointSignals(
        np.hstack([COSINES, np.diag(rest)]).astype(np.float32), np.eye(8, dtype=np.float32)[:6], 1e-4
    )
    return Problem(
        ids=("z1", "z2"), sources=("pool", "pool"), num_tokens=np.full(2, 9), num_trained=np.full(2, 5), num_read=2,
        num_trained_read=10, grad_norm=np.ones(2), checkpoints=(one, one), subtasks=tuple("AAABBB"),
        target=Direction("target", "target", 1.0, 6, 9, 0.9, 0.0), gram=np.eye(1),
    )  # fmt: skip


def less_lines() -> list[str]:
    """Gamma of one gradient, checkpoint weights, and who takes which row."""
    g, m, v = (torch.tensor(x, dtype=torch.float64) for x in ([0.1, -0.2, 0.3], [0.05, 0, -0.1], [0.01, 0.04, 0.0001]))
    rows = [("g", g), ("0", 0 * g), ("10 g", 10 * g)]
    lines = []
    for name, one in rows:
        bent = gamma(one, m, v)
        unit = bent / bent.norm()
        cosine = float(unit @ (gamma(g, m, v) / gamma(g, m, v).norm()))
        shown = ", ".join(f"{x:.4f}" for x in bent.tolist())
        lines.append(f"| {name} | ({shown}) | {cosine:+.4f} |")
    weights = checkpoint_weights([1.6877e-5, 1.2859e-5, 7.703e-6, 2.5616e-6])
    lines.append(", ".join(f"{w:.4f}" for w in weights))
    found = make_method("less", {}).select(less_problem(), Budget(rows=2), stream(0, "select/less"))
    for k, name in enumerate(("z1", "z2")):
        means = COSINES[k].reshape(2, 3).mean(axis=1)
        taker = found.reason[k].partition("taken by ")[2][0]
        lines.append(f"| {name} | {means[0]:.2f} | {means[1]:.2f} | {taker} |")
    return lines
