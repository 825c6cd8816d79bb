"""A quadratic world in numpy: the truth that the simulator imitates, written as plainly as possible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.policy.calibration import Rollout
from gradsift.policy.coordinates import Coordinates, Signals, make_coordinates
from gradsift.policy.curvature import Curvature, make_curvature
from gradsift.seeds import stream


@dataclass(frozen=True)
class Quadratic:
    """L_A(x) = start_A + g_A'x + 1/2 kappa_A x'H_A x; gradient of row i: y_i + kappa H_group(i) x."""

    rows: np.ndarray  # [N, P]
    slopes: np.ndarray  # [A, P]
    factors: np.ndarray  # [A, r, P]
    kappa: np.ndarray  # [A]
    train: np.ndarray  # [G, r, P]
    group: np.ndarray  # [N]
    weights: np.ndarray  # [N]
    kappa_train: float
    eta: float
    kind: str = "plain"
    start: float = 2.0

    @property
    def names(self) -> tuple[str, ...]:
        return (*(f"source{m}" for m in range(len(self.slopes) - 1)), "target")

    def losses(self, x: np.ndarray) -> np.ndarray:
        out = []
        for slope, factor, kappa in zip(self.slopes, self.factors, self.kappa, strict=True):
            out.append(self.start + slope @ x + 0.5 * kappa * x @ factor.T @ factor @ x)
        return np.array(out)

    def gradient(self, x: np.ndarray, some: list[int]) -> np.ndarray:
        total, weight = np.zeros_like(x), 0.0
        for i in some:
            f = self.train[self.group[i]]
            total += self.weights[i] * (self.rows[i] + self.kappa_train * f.T @ (f @ x))
            weight += self.weights[i]
        return total / weight

    def path(self, rows: np.ndarray) -> list[np.ndarray]:
        x = np.zeros(self.rows.shape[1])
        out, m, v, t = [x], np.zeros_like(x), 0.0, 0
        for some in rows:
            taken = [int(i) for i in some if i >= 0]
            if taken:
                g, t = self.gradient(x, taken), t + 1
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * (g @ g)
                if self.kind == "adam":
                    g = m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.999**t))
                elif self.kind == "normalized":
                    g = g / np.linalg.norm(g)
                x = x - self.eta * g
            out.append(x)
        return out

    def roll(self, rows: np.ndarray, noise: float = 0.0, name: str = "roll", seed: int = 0) -> Rollout:
        seen = [self.losses(x) for x in self.path(rows)]
        random = stream(seed, f"noise/{name}").numpy()
        every = np.array(seen)
        every[1:] += noise * random.normal(size=every[1:].shape)
        return Rollout(name, rows, every[:, -1], every[:, :-1], tokens=int((rows >= 0).sum()), seconds=0.5)


def make_world(seed: int = 0, n: int = 60, size: int = 12, sources: int = 2, groups: int = 2, **change) -> Quadratic:
    random = stream(seed, "quadratic").numpy()
    slopes = random.normal(size=(sources + 1, size))
    group = np.arange(n) % groups
    rows = random.normal(size=(n, size)) + 2 * random.normal(size=(groups, size))[group]
    values = {
        "rows": rows,
        "slopes": slopes,
        "factors": random.normal(size=(sources + 1, 5, size)) / np.sqrt(5),
        "kappa": 0.5 + random.uniform(size=sources + 1),
        "train": random.normal(size=(groups, 4, size)) / np.sqrt(size),
        "group": group,
        "weights": random.integers(1, 9, size=n).astype(float),
        "kappa_train": 0.7,
        "eta": 0.05,
    }
    return Quadratic(**{**values, **change})


def signals(world: Quadratic, sketch: np.ndarray | None = None, measured: bool = True) -> Signals:
    """``sketch`` [P, D] is a linear map; the identity (p = P) when None."""
    lengths = np.linalg.norm(world.slopes, axis=1)
    unit = world.slopes / lengths[:, None]
    sketch = np.eye(world.rows.shape[1]) if sketch is None else sketch
    return Signals(
        world.names,
        tuple(f"r{i:04d}" for i in range(len(world.rows))),
        world.rows @ unit.T,
        unit @ unit.T,
        lengths,
        world.rows @ sketch,
        unit @ sketch if measured else None,
        np.linalg.norm(world.rows, axis=1),
        world.weights,
    )


def exact(world: Quadratic) -> tuple[Coordinates, Curvature]:
    """Coordinates that lose nothing, and the world's own curvature in them."""
    coordinates = make_coordinates(signals(world), stream(0, "axes"), dim=world.rows.shape[1])

    def placed(factor: np.ndarray) -> np.ndarray:
        # a factor's rows are gradients like any other; make_curvature divides by their number
        return coordinates.frame.place_sketch(factor) * np.sqrt(len(factor))

    bare = make_curvature(coordinates, [placed(f) for f in world.factors], group=world.group)
    train = np.stack([coordinates.frame.place_sketch(f) for f in world.train])
    return coordinates, Curvature(bare.losses, train, world.group)


def schedules(world: Quadratic, count: int, steps: int, width: int = 3, seed: int = 1) -> list[np.ndarray]:
    random = stream(seed, "schedules").numpy()
    return [random.permutation(len(world.rows))[: steps * width].reshape(steps, width) for _ in range(count)]
