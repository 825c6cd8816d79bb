"""The worked examples of doge, doremi and dids: strings that their pages must hold, computed."""

from __future__ import annotations

import numpy as np

from gradsift.geometry.impact import softmax_columns
from gradsift.geometry.mixture import mixture_counts
from gradsift.geometry.reweight import dro_step, entropic_evidence, entropic_step, root_step, token_excess

WEIGHTS = np.array([0.5, 0.3, 0.2])
ALIGNMENT, NORMS = np.array([0.8, -0.3, 0.1]), np.array([1.0, 0.5, 1.5])
LR, MU = 5e-4, 0.01


def doge_lines() -> list[str]:
    u = entropic_evidence(ALIGNMENT, NORMS, LR)
    ours = entropic_step(WEIGHTS, u, MU)
    release = entropic_step(WEIGHTS, entropic_evidence(ALIGNMENT, NORMS, LR, "release"), MU)
    counts = mixture_counts(ours, np.full(3, 100), 20).counts
    return [
        f"| {name} | {WEIGHTS[k]:g} | {ALIGNMENT[k]:g} | {NORMS[k]:g} | {1e4 * u[k]:g} | {ours[k]:.6f} | {release[k]:.6f} | {counts[k]} |"
        for k, name in enumerate(("medical", "law", "chat"))
    ]


TOKENS = {
    "medical": (np.array([2.0, 3, 1]), np.array([2.5, 2, 1.2])),
    "chat": (np.array([1.5, 1.5]), np.array([1.0, 2.5])),
}


def doremi_lines() -> list[str]:
    found = [token_excess(*pair) for pair in TOKENS.values()]
    excess = np.array([one for one, _ in found])
    half = np.array([0.5, 0.5])
    smoothed = dro_step(half, excess, 1.0, 1e-3)
    bare = entropic_step(half, excess, 1.0)
    per_mean = [max(0.0, float(p.mean() - r.mean())) for p, r in TOKENS.values()]
    return [
        f"| {name} | {excess[k]:.6f} | {found[k][1]:.0%} | {per_mean[k]:.1f} | {bare[k]:.6f} | {smoothed[k]:.6f} |"
        for k, name in enumerate(TOKENS)
    ]


SCORES = np.array([0.8, 0.2, -0.4])


def dids_lines() -> list[str]:
    impact = softmax_columns(SCORES[:, None], 0.4)[:, 0]
    uniform = np.full(3, 1 / 3)
    root = np.sqrt(impact) / np.sqrt(impact).sum()
    found = root_step(uniform, impact, 0.5, low=np.full(3, 0.2 / 3), high=np.ones(3))
    release = (SCORES.max() - SCORES) / (SCORES.max() - SCORES).sum()
    return [
        f"| {name} | {SCORES[k]:g} | {impact[k]:.6f} | {root[k]:.4f} | {found[k]:.4f} | {release[k]:.4f} |"
        for k, name in enumerate(("medical", "law", "chat"))
    ]


MIXTURES = {"doge": doge_lines, "doremi": doremi_lines, "dids": dids_lines}
