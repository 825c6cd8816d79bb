"""Lines of the worked examples on the pages of tlm, ifd, dsir, daar, thtb and memory_level, computed."""

from __future__ import annotations

import numpy as np

from gradsift.data.ngrams import importance_weights
from gradsift.geometry.entropy import entropy
from gradsift.geometry.hardness import effort, mean_distance, min_max, quality
from gradsift.methods import make_method
from gradsift.seeds import stream
from gradsift.types import Budget, Problem, Selection

DSIR_TEXTS = ("court judge law", "cell gene enzyme", "the court of cells")
DSIR_TARGET = ("court judge", "judge law")


def problem(ids: str, num_trained: list[int], num_tokens: list[int] | None = None, **fields) -> Problem:
    trained = np.array(num_trained, dtype=np.int64)
    tokens = trained + 12 if num_tokens is None else np.array(num_tokens, dtype=np.int64)
    return Problem(tuple(ids), ("pool",) * len(ids), tokens, trained, len(ids), int(trained.sum()), **fields)


def choose(name: str, some: Problem, rows: int, **settings) -> Selection:
    return make_method(name, settings).select(some, Budget(rows=rows), stream(42, f"select/{name}"))


def tlm_lines() -> list[str]:
    loss, count = np.log(np.arange(1.0, 11.0)), np.array([9] * 10, dtype=np.int64)
    got = choose("tlm", problem("abcdefghij", [20] * 10, prompt_loss=loss, num_prompt=count), 3)
    weight = dict(zip(got.ids, got.weights, strict=True))
    return [
        f"| {name} | {np.exp(loss[k]):.0f} | {weight.get(name, 0):.4f} | {got.reason_code[k]} |"
        for k, name in enumerate("abcdefghij")
    ]


def ifd_lines() -> list[str]:
    loss, alone = np.array([1.8, 0.5, 2.2, 1.2, 1.0]), np.array([2.0, 2.0, 2.0, 1.5, 1.1])
    some = problem("abcde", [10] * 5, [30, 30, 30, 30, 11], loss=loss, alone_loss=alone)
    got = choose("ifd", some, 2)
    ratio = [f"{score:.2f}" if np.isfinite(score) else "none" for score in got.score]
    return [
        f"| {name} | {loss[k]} | {alone[k]} | {ratio[k]} | {got.reason_code[k]} |" for k, name in enumerate("abcde")
    ]


def dsir_lines() -> list[str]:
    weight = importance_weights(list(DSIR_TEXTS), list(DSIR_TARGET))
    got = choose("dsir", problem("abc", [5] * 3, importance=weight), 1, draw="top")
    return [f"| {name} | {DSIR_TEXTS[k]} | {weight[k]:.3f} | {got.reason_code[k]} |" for k, name in enumerate("abc")]


def daar_lines() -> list[str]:
    rows = ((0.25, 0.25, 0.25, 0.25), (0.5, 0.5, 0.0, 0.0), (0.7, 0.1, 0.1, 0.1), (0.97, 0.01, 0.01, 0.01))
    h = entropy(np.array(rows))
    return [f"| {', '.join(map(str, row))} | {h[k]:.6f} |" for k, row in enumerate(rows)]


def thtb_lines() -> list[str]:
    prompt, response = np.array([10.0, 20, 30, 50]), np.array([100.0, 40, 300, 50])
    total, ratio, both = min_max(prompt + response), min_max(response / prompt), effort(prompt, response)
    lines = [
        f"| {prompt[k]:.0f} | {response[k]:.0f} | {total[k]:.6f} | {ratio[k]:.6f} | {both[k]:.6f} |" for k in range(4)
    ]
    rewards = np.array([-7.0, -5, 0, 2.5, 5, 8])
    shares = ", ".join(f"{q:g}" for q in quality(rewards))
    apart = mean_distance([(1, 0), (0.6, 0.8), (0, 1)])
    return [*lines, f"give qualities {shares}", f"IC is 0.5 + {apart:.6f} = {0.5 + apart:.6f}"]


def memory_level_lines() -> list[str]:
    hits = (0, 52, 53, 105, 106, 210)
    counts = np.empty(6, dtype=object)
    counts[:] = [tuple(float(h // 21 + (k < h % 21)) for k in range(21)) for h in hits]
    texts = tuple((f"capital of land {k} is", "Rome") for k in range(6))
    some = problem("abcdef", [3] * 6, external={"recall_counts": counts}, texts=texts)
    got = choose("memory_level", some, 2)
    return [
        f"| {name} | {hits[k]} | {-(-4 * hits[k] // 210)} | {got.reason_code[k]} |" for k, name in enumerate("abcdef")
    ]


FORWARD_EXAMPLES = {
    "tlm": tlm_lines,
    "ifd": ifd_lines,
    "dsir": dsir_lines,
    "daar": daar_lines,
    "thtb": thtb_lines,
    "memory_level": memory_level_lines,
}
