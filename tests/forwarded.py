"""Forward signals, columns and texts of planted rows: losses of prompts and of answers alone, hidden states, outside scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LAYERS, WIDTH = (0, 3), 6
CENTERS = np.random.default_rng(17).normal(size=(3, WIDTH)) * 3
WORDS = {"law": "court judge statute ruling", "bio": "cell gene protein enzyme", "sport": "goal match team referee"}


@dataclass(frozen=True)
class Forwarded:
    prompt_loss: float = 2.0
    num_prompt: int = 11
    alone_loss: float = 2.5
    hidden: np.ndarray = field(default_factory=lambda: np.ones((2, WIDTH)))
    importance: float = 0.0
    reward: float = 0.0
    bloom: float = 8.0
    disciplines: tuple[str, ...] = ("law",)
    vectors: tuple[tuple[float, ...], ...] = ((1.0, 0.0),)
    recall: tuple[float, ...] = (5.0,) * 21
    relation: str = "capital"
    seed: str = ""
    text: tuple[str, str] = ("which court", "this one")


def planted_forward(
    signal: str, good: bool, first: bool, loss: float, rng: np.random.Generator, domain: int | None = None
) -> Forwarded:
    """One row; planted signals: prompt, ratio, between, importance, hard, recall."""
    marked, domain = domain is not None, int(rng.integers(3)) if domain is None else domain
    other = (domain + 1 + int(rng.integers(2))) % 3
    states = CENTERS[domain] + 0.3 * rng.normal(size=(2, WIDTH))
    if signal == "between" and good:
        states = (CENTERS[domain] + CENTERS[other]) / 2 + 0.15 * rng.normal(size=(2, WIDTH))
    ratio = rng.uniform(1.02, 1.3) if rng.random() < 0.1 and not first else rng.uniform(0.5, 0.9)
    ratio = rng.uniform(0.94, 0.99) if signal == "ratio" and good else ratio
    hard = signal == "hard" and good
    num = int(rng.integers(3, 5)) if hard else int(rng.integers(0, 3))
    names = tuple(sorted(WORDS))
    level = (
        (2 if good else int(rng.choice([0, 1, 3, 4])))
        if signal == "recall"
        else (2 if first or rng.random() < 0.7 else 3)
    )
    hits = {0: 0, 1: 1, 2: 4, 3: 7, 4: 10}[level]
    words = WORDS[names[domain]].split()
    prompt = " ".join(rng.choice(words, size=5))
    return Forwarded(
        prompt_loss=2 + 0.3 * rng.normal() + (1.2 if signal == "prompt" and good else 0),
        num_prompt=int(rng.integers(8, 20)),
        alone_loss=loss / ratio,
        hidden=states,
        importance=rng.normal() + (9 if signal == "importance" and good else 0),
        reward=rng.normal() + (3 if hard else 0),
        bloom=float(rng.integers(14, 22) if hard else rng.integers(1, 12)),
        disciplines=tuple(f"d{k}" for k in range(num)),
        vectors=tuple(tuple(v) for v in rng.normal(size=(num, 3)) + (0 if hard else 5)),
        recall=(float(hits),) * 21,
        relation=f"rel{domain}",
        seed=names[domain] if (marked or rng.random() < 0.25) and not (signal == "between" and good) else "",
        text=(prompt, "answer" + " more" * (60 if hard else int(rng.integers(1, 6)))),
    )


def forward_fields(rows) -> dict:
    """Fields of a problem: ``rows`` hold a :class:`Forwarded` each, in id order."""

    def objects(name):
        out = np.empty(len(rows), dtype=object)
        out[:] = [getattr(row, name) for row in rows]
        return out

    return {
        "prompt_loss": np.array([row.prompt_loss for row in rows]),
        "num_prompt": np.array([row.num_prompt for row in rows], dtype=np.int64),
        "alone_loss": np.array([row.alone_loss for row in rows]),
        "hidden": np.array([row.hidden for row in rows], dtype=np.float32),
        "hidden_layers": LAYERS,
        "importance": np.array([row.importance for row in rows]),
        "external": {
            "reward": np.array([row.reward for row in rows]),
            "bloom": np.array([row.bloom for row in rows]),
            "disciplines": objects("disciplines"),
            "discipline_vectors": objects("vectors"),
            "recall_counts": objects("recall"),
            "relation": objects("relation"),
            "seed": objects("seed"),
        },
        "texts": tuple(row.text for row in rows),
    }


def close_forward(seed: int, n: int, loss: np.ndarray, step: float) -> dict:
    """The same for a few rows that lie about as close together as the noise; ratios on both sides of 1."""
    rng = np.random.default_rng([seed, 4])
    rows = [planted_forward("", False, True, 2.0, rng, k if k < 3 else None) for k in range(n)]
    fields = forward_fields(rows)
    fields["prompt_loss"] = 2.0 + rng.integers(-4, 5, size=n) * step
    fields["alone_loss"] = loss + rng.integers(-2, 7, size=n) * step
    fields["alone_loss"][0] = loss[0] * 1.5
    return fields


def moved_forward(problem, rng: np.random.Generator) -> dict:
    """Losses measured again: each moves by less than the bound."""

    def jitter():
        return problem.noise.loss * rng.choice([-0.999, 0.0, 0.999, 0.5, -0.5], size=problem.size)

    return {name: getattr(problem, name) + jitter() for name in ("prompt_loss", "alone_loss")}
