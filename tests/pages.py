"""The six rows of docs/methods/README.md, and what each method's page shows of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from tests.trained_pages import grads_lines, less_lines

from gradsift.compare.word_cue import fit_word_odds
from gradsift.geometry.omp import match
from gradsift.methods import make_method
from gradsift.seeds import stream
from gradsift.train.masking import keep_tokens, tau_of_share
from gradsift.types import Budget, Problem, Selection
from mixture_pages import MIXTURES
from planted import PlantedLearner, direction

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/methods"

IDS = "abcdef"
SOURCES = ("exam", "exam", "exam", "chat", "chat", "chat")
TOKENS = np.array([10, 20, 40, 10, 30, 20])
LOSS = np.array([2.0, 1.0, 3.0, 0.5, 2.5, 1.5])
GRADIENT = np.array([(0.6, 0.8), (-0.6, 0.8), (0.0, 2.0), (1.0, 0.0), (-0.3, -0.4), (-1.2, 0.9)])
BM25 = np.array([3.0, 2.0, 5.0, 0.0, 1.0, 0.5])
HIDDEN = np.array([(1.0, 0.0), (0.8, 0.6), (0.6, 0.8), (0.0, 1.0), (-1.0, 0.0), (-0.6, -0.8)])
LIKENESS = np.array([1.0, 0.8, 0.6, -0.5, 0.4, -1.0])
HELD_OUT = np.array([1.0, 3.0, 2.0, 1.5, 2.5, 1.2])
ANCHOR_LOSS = np.array([0.4, 0.8, 1.2, 1.6])


def toy() -> Problem:
    """Anchor ``math`` points along the first axis, the target along the second."""
    directions = np.eye(2)
    return Problem(
        ids=tuple(IDS),
        sources=SOURCES,
        num_tokens=TOKENS + 5,
        num_trained=TOKENS.copy(),
        num_read=len(IDS),
        num_trained_read=int(TOKENS.sum()),
        loss=LOSS.copy(),
        grad_norm=np.linalg.norm(GRADIENT, axis=1),
        anchor_dot=GRADIENT[:, :1].copy(),
        target_dot=GRADIENT[:, 1].copy(),
        sketch=GRADIENT.astype(np.float32),
        lexical=BM25.copy(),
        embedding=HIDDEN.astype(np.float32),
        target_embedding=np.eye(2, dtype=np.float32),
        target_ids=("q1", "q2"),
        likeness=LIKENESS.copy(),
        held_out_loss=HELD_OUT.copy(),
        anchor_loss=ANCHOR_LOSS.copy(),
        anchors=(direction("math", "protect", directions[0]),),
        target=direction("target", "target", directions[1]),
        gram=np.eye(2),
        direction_sketch=directions.astype(np.float32),
        general=("chat",),
        learner=PlantedLearner(GRADIENT, TOKENS, directions, eta=0.1),
    )


def toy_lines() -> list[str]:
    """The rows of the table of docs/methods/README.md."""

    def pair(vector: np.ndarray) -> str:
        return f"({vector[0]:g}, {vector[1]:g})"

    return [
        f"| {i} | {SOURCES[k]} | {TOKENS[k]} | {LOSS[k]:g} | {pair(GRADIENT[k])} | {BM25[k]:g} | {pair(HIDDEN[k])} | "
        f"{LIKENESS[k]:g} | {HELD_OUT[k]:g} |"
        for k, i in enumerate(IDS)
    ]


def choose(name: str, problem: Problem | None = None, rows: int = 3, **config) -> Selection:
    given = toy() if problem is None else problem
    return make_method(name, config).select(given, Budget(rows=rows), stream(0, f"select/{name}"))


def audit_lines(selection: Selection, digits: int = 3) -> list[str]:
    """One line of a page's table per row: id, score and reason code."""
    shown = ["-" if math.isnan(s) else f"{s:.{digits}f}" for s in selection.score]
    return [f"| {i} | {s} | {c} |" for i, s, c in zip(selection.problem_ids, shown, selection.reason_code, strict=True)]


ATOMS = np.array([(1, 0, 0), (0, 1, 0), (0.6, 0.8, 0), (-1, 0, 0), (0, 0.6, 0.8)])


def atoms_problem(target) -> Problem:
    """Five rows of one token each and gradient length 1."""
    unit = np.asarray(target, dtype=np.float64) / np.linalg.norm(target)
    return Problem(
        ids=tuple("12345"),
        sources=("pool",) * 5,
        num_tokens=np.full(5, 4),
        num_trained=np.ones(5, dtype=np.int64),
        num_read=5,
        num_trained_read=5,
        grad_norm=np.linalg.norm(ATOMS, axis=1),
        sketch=ATOMS,
        target=direction("target", "target", unit),
        direction_sketch=unit[None],
    )


def matching_lines() -> list[str]:
    lines = []
    for ridge in (0.0, 0.5):
        found = choose("grad_match", atoms_problem((2, 1, 0.5)), 3, batch_size=1, ridge=ridge)
        weights = dict(zip(found.ids, found.weights, strict=True))
        shown = ", ".join(f"{weights[i]:.3f}" for i in found.ids)
        lines.append(f"| {ridge:g} | {', '.join(found.ids)} | {shown} | {found.details['residual']:.3f} |")
    return lines


def partition_lines() -> list[str]:
    lines, total = [], np.zeros(3)
    for name, part in (("1, 2, 3", slice(0, 3)), ("4, 5", slice(3, 5))):
        atoms = ATOMS[part]
        found = match(atoms, atoms.sum(axis=0), 1)
        total += found.weights @ atoms[found.chosen]
        error = found.residual * np.linalg.norm(atoms.sum(axis=0))
        picked = part.start + int(found.chosen[0]) + 1
        lines.append(f"| {name} | {picked} | {found.weights[0]:.1f} | {error:.1f} |")
    return [*lines, f"{np.linalg.norm(total - ATOMS.sum(axis=0)):.6f}"]


def ogs_lines() -> list[str]:
    found = choose("ogs", rows=4, num_epochs=2, num_episodes=4, num_confirmed=1, allowed_nats=1.0, num_clusters=2,
                   rows_per_decision=2, infeasible="least")  # fmt: skip
    clusters = found.cluster.tolist()
    lines = [f"| {i} | {s} | {k} |" for i, s, k in zip(IDS, SOURCES, clusters, strict=True)]
    contest = [one for one in found.details["contest"] if one["policy"] in ("uniform", "best_single")]
    lines += [f"| {one['policy']} | {one['gain'][0]:.3f} | {one['rise']['math'][0]:+.3f} |" for one in contest]
    return [*lines, f"`{', '.join(found.ids)}`"]


def masking_lines() -> list[str]:
    logp = np.array([-0.05, -0.50, -0.91, -0.92, -2.30, -0.10])
    keep = keep_tokens(-logp, 2.5)
    words = ["yes" if k else "no" for k in keep]
    lines = [f"| {p:.2f} | {math.exp(-p):.6f} | {w} |" for p, w in zip(logp, words, strict=True)]
    ten = np.log(np.arange(1, 11))
    return [
        *lines,
        f"{-logp[keep].mean():.2f} nats",
        f"{-logp.mean():.6f}",
        f"{1 - keep.mean():.6f}",
        f"tau {tau_of_share(ten, 0.2):.0f}",
    ]


CUE = (("compute the derivative", "compute the sum"), ("tell me a story", "tell the news"))
LOOKS = {"a": "compute a sum", "b": "a story of the sum", "c": "tell me the news"}


def cue_lines() -> list[str]:
    odds = fit_word_odds(*CUE)
    return [
        f"| {i} | {text} | {odds.score(text):+.3f} | {'yes' if odds.score(text) > 0 else 'no'} |"
        for i, text in LOOKS.items()
    ]


EXAMPLES = {
    "random": lambda: audit_lines(choose("random", match="source")),
    "full": lambda: audit_lines(choose("full")),
    "length": lambda: audit_lines(choose("length"), 0),
    "loss": lambda: audit_lines(choose("loss")),
    "norm": lambda: audit_lines(choose("norm", band="high")),
    "bm25": lambda: audit_lines(choose("bm25"), 1),
    "rds": lambda: audit_lines(choose("rds"), 0),
    "target_cosine": lambda: audit_lines(choose("target_cosine")),
    "conflict": lambda: audit_lines(choose("conflict")),
    "ogs_static": lambda: audit_lines(choose("ogs_static")),
    "hybrid": lambda: audit_lines(choose("hybrid", conflict_quantile=0.17, num_clusters=2)),
    "ogs_dual": lambda: audit_lines(choose("ogs_dual")),
    "ogs": ogs_lines,
    "crossfit": lambda: audit_lines(choose("crossfit"), 2),
    "grad_match": matching_lines,
    "grad_match_partitioned": partition_lines,
    "grads": grads_lines,
    "less": less_lines,
    **MIXTURES,
    "stm": masking_lines,
    "domain_looking": cue_lines,
}
"""Page -> the strings of its worked example, computed."""

MEASURED: dict[str, dict[str, list[str]]] = json.loads((PAGES / "measured.json").read_text("utf-8"))
"""Page -> folder of results -> arms that it must show; the other pages say that nothing was measured yet."""


def measured_lines(name: str) -> list[str]:
    """Lines of the tables of ``What compare measured here``, from the results that the repository holds."""
    lines = []
    for folder, arms in MEASURED.get(name, {}).items():
        found = json.loads((ROOT / "docs/results" / folder / "results.json").read_text("utf-8"))
        mean = {arm["name"]: arm for arm in found["arms"]}
        against = {one["arm"]: one["interval"] for one in found["against_random"]}
        manifest = json.loads((ROOT / "docs/results" / folder / "manifest.json").read_text("utf-8"))
        declared = len(manifest["config"]["seeds"])
        for arm in arms:
            if arm not in mean:  # not applicable there, or not run
                continue
            gap = against.get(arm)
            shown = f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else ""
            num = len(mean[arm]["seeds"])
            label = arm if num == declared else f"{arm}, {num} seeds"
            lines.append(f"| {label} | {mean[arm]['mean']:.3f} | {shown} | {mean[arm]['spent']['relative']:.2f} |")
    return lines
