"""Gradients as short vectors: exact along the anchors and the target, sketched beside them (ogs.md 3.3 step 1; ours).

A row's gradient g becomes y = [Q'g, W'S(g - QQ'g)]: Q is an orthonormal basis of the span of the protected directions and
the target, reached exactly through dots and the Gram matrix; S is the sketch, which is linear; W shortens what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from gradsift.errors import SignalError
from gradsift.seeds import Stream
from gradsift.types import Problem, StoredRows

CUT = 1e-6
"""Eigenvalues of the Gram matrix below this share of the largest are noise of float32 dots: no axis of the basis."""

MAX_FITTED = 2048
"""Rows that the leading directions are computed from; more would only cost time."""

CHUNK = 4096


@dataclass(frozen=True)
class Signals:
    """What coordinates are made of. Directions stand in the order protected sources, then the target (A = M+1).

    Args:
        names: A names, the target's last.
        ids: N row ids.
        dots: float64 [N, A] exact dots of the rows' gradients with the *unit* directions.
        gram: float64 [A, A] dots between the unit directions.
        lengths: float64 [A] lengths of the mean gradients, > 0.
        sketch: float [N, D] sketches of the rows' gradients.
        direction_sketch: float [A, D] sketches of the unit directions, in the same sketch; None when they were not kept.
        grad_norm: float64 [N] exact norms, or None: then norms come from the sketches.
        weights: float64 [N] share of a row in its batch's mean before normalizing: 1 where the trainer averages over
            rows, trained tokens where it averages over tokens; None for 1.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...]
    dots: Float[np.ndarray, "N A"]
    gram: Float[np.ndarray, "A A"]
    lengths: Float[np.ndarray, " A"]
    sketch: Float[np.ndarray, "N D"] | StoredRows
    direction_sketch: Float[np.ndarray, "A D"] | None = None
    grad_norm: Float[np.ndarray, " N"] | None = None
    weights: Float[np.ndarray, " N"] | None = None

    def __post_init__(self) -> None:
        n, a = len(self.ids), len(self.names)
        if (
            self.dots.shape != (n, a)
            or self.gram.shape != (a, a)
            or self.lengths.shape != (a,)
            or len(self.sketch) != n
        ):
            raise ValueError("Signals: arrays do not fit ids and names")
        if self.direction_sketch is not None and self.direction_sketch.shape != (a, self.sketch.shape[1]):
            raise ValueError("Signals.direction_sketch must be [A, D]")
        if not (np.isfinite(self.dots).all() and np.isfinite(self.gram).all() and (self.lengths > 0).all()):
            raise ValueError("Signals must be finite, with lengths above 0")


@dataclass(frozen=True)
class Frame:
    """The axes: how dots and a sketch become a short vector.

    Args:
        inverse: float64 [R, A] from dots with the unit directions to coordinates in the basis, R <= A.
        directions: float64 [A, R] the unit directions in the basis.
        basis_sketch: float64 [R, D] sketches of the basis.
        project: float64 [D, p] shortens a residual's sketch.
    """

    inverse: Float[np.ndarray, "R A"]
    directions: Float[np.ndarray, "A R"]
    basis_sketch: Float[np.ndarray, "R D"]
    project: Float[np.ndarray, "D p"]

    def residual(self, dots: Float[np.ndarray, "n A"], sketch: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        """Sketches of what is left of gradients outside the span of the directions.

        Args:
            dots: exact dots with the unit directions.
            sketch: sketches of the gradients.

        Returns:
            float64 [n, D].
        """
        return np.asarray(sketch, dtype=np.float64) - (dots @ self.inverse.T) @ self.basis_sketch

    def place(self, dots: Float[np.ndarray, "n A"], sketch: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n q"]:
        """Turn gradients into short vectors.

        Args:
            dots: exact dots with the unit directions.
            sketch: sketches of the gradients.

        Returns:
            float64 [n, R+p].
        """
        return np.concatenate([dots @ self.inverse.T, self.residual(dots, sketch) @ self.project], axis=1)

    def place_sketch(self, sketch: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n q"]:
        """Turn gradients of which only sketches were kept (rows of an anchor) into short vectors.

        Args:
            sketch: sketches of the gradients.

        Returns:
            float64 [n, R+p]; the first R coordinates are least-squares estimates from the sketches, not exact.
        """
        whole = np.asarray(sketch, dtype=np.float64)
        inside = np.linalg.lstsq(self.basis_sketch.T, whole.T, rcond=None)[0].T
        return np.concatenate([inside, (whole - inside @ self.basis_sketch) @ self.project], axis=1)


@dataclass(frozen=True)
class Coordinates:
    """The pool in short vectors.

    Args:
        names: A names of the losses: protected sources, then the target.
        frame: the axes.
        rows: float64 [N, q] gradients at the starting weights, q = R + p.
        lost: float64 [N] squared length that ``rows`` leaves out, at least 0.
        slopes: float64 [A, q] gradients of the A losses at the starting weights; exact, 0 outside the first R axes.
        weights: float64 [N] as in :class:`Signals`.
        kept: share of the residuals' squared length that the p axes hold (about 1 in expectation for ``random``).
        measured: whether the directions' own sketches were given; else they were estimated by regression over the pool.
    """

    names: tuple[str, ...]
    frame: Frame
    rows: Float[np.ndarray, "N q"]
    lost: Float[np.ndarray, " N"]
    slopes: Float[np.ndarray, "A q"]
    weights: Float[np.ndarray, " N"]
    kept: float
    measured: bool

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the protected sources."""
        return self.names[:-1]


def signals_of(problem: Problem, direction_sketch: Float[np.ndarray, "A D"] | None = None) -> Signals:
    """Read from a problem what coordinates are made of.

    Args:
        problem: with dots, Gram matrix and sketches.
        direction_sketch: sketches of the unit directions, protected ones first: for each built direction the mean of
            its rows' sketches divided by its norm.

    Returns:
        The signals; weights are the trained tokens (the trainer's loss is a mean over the tokens of a batch).

    Raises:
        SignalError: a signal is missing.
    """
    dot, target, gram, sketch = problem.anchor_dot, problem.target_dot, problem.gram, problem.sketch
    if dot is None or target is None or gram is None or sketch is None or problem.target is None:
        missing = [n for n in ("anchor_dot", "target_dot", "gram", "sketch", "target") if getattr(problem, n) is None]
        raise SignalError(
            "the simulator needs signals that were not measured",
            where="policy.coordinates",
            got="missing: " + ", ".join(missing),
            expected="anchors, a target and sketches",
            do="collect again with --anchor, --target and a method that needs sketches, such as ogs",
        )
    directions = (*problem.anchors, problem.target)
    return Signals(
        tuple(d.name for d in directions),
        problem.ids,
        np.column_stack([dot, target]),
        gram,
        np.array([d.norm for d in directions]),
        sketch,
        direction_sketch,
        problem.grad_norm,
        problem.num_trained.astype(np.float64),
    )


def make_coordinates(
    signals: Signals, stream: Stream, *, dim: int = 64, kind: Literal["principal", "random"] = "principal"
) -> Coordinates:
    """Turn a pool into short vectors.

    Args:
        signals: dots, Gram matrix and sketches.
        stream: of the random axes, and of the rows that the leading ones are fitted to when there are very many.
        dim: p, at least 1; fewer axes come out when the residuals span fewer (``principal``).
        kind: ``principal``: leading directions of the residuals' sketches; ``random``: Johnson-Lindenstrauss signs.

    Returns:
        The coordinates.
    """
    values, vectors = np.linalg.eigh(signals.gram)
    keep = values > CUT * values[-1]
    root, vectors = np.sqrt(values[keep]), vectors[:, keep]
    inverse, directions = (vectors / root).T, vectors * root
    if signals.direction_sketch is not None:
        basis_sketch = inverse @ np.asarray(signals.direction_sketch, dtype=np.float64)
    else:
        basis_sketch = _regress(signals.dots @ inverse.T, signals.sketch)
    size = signals.sketch.shape[1]
    frame = Frame(inverse, directions, basis_sketch, np.zeros((size, 0)))
    if kind == "random":
        project = stream.child("axes").numpy().choice([-1.0, 1.0], size=(size, dim)) / np.sqrt(dim)
    else:
        project = _leading(frame, signals, dim, stream)
    frame = Frame(inverse, directions, basis_sketch, project)
    rows, square = _place_all(frame, signals)
    inside, beside = np.square(rows[:, : len(root)]).sum(1), np.square(rows[:, len(root) :]).sum(1)
    rest = square if signals.grad_norm is None else np.square(signals.grad_norm) - inside
    slopes = np.zeros((len(signals.names), rows.shape[1]))
    slopes[:, : len(root)] = directions * signals.lengths[:, None]
    return Coordinates(
        signals.names,
        frame,
        rows,
        # random axes keep squared lengths in expectation, so nothing is left over
        np.zeros(len(rows)) if kind == "random" else np.maximum(rest - beside, 0.0),
        slopes,
        np.ones(len(rows)) if signals.weights is None else np.asarray(signals.weights, dtype=np.float64),
        float(beside.sum() / square.sum()) if square.sum() > 0 else 1.0,
        signals.direction_sketch is not None,
    )


def _regress(
    inside: Float[np.ndarray, "N R"], sketch: Float[np.ndarray, "N D"] | StoredRows
) -> Float[np.ndarray, "R D"]:
    """Sketches of the basis when they were not kept: what the rows' sketches hold per unit of each coordinate."""
    moment = sum(
        inside[at : at + CHUNK].T @ np.asarray(sketch[at : at + CHUNK], dtype=np.float64)
        for at in range(0, len(inside), CHUNK)
    )
    return np.linalg.pinv(inside.T @ inside, hermitian=True) @ moment


def _leading(frame: Frame, signals: Signals, dim: int, stream: Stream) -> Float[np.ndarray, "D p"]:
    """Leading directions of the residuals' sketches, through the rows' own Gram matrix or the D x D one."""
    chosen = np.arange(len(signals.ids))
    if len(chosen) > MAX_FITTED:
        chosen = np.sort(np.argsort(stream.child("rows").uniform(signals.ids), kind="stable")[:MAX_FITTED])
    left = frame.residual(signals.dots[chosen], signals.sketch[chosen])
    small = min(left.shape) == left.shape[0]
    values, vectors = np.linalg.eigh(left @ left.T if small else left.T @ left)
    values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
    # a square root of rounding: directions whose squared length is below 1e-12 of the largest do not exist
    there = values > 1e-12 * max(float(values[0]), 1e-300)
    axes = vectors[:, there]
    return left.T @ (axes / np.sqrt(values[there])) if small else axes


def _place_all(frame: Frame, signals: Signals) -> tuple[Float[np.ndarray, "N q"], Float[np.ndarray, " N"]]:
    """Short vectors and squared lengths of the residuals' sketches, in chunks (sketches may be memory-mapped)."""
    rows, square = [], []
    for at in range(0, len(signals.ids), CHUNK):
        dots = signals.dots[at : at + CHUNK]
        left = frame.residual(dots, signals.sketch[at : at + CHUNK])
        rows.append(np.concatenate([dots @ frame.inverse.T, left @ frame.project], axis=1))
        square.append(np.square(left).sum(axis=1))
    return np.concatenate(rows), np.concatenate(square)
