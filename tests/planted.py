"""Planted problems: rows with known gradients, in which the rows worth choosing are known.

A row is a vector in a small space; every signal is computed from it by the definition, so nothing here is a stand-in
for an engine, only a tiny world with the answer written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from checkpointed import flat_checkpoints, planted_checkpoints, turned_checkpoints
from forwarded import Forwarded, close_forward, forward_fields, moved_forward, planted_forward
from gradsift.policy.calibration import Rollout
from gradsift.types import Direction, Noise, Problem
from proxies import PlantedProxy

P, D, GROUPS = 24, 16, 4
ANCHOR_LOSS = np.linspace(0.5, 2.0, 31)  # starting losses of the anchors' rows
E, NUM_TARGET_ROWS = (
    8,
    5,
)  # embeddings: their width, and the target's rows, which point into a cone around the first axis


@dataclass(frozen=True)
class PlantedRow:
    id: str
    source: str
    num_trained: int
    loss: float
    gradient: np.ndarray  # [P]
    lexical: float
    embedding: np.ndarray = field(default_factory=lambda: np.ones(E))  # [E]
    likeness: float = 0.0
    held_out_loss: float = 2.0
    more: Forwarded = field(default_factory=Forwarded)


@dataclass(frozen=True)
class World:
    rows: tuple[PlantedRow, ...]
    anchors: np.ndarray  # [M, P] mean gradients, not unit
    target: np.ndarray | None  # [P]
    good: frozenset[str]  # ids of the planted rows
    noise: Noise = Noise()  # noqa: RUF009 - frozen

    def problem(self, *, num_read: int | None = None) -> Problem:
        return problem_from_rows(self.rows, self.anchors, self.target, noise=self.noise, num_read=num_read)


def direction(name: str, role: str, vector: np.ndarray) -> Direction:
    return Direction(name, role, float(np.linalg.norm(vector)), 64, 4096, 0.9, 0.02)


def target_rows() -> np.ndarray:
    """Embeddings [NUM_TARGET_ROWS, E] of the target's rows."""
    spread = 0.2 * np.random.default_rng(11).normal(size=(NUM_TARGET_ROWS, E))
    return (np.eye(E)[0] + spread).astype(np.float32)


@dataclass(frozen=True, repr=False)
class PlantedLearner:
    """A learner for whom every loss is linear: a step moves it by the token mean of the rows' gradients."""

    gradients: np.ndarray  # [N, P]
    weights: np.ndarray  # [N]
    directions: np.ndarray  # [M + 1, P] mean gradients, the target's last
    eta: float = 0.01

    def start(self, rows_per_decision):
        pass

    @property
    def dynamics(self):
        raise AssertionError("policies are trained in the simulator here")

    def roll(self, rows, name):
        place, losses = np.zeros(self.gradients.shape[1]), []
        for some in [[], *rows]:
            some = np.array([i for i in some if i >= 0], dtype=np.int64)
            if len(some):
                w = self.weights[some] / self.weights[some].sum()
                place = place - self.eta * (w @ self.gradients[some])
            losses.append(2.0 + self.directions @ place)
        losses = np.array(losses)
        return Rollout(name, rows, losses[:, -1], losses[:, :-1])

    def load(self, name):
        return None

    def save(self, name, arrays):
        pass


def problem_from_rows(
    rows: Sequence[PlantedRow],
    anchors: np.ndarray,
    target: np.ndarray | None,
    *,
    noise: Noise = Noise(),  # noqa: B008 - frozen
    num_read: int | None = None,
) -> Problem:
    """Measure rows, in whatever order they come, and put them into a Problem in id order."""
    rows = sorted(rows, key=lambda row: row.id)
    gradients = np.array([row.gradient for row in rows])
    unit_anchors = anchors / np.linalg.norm(anchors, axis=1, keepdims=True)
    unit_target = None if target is None else target / np.linalg.norm(target)
    directions = unit_anchors if unit_target is None else np.vstack([unit_anchors, unit_target])
    project = np.random.default_rng(7).choice([-1.0, 1.0], size=(gradients.shape[1], D)) / np.sqrt(D)
    num_trained = np.array([row.num_trained for row in rows], dtype=np.int64)
    return Problem(
        ids=tuple(row.id for row in rows),
        sources=tuple(row.source for row in rows),
        num_tokens=num_trained + 12,
        num_trained=num_trained,
        num_read=len(rows) if num_read is None else num_read,
        num_trained_read=int(num_trained.sum()) + (0 if num_read is None else 50 * (num_read - len(rows))),
        loss=np.array([row.loss for row in rows]),
        grad_norm=np.linalg.norm(gradients, axis=1),
        anchor_dot=gradients @ unit_anchors.T,
        target_dot=None if unit_target is None else gradients @ unit_target,
        sketch=(gradients @ project).astype(np.float32),
        emb_grad_norm=np.linalg.norm(gradients[:, :6], axis=1),
        head_grad_norm=np.linalg.norm(gradients[:, 6:12], axis=1),
        lexical=np.array([row.lexical for row in rows]),
        embedding=np.array([row.embedding for row in rows], dtype=np.float32),
        target_embedding=None if target is None else target_rows(),
        target_ids=() if target is None else tuple(f"q{k}" for k in range(NUM_TARGET_ROWS)),
        likeness=np.array([row.likeness for row in rows]),
        held_out_loss=np.array([row.held_out_loss for row in rows]),
        anchor_loss=ANCHOR_LOSS.copy(),
        **forward_fields([row.more for row in rows]),
        anchors=tuple(direction(f"anchor{m}", "protect", a) for m, a in enumerate(anchors)),
        target=None if target is None else direction("target", "target", target),
        noise=noise,
        gram=directions @ directions.T,
        direction_sketch=(directions @ project).astype(np.float32),
        **planted_checkpoints(gradients, target),
        learner=None if target is None else PlantedLearner(gradients, num_trained, np.vstack([anchors, target])),
        proxy=None if target is None else PlantedProxy(gradients, num_trained, target, anchors),
    )


def planted_world(signal: str, *, n: int = 160, seed: int = 0, share: float = 0.2) -> World:
    """Rows of which ``share`` carry the planted signal; all else is noise of the same distribution.

    Signals: long, short, loss_{low,middle,high}, norm_{low,middle,high}, lexical, embedding, gradient (towards the target, and no
    conflict; others towards it oppose an anchor), prompt, ratio, between, importance, hard and recall (forwarded.py), influence (towards the target), dense (two norms close together), orthogonal (no anchor part), trust (three in four look like the domain
    and probes believe them, one in four is known; others look like the domain and are not believed, or are not known).
    """
    rng, apart, probed, forwarded = (np.random.default_rng(key) for key in (seed, [seed, 1], [seed, 2], [seed, 3]))
    basis = np.linalg.qr(rng.normal(size=(P, P)))[0]
    u_target, u_a, u_b = basis[0], basis[1], 0.8 * basis[2] + 0.6 * basis[1]
    good = rng.permutation(n) < round(share * n)
    towards = rng.permutation(n) < n // 2
    rows = []
    for i, (q, t) in enumerate(zip(good, towards, strict=True)):
        gradient = rng.normal(scale=0.15, size=P) + 1.2 * basis[4 + rng.integers(GROUPS)]
        side = rng.choice([-1.0, 1.0])
        if signal == "gradient":
            # Planted rows gain and harm nothing; as many others gain more but oppose the first anchor.
            gradient += 1.5 * u_target + 0.3 * u_a + 0.3 * u_b if q else (2.0 * u_target - 1.5 * u_a if t else 0)
        elif signal == "orthogonal" and not q:
            gradient += side * rng.uniform(1, 2) * (u_a + u_b)
        if signal == "orthogonal" and q:
            gradient -= (gradient @ u_a) * u_a
            gradient -= (gradient @ basis[2]) * basis[2]
        middle = rng.normal(scale=0.03) if q else side * rng.uniform(0.4, 1.2)
        if signal.startswith("norm"):
            level = {"low": -1.0 * q + rng.normal(scale=0.3), "high": q + rng.normal(scale=0.3), "middle": middle}
            gradient *= np.exp(level[signal[5:]]) / np.linalg.norm(gradient)
        if signal == "influence" and q:
            gradient += 1.5 * u_target
        if signal == "dense":  # the norms of two parts of the gradient stand close together, or anywhere else
            level = 0.0 if q else side * probed.uniform(0, 14)
            for part in (slice(0, 6), slice(6, 12)):
                gradient[part] *= np.exp(level + probed.normal(scale=0.03)) / np.linalg.norm(gradient[part])
        loss = 2 + rng.normal(scale=0.3)
        if signal.startswith("loss"):
            loss = {"low": loss - q, "high": loss + q, "middle": 2 + middle}[signal[5:]]
        length = int(np.exp(rng.normal(3.5, 0.4)))
        length = {"long": length + 60 * q, "hard": length + 60 * q, "short": max(1, length - 1000 * q)}.get(
            signal, length
        )
        lexical = abs(rng.normal()) + (2.5 * q if signal == "lexical" else 0)
        embedding = apart.normal(size=E) + (4 * q if signal == "embedding" else 0) * np.eye(E)[0]
        likeness, held_out = probed.normal(), 2 + 0.3 * probed.normal()
        if signal == "trust":
            kind = ("clean" if probed.random() < 0.75 else "known") if q else ("wrong" if t else "foreign")
            likeness = 0.2 * likeness + 2 * (kind in ("clean", "wrong"))
            held_out += {"clean": -1.0, "wrong": 1.0}.get(kind, 0.0)
            loss = {"known": 1.2, "foreign": 4.0}.get(kind, 3.0) + 0.1 * probed.normal()
        name, source = f"r{(i * 7919) % 10007:05d}", f"s{i % 3}"
        rows.append(
            PlantedRow(
                name,
                source,
                length,
                float(loss),
                gradient,
                float(lexical),
                embedding,
                likeness,
                held_out,
                planted_forward(signal, bool(q), i == 0, float(loss), forwarded),
            )
        )
    anchors = np.array([1.3 * u_a, 0.7 * u_b])
    return World(tuple(rows), anchors, 2.0 * u_target, frozenset(r.id for r, q in zip(rows, good, strict=True) if q))


def close_problem(seed: int, *, spread: float, noise: Noise, num_anchors: int = 2) -> Problem:
    """A few rows whose signals lie about as close together as the noise, with exact ties among them."""
    rng = np.random.default_rng(seed)
    n, apart = int(rng.integers(3, 13)), np.random.default_rng([seed, 1])

    def levels(scale: float, *shape: int) -> np.ndarray:
        return rng.integers(-4, 5, size=(n, *shape)) * scale * spread

    norm = 2.0 * (1 + levels(noise.norm))
    angle = np.pi / 4 + levels(noise.embedding)  # between the two target rows: near both, and about as near to each
    return Problem(
        ids=tuple(f"r{i:02d}" for i in range(n)),
        sources=("a", "b", *rng.choice(["a", "b"], size=n)[2:]),
        num_tokens=np.full(n, 20),
        num_trained=rng.integers(1, 6, size=n),
        num_read=n,
        num_trained_read=5 * n,
        loss=(loss := 2.0 + levels(noise.loss)),
        grad_norm=norm,
        emb_grad_norm=norm / 2,
        head_grad_norm=norm[::-1].copy(),
        anchor_dot=levels(noise.cos, num_anchors) * norm[:, None],
        target_dot=(0.3 + levels(noise.cos)) * norm,
        sketch=rng.normal(size=(n, 5)).astype(np.float32),
        lexical=levels(1.0),
        embedding=np.column_stack([np.cos(angle), np.sin(angle)]),
        target_embedding=np.eye(2),
        target_ids=("q0", "q1"),
        likeness=levels(1.0),
        held_out_loss=1.0 + levels(noise.loss),
        anchor_loss=2.0 + np.arange(-3, 4) * noise.loss * spread,
        **close_forward(seed, n, loss, noise.loss * spread),
        anchors=tuple(Direction(f"a{m}", "protect", 1.0 + m, 9, 99, 0.9, 0.0) for m in range(num_anchors)),
        target=Direction("target", "target", 1.0, 9, 99, 0.9, 0.0),
        noise=noise,
        gram=np.eye(num_anchors + 1),
        **flat_checkpoints(angle, noise.embedding),
        direction_sketch=np.random.default_rng([seed, 3]).normal(size=(num_anchors + 1, 5)).astype(np.float32),
        learner=PlantedLearner(apart.normal(size=(n, 3)), np.ones(n), apart.normal(size=(num_anchors + 1, 3))),
        proxy=PlantedProxy(apart.normal(size=(n, 3)), np.ones(n), apart.normal(size=3)),
    )


def remeasured(problem: Problem, seed: int) -> Problem:
    """The same rows measured again: every signal moves by less than its bound, often by nearly all of it."""
    rng = np.random.default_rng(seed)

    def jitter(like: np.ndarray) -> np.ndarray:
        return rng.choice([-0.999, 0.0, 0.999, 0.5, -0.5], size=like.shape)

    noise = problem.noise
    # A turn of angle a moves a unit vector, and so every cosine with it, by at most a.
    turn = noise.embedding * jitter(problem.grad_norm)
    x, y = problem.embedding.T
    turned = np.column_stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)])
    norm = problem.grad_norm * (1 + noise.norm * jitter(problem.grad_norm))
    anchor_cos = problem.anchor_cos + noise.cos * jitter(problem.anchor_cos)
    target_cos = problem.target_cos + noise.cos * jitter(problem.target_cos)
    return replace(
        problem,
        loss=problem.loss + noise.loss * jitter(problem.loss),
        held_out_loss=problem.held_out_loss + noise.loss * jitter(problem.held_out_loss),
        anchor_loss=problem.anchor_loss + noise.loss * jitter(problem.anchor_loss),
        grad_norm=norm,
        emb_grad_norm=problem.emb_grad_norm * (1 + noise.norm * jitter(norm)),
        head_grad_norm=problem.head_grad_norm * (1 + noise.norm * jitter(norm)),
        anchor_dot=anchor_cos * norm[:, None],
        target_dot=target_cos * norm,
        embedding=turned,
        **moved_forward(problem, np.random.default_rng([seed, 2])),
        checkpoints=turned_checkpoints(problem.checkpoints, rng),
    )
