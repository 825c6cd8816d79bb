"""Small data sets for the end-to-end tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = [
    "red",
    "blue",
    "green",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "bird",
    "sun",
    "moon",
    "star",
    "left",
    "right",
    "up",
    "down",
]


def chat(question: str, answer: str, **extra: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}


def some_rows(count: int, seed: int, answer: str = "") -> list[dict[str, object]]:
    generator = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        words = generator.choice(WORDS, size=int(generator.integers(2, 7)))
        rows.append(chat(" ".join(words) + f" {n}?", answer or " ".join(words[::-1])))
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def world(folder: Path, pool: int = 24) -> dict[str, Path]:
    """A pool, two anchors and a target."""
    return {
        "pool": write_jsonl(folder / "pool.jsonl", some_rows(pool, 0)),
        "math": write_jsonl(folder / "math.jsonl", some_rows(10, 1, answer="four")),
        "chat": write_jsonl(folder / "chat.jsonl", some_rows(10, 2, answer="good day to you")),
        "target": write_jsonl(folder / "target.jsonl", some_rows(10, 3)),
    }
