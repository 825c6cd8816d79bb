"""Quality of a sketch by numbers stored: rmse of pairwise cosines from sketches against those of whole gradients.

Two models. A Llama shape of random weights with 56 linear layers in its body reads rows of Zipf-distributed tokens in topics (ours), so
that cosines vary. SmolLM2-135M reads rows of the demo, with the loss on their trained tokens as prepared, then on all tokens. Whole
gradients come one row at a time from :mod:`gradsift.gradients.loop` and meet in float64. The sketches: gradsift's engine with and
without norms, as the store keeps them (over the exact norm, in float16), fewer numbers where that is cheap, and bergson 2.5.1's
projected gradients, two-sided with p = 16 a layer, by its own collector and its own ``projection_seed``. For everybody only the body's
linear layers count.

A cosine from sketches is that of the two sketches. "Over exact norms" divides their dot by the exact norms instead, which shows the
noise of the dots. "Independent" is what as many independent random directions would have (ours, by arithmetic: the root of the mean
of (1 - cosine^2)^2 / D). Time is not measured.

    python benchmarks/sketch.py --json docs/results/sketch.json    # minutes on one core; --quick: a toy, seconds
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from collect import commit, hardware  # first: it asks every library for one thread before any is loaded

# isort: split
import numpy as np
import torch
from arms import SKETCH, NotRunError
from rivals import RANK, Bergson
from torch import Tensor, nn
from worlds import Batch, body_weights, llama, share

from gradsift.data.batches import collate, plan_batches
from gradsift.data.exam_rows import write_demo_rows
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.gradients.project import Projector
from gradsift.methods import make_method
from gradsift.models.load import load_navigator
from gradsift.pipeline.prepare import prepare
from gradsift.pipeline.progress import Clock, Silent
from gradsift.recipe import build_recipe

FEWER = 1021
ROOM = 1 << 30  # float32 numbers of whole gradients held at once, all rows together: 4 GiB
TOPICS, ZIPF = 6, 1.25  # with the exponent 1 two rows of a topic share so little that nearly all cosines are near 0
FULL = {"shape": (256, 768, 8, 4, 8192), "rows": 48, "tokens": 64}
QUICK = {"shape": (128, 512, 2, 2, 1024), "rows": 16, "tokens": 32}  # its MLPs fold
REAL = {"medical": 12, "math": 6, "general": 6}
ASKED = f"rmse of {SKETCH:,} numbers at or below that of p = {RANK} with 14,336 numbers (3.5 times as many)"


def pairs(dots: Tensor, norms_from: Tensor) -> np.ndarray:
    """Divide the dots of all pairs i < j by norms, whose squares are the diagonal of the second matrix."""
    norms = norms_from.diagonal().sqrt()
    return (dots / norms / norms[:, None]).numpy()[np.triu_indices(len(norms), 1)]


def exact_gram(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> Tensor:
    """Add up, some layers at a time, the dots of all rows' whole gradients: float64 [n, n]."""
    rows = [(b.input_ids[i, :n], b.labels[i, :n]) for b in batches for i, n in enumerate(b.lengths.tolist())]
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for group in groups({name: model.get_parameter(name).numel() for name in names}, ROOM // len(rows)):
        gradients = [example_gradient(model, group, ids, labels).by_name for ids, labels in rows]
        for name in group:
            flat = torch.stack([one[name].flatten() for one in gradients]).double()
            gram += flat @ flat.t()
        del gradients  # before the next are made
    return gram


def groups(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Cut names into runs whose sizes add up to at most so many, or are a single name."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[one] for one in group) + size > most:
            yield group
            group = []
        group.append(name)
    yield group


def engine_sketches(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], projector: Projector, *, norms: bool
) -> tuple[Tensor, Tensor]:
    """Run gradsift's engine: sketches [n, D] and norms [n], which are NaN where none are asked for."""
    engine = GradientEngine(share(model), names, projector=projector, norms=norms, edges=False)
    assert not engine.uncovered
    with engine:
        got = [engine.measure(b.input_ids, b.labels, b.lengths) for b in batches]
    return torch.cat([one.sketch for one in got if one.sketch is not None]), torch.cat([g.square for g in got]).sqrt()


def bergson_sketches(model: nn.Module, batches: Sequence[Batch], seed: int) -> Tensor:
    """Run bergson's collector: its projected gradients [n, 256 a layer]."""
    arm = Bergson(model, sum(len(b.indices) for b in batches), exact=False, seed=seed)
    for batch in batches:
        arm.step(batch)
    arm.close()
    assert arm.collector.builder is not None
    return torch.from_numpy(arm.collector.builder.grad_buffer)


def compare(key: str, label: str, sketches: Sequence[Tensor], gram: Tensor) -> dict[str, Any]:
    """Compare sketches [n, D], one a seed, with the Gram matrix [n, n] of whole gradients; lists have one figure a seed."""
    exact, dots = pairs(gram, gram), [one.double() @ one.double().t() for one in sketches]
    found = {"rmse": [pairs(d, d) for d in dots], "rmse_over_exact_norms": [pairs(d, gram) for d in dots]}
    figures = {what: [float(np.sqrt(np.square(f - exact).mean())) for f in some] for what, some in found.items()}
    return {
        "key": key,
        "label": label,
        "numbers": sketches[0].shape[1],
        **figures,
        "pearson": [float(np.corrcoef(f, exact)[0, 1]) for f in found["rmse"]],
        "independent": float(np.sqrt(((1 - exact**2) ** 2).mean() / sketches[0].shape[1])),
        "not_run": None,
    }


def measure(
    name: str, model: nn.Module, batches: Sequence[Batch], seeds: Sequence[int], *, fewer: bool = False
) -> dict[str, Any]:
    """Compare every kind of sketch with whole gradients.

    Args:
        name: what the case is called.
        model: its weights stay as they are.
        batches: rows numbered through in their order.
        seeds: of the projections.
        fewer: also measure a sketch of ``FEWER`` numbers.

    Returns:
        The case: what it consists of and a line for each kind of sketch.
    """
    names = body_weights(model)
    gram = exact_gram(share(model), names, batches)
    cosines = pairs(gram, gram)
    dims = (SKETCH, FEWER) if fewer else (SKETCH,)
    beside = [engine_sketches(model, names, batches, Projector(seed, SKETCH), norms=True) for seed in seeds]
    stored = [(s.double() / n[:, None]).half().double() * n[:, None] for s, n in beside]
    lines = [
        compare("gradsift", "gradsift, with norms", [sketch for sketch, _ in beside], gram),
        compare("gradsift-float16", "gradsift, stored as float16", stored, gram),
    ]
    for dim in dims:
        alone = [engine_sketches(model, names, batches, Projector(seed, dim), norms=False)[0] for seed in seeds]
        lines.append(compare(f"gradsift-alone-{dim}", "gradsift, sketch alone", alone, gram))
    label = f"bergson 2.5.1, p = {RANK}, two-sided"
    try:
        lines.append(compare("bergson", label, [bergson_sketches(model, batches, seed) for seed in seeds], gram))
    except NotRunError as error:
        lines.append({"key": "bergson", "label": label, "not_run": str(error)})
    except Exception as error:  # another project's failure must be told, not end the run
        lines.append({"key": "bergson", "label": label, "not_run": f"{type(error).__name__}: {error}"})
    return {
        "case": name,
        "rows": len(gram),
        "tokens": sum(b.num_tokens for b in batches),
        "tokens_with_loss": sum(int((b.labels[:, 1:] != -100).sum()) for b in batches),
        "layers": len(names),
        "weights": sum(model.get_parameter(one).numel() for one in names),
        "cosines": {what: float(getattr(cosines, what)()) for what in ("mean", "std", "min", "max")},
        "lines": lines,
    }


def random_case(shape: tuple[int, ...], rows: int, tokens: int) -> tuple[nn.Module, list[Batch]]:
    """Make a Llama shape of random weights, and rows whose topics each have their own order of the vocabulary."""
    torch.manual_seed(0)
    model, generator, vocabulary = llama(*shape).eval(), np.random.default_rng(0), shape[-1]
    often = np.arange(1, vocabulary + 1) ** -ZIPF
    orders = [generator.permutation(vocabulary) for _ in range(TOPICS)]
    drawn = [orders[r % TOPICS][generator.choice(vocabulary, tokens, p=often / often.sum())] for r in range(rows)]
    parts = torch.from_numpy(np.stack(drawn)).split(16)
    return model, [
        Batch(list(range(16 * k, 16 * k + len(p))), p, p, p.new_full((len(p),), tokens)) for k, p in enumerate(parts)
    ]


def real_case() -> tuple[nn.Module, list[Batch]]:
    """Load the packaged SmolLM2-135M and rows of the demo: medical ones of the pool, and of both anchors."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_demo_rows(Path(folder))
        recipe = build_recipe({
            "pool": [{"label": "medical", "path": str(files.pool)}], "target": str(files.target), "budget": "25%",
            "anchors": [{"label": name, "path": str(path)} for name, path in files.anchors.items()],
            "method": {"name": "target_cosine"}, "navigator": {"device": "cpu"},
        })  # fmt: skip
        prepared = prepare(recipe, make_method("target_cosine", {}), Clock(Silent()))
        sources = {"medical": prepared.pool, **{source.name: source for source in prepared.anchors}}
        rows = [row for name, count in REAL.items() for row in list(sources[name].usable)[:count]]
    rows.sort(key=lambda row: (row.num_tokens, row.id))
    batches = []
    for some in plan_batches(rows, range(len(rows)), 1024):
        tokens = collate(rows, some, prepared.pad_id)
        batches.append(Batch(list(some), tokens.input_ids, tokens.labels, tokens.lengths))
    return load_navigator(prepared.resolved, device="cpu").model, batches


def on_all_tokens(batch: Batch) -> Batch:
    """Put the loss on every real token."""
    padding = torch.arange(batch.input_ids.shape[1]) >= batch.lengths[:, None]
    return replace(batch, labels=batch.input_ids.masked_fill(padding, -100))


def cases(quick: bool, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Measure one case after the other."""
    yield measure("Llama, random weights", *random_case(**(QUICK if quick else FULL)), seeds, fewer=True)
    if not quick:
        model, batches = real_case()
        yield measure("SmolLM2-135M, loss on trained tokens", model, batches, seeds)
        yield measure("SmolLM2-135M, loss on all tokens", model, [on_all_tokens(one) for one in batches], seeds)


def show(case: dict[str, Any]) -> None:
    """Print one case's table."""
    print(f"{case['case']}: {case['rows']} rows, {case['tokens']:,} tokens, {case['tokens_with_loss']:,} with loss, "
          f"{case['layers']} layers; exact cosines {case['cosines']['mean']:.3f} +- {case['cosines']['std']:.3f}")  # fmt: skip
    print(f"  {'':<33}numbers    rmse  min..max        independent  over exact norms  Pearson")
    for line in case["lines"]:
        if line["not_run"] is not None:
            print(f"  {line['label']:<33}not run: {line['not_run']}")
            continue
        one, over, pearson = (np.mean(line[what]) for what in ("rmse", "rmse_over_exact_norms", "pearson"))
        spread = f"{min(line['rmse']):.4f}..{max(line['rmse']):.4f}"
        print(f"  {line['label']:<33}{line['numbers']:>7,}  {one:.4f}  {spread}  {line['independent']:>11.4f}"
              f"  {over:>16.4f}  {pearson:.4f}")  # fmt: skip


def judge(case: dict[str, Any]) -> dict[str, Any]:
    """Put the asked figure beside the means over seeds; no verdict where bergson did not run or the model is another."""
    by_key = {line["key"]: line for line in case["lines"] if line["not_run"] is None}
    if "bergson" not in by_key or by_key["bergson"]["numbers"] != 14_336:
        return {"asked": ASKED, "met": None}
    ours, theirs = (float(np.mean(by_key[key]["rmse"])) for key in ("gradsift", "bergson"))
    return {"asked": ASKED, "rmse": ours, "rmse_of_p16": theirs, "met": ours <= theirs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Args:
        arguments: the command line, or None for the process's own.

    Returns:
        0; a missed figure is a result.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/sketch.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy Llama alone, where nothing was asked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the projections (0 1 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = {
        "command": " ".join(["benchmarks/sketch.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "settings": {
            "seeds": options.seeds,
            "random": QUICK if options.quick else FULL,
            "topics": TOPICS,
            "zipf_exponent": ZIPF,
            "real_rows": None if options.quick else REAL,
            "weights": "linear layers of the body",
            "dtype": "float32; Gram matrices float64",
            "threads": 1,
        },
    }
    done: list[dict[str, Any]] = []
    for case in cases(options.quick, options.seeds):
        done.append(case)
        show(case)
        if options.json:  # after each case, so that a run cut short keeps what it has
            text = json.dumps({**facts, "verdict": judge(done[0]), "cases": done}, indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")
    print(f"asked: {ASKED}: { {True: 'met', False: 'missed', None: 'not judged'}[judge(done[0])['met']] }")
    return 0


if __name__ == "__main__":
    sys.exit(main())
