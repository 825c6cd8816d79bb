"""Predicted against measured peak memory of whole runs, every figure in a process of its own.

``python benchmarks/memory.py --json docs/results/memory.json``: SmolLM2-135M and two toy shapes with random weights (Llama, four
layers of 512, 8,192 tokens; GPT-2, six layers of 384, 32,768 tokens), micro-batches of 1,024 and 4,096 tokens, adapter and
all weights. Predicted is what ``gradsift select --dry-run`` prints, measured is VmHWM of the run. ``--again FILE`` predicts anew for the
cases of a result file and keeps what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from scale import hardware, memory_now

SHAPES = ("smollm2", "llama", "gpt2")
WORDS = [
    "the",
    "gradient",
    "of",
    "a",
    "row",
    "says",
    "where",
    "it",
    "would",
    "move",
    "the",
    "weights",
    "and",
    "an",
    "anchor",
    "says",
    "where",
    "they",
    "must",
    "not",
    "go",
]


def make_model(name: str, place: Path) -> str:
    """Write a toy model with random weights, or name the packaged one."""
    if name == "smollm2":
        return "auto"
    import torch
    from tests.toy import toy_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
                        num_key_value_heads=4, vocab_size=8192, max_position_embeddings=1024, tie_word_embeddings=False)
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=32_768, n_positions=1024))
    folder = place / name
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, count: int, seed: int, long: int) -> None:
    """Chats whose answers differ; long is about the number of letters of the longest."""
    import numpy as np

    draw = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        words = draw.choice(WORDS, size=int(long / 4.6 * draw.uniform(0.3, 1)))
        chat = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": " ".join(words)}]
        lines.append(json.dumps({"messages": chat}))
    path.write_text("\n".join(lines) + "\n", "utf-8")


def recipe_of(case: argparse.Namespace) -> Any:
    """Build the recipe of a case."""
    from gradsift.recipe import build_recipe

    place = Path(case.place)
    return build_recipe({
        "pool": [{"label": "pool", "path": str(place / f"{case.model}-pool.jsonl")}],
        "anchors": [{"label": "keep", "path": str(place / f"{case.model}-keep.jsonl")}],
        "target": str(place / f"{case.model}-target.jsonl"),
        "method": {"name": "ogs_dual"}, "budget": "25%", "allow_weak_anchor": True, "data": {"max_length": 512},
        "navigator": {"model": case.path, "parameters": case.parameters},
        "collect": {"tokens_per_batch": case.tokens},
    })  # fmt: skip


def child(case: argparse.Namespace) -> None:
    """Predict or measure in this process."""
    from gradsift.pipeline.progress import Silent

    recipe = recipe_of(case)
    if case.do == "predict":
        from gradsift.pipeline.estimate import estimate

        plan = estimate(recipe, Silent())
        assert plan.memory is not None
        print(json.dumps({"bytes": plan.memory_bytes, "parts": dict(plan.memory.lines())}))
        return
    from gradsift.pipeline.run import select

    with tempfile.TemporaryDirectory() as out:
        outcome = select(recipe, Path(out) / "run")
        print(json.dumps({"bytes": memory_now()["peak"] * 2**20, "rows": outcome.manifest["rows"]["usable"],
                          "tokens": outcome.manifest["rows"]["tokens"]}))  # fmt: skip


def in_child(words: list[str]) -> dict[str, Any]:
    import subprocess

    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"bytes": 0, "error": done.stderr[-1500:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", default=list(SHAPES))
    parser.add_argument("--budgets", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--kinds", nargs="+", default=["lora", "all"])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--again", type=Path, help="a result file whose measured peaks are kept")
    for name in ("do", "place", "model", "path", "parameters"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.do:
        return child(given)
    from datetime import date

    from gradsift.manifest import git_sha, versions

    known = {} if given.again is None else {
        (c["model"], c["parameters"], c["tokens_per_batch"]): c for c in json.loads(given.again.read_text("utf-8"))["cases"]
    }  # fmt: skip
    cases = []
    with tempfile.TemporaryDirectory() as place:
        for model in given.models:
            path = make_model(model, Path(place))
            rows = next((c["measured"]["rows"] for key, c in known.items() if key[0] == model), given.rows)
            for name, count, seed in (("pool", rows, 1), ("keep", 24, 2), ("target", 24, 3)):
                write_rows(Path(place) / f"{model}-{name}.jsonl", count, seed, 480 if path != "auto" else 2200)
            for kind in given.kinds:
                for tokens in given.budgets:
                    words = [
                        "--place",
                        place,
                        "--model",
                        model,
                        "--path",
                        path,
                        "--parameters",
                        kind,
                        "--tokens",
                        str(tokens),
                    ]
                    predicted = in_child([*words, "--do", "predict"])
                    before = known.get((model, kind, tokens))
                    measured = before["measured"] if before else in_child([*words, "--do", "measure"])
                    ratio = predicted["bytes"] / measured["bytes"] if measured["bytes"] else float("nan")
                    cases.append({"model": model, "parameters": kind, "tokens_per_batch": tokens, "ratio": ratio,
                                  "predicted": predicted, "measured": measured})  # fmt: skip
                    print(f"{model:8} {kind:5} {tokens:6} predicted {predicted['bytes'] / 2**20:7.0f} MiB, measured "
                          f"{measured['bytes'] / 2**20:7.0f} MiB, ratio {ratio:.3f}  "
                          + ", ".join(f"{n} {b / 2**20:.0f}" for n, b in predicted.get("parts", {}).items())
                          + predicted.get("error", "") + measured.get("error", ""), flush=True)  # fmt: skip
    if given.json:
        found = {"command": "python benchmarks/memory.py " + " ".join(sys.argv[1:]), "date": str(date.today()),
                 "commit": git_sha(ROOT), "versions": versions(), "hardware": hardware(), "cases": cases}  # fmt: skip
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return None


if __name__ == "__main__":
    main()
