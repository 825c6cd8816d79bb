"""Which layers rank as all of them do: one pass over real rows that keeps every layer's dots and norms apart (SmolLM2-135M).

The demo's rows are measured over all layers once; what any choice of layers would have said of a row follows from the parts, so every
choice is compared on the same rows: upper shares, every second layer, the lower half. A second pass with prompts held constant
(``collect.positions=trained``) is compared with the first, and so are linear predictions of the kind that ``gradsift select --screen``
makes, fitted on 100 rows and judged on the others. What each costs is measured by ``gradsift doctor --layers``; the costs here are
arithmetic. The passes are kept in two files, which ``--parts`` reads back.

    python benchmarks/layers.py --parts parts --json docs/results/layers.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from benchmarks.trials.common import ROOT, hardware, plain

from gradsift.data.batches import collate, plan_batches
from gradsift.data.exam_rows import DemoCounts, write_demo_rows
from gradsift.evaluate.ranks import spearman_interval
from gradsift.geometry.screen import fit_screen
from gradsift.gradients import tray
from gradsift.gradients.blocks import Block, Totals, sum_repeated
from gradsift.gradients.directions import build_direction
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.gradients.taps import find_layers
from gradsift.manifest import git_sha, versions, write_json_atomic
from gradsift.methods import make_method
from gradsift.models.adapter import attach_lora
from gradsift.models.load import load_navigator
from gradsift.models.parameters import choose_parameters
from gradsift.pipeline.prepare import prepare
from gradsift.pipeline.progress import Clock, Silent
from gradsift.recipe import build_recipe

ROWS = 360  # nine tenths from MedMCQA; MedQA has 37 rows that are short enough
FITTED, SPLITS = 100, 20


@dataclass(frozen=True)
class Parts:
    """What one pass over all layers says, layer by layer.

    Args:
        names: M directions.
        facts: float64 [n, 3]: loss, log tokens, log trained tokens.
        dots: float64 [L, n, M] each layer's part of the dots.
        squares: float64 [L, n] each layer's part of the squared norm.
        top_dots: float64 [n, M] of the last norm and the head's own use of a tied table.
        top_squares: float64 [n].
        all_dots: float64 [n, M] of every chosen parameter.
        all_squares: float64 [n].
    """

    names: tuple[str, ...]
    facts: np.ndarray
    dots: np.ndarray
    squares: np.ndarray
    top_dots: np.ndarray
    top_squares: np.ndarray
    all_dots: np.ndarray
    all_squares: np.ndarray

    def signals(self, layers: Any) -> np.ndarray:
        """Cosines, up to a factor, and the log of the norm from some layers and what follows them: [n, M + 1]."""
        chosen = list(layers)
        return _signals(self.dots[chosen].sum(0) + self.top_dots, self.squares[chosen].sum(0) + self.top_squares)

    @property
    def truth(self) -> np.ndarray:
        """The same from everything."""
        return _signals(self.all_dots, self.all_squares)


def _signals(dots: np.ndarray, squares: np.ndarray) -> np.ndarray:
    return np.concatenate([dots / np.sqrt(squares)[:, None], np.log(squares)[:, None] / 2], axis=1)


def measure_parts(kind: str, num_rows: int, trained_only: bool) -> Parts:
    """Run the one pass: an untied copy of the model, its tied table's cross terms put back."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_demo_rows(Path(folder), DemoCounts(pool=num_rows))
        recipe = build_recipe({
            "pool": [{"label": "medical", "path": str(files.pool)}], "target": str(files.target), "budget": "25%",
            "anchors": [{"label": name, "path": str(path)} for name, path in files.anchors.items()],
            "method": {"name": "target_cosine"}, "navigator": {"parameters": kind, "device": "cpu"},
        })  # fmt: skip
        prepared = prepare(recipe, make_method("target_cosine", {}), Clock(Silent()))
    model: Any = load_navigator(prepared.resolved, device="cpu").model
    if kind == "lora":
        model = attach_lora(model, recipe.navigator.lora, recipe.seed)
    else:  # the head's own part is asked for as well
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    names = choose_parameters(model, kind).names
    own = {id(p): name for name, p in model.named_parameters()}
    tied = ("", "") if kind == "lora" else tuple(
        own[id(module.weight)] for module in (model.get_output_embeddings(), model.get_input_embeddings()))  # fmt: skip
    built = [build_direction(source.name, model, names, source.usable, Projector(42, 4093), tokens_per_batch=1024,
                             pad_id=prepared.pad_id, trained_only=trained_only) for source in prepared.directions]  # fmt: skip
    engine, num = GradientEngine(model, names, trained_only=trained_only), len(built)
    for name, block in engine.blocks.items():
        matrices = [d.matrices[name] for d in built]
        if name in tied:  # dots with the tied table's whole direction, then with the head's or the embedding's own
            matrices = [d.matrices[tied[0]] + d.matrices[tied[1]] for d in built] + matrices
        block.directions = engine.flatten(name, matrices)
    engine.num_directions = num
    place = {id(p): k for k, layer in enumerate(find_layers(model)) for p in layer.parameters()}
    layer_of = {name: place.get(id(p)) for name, p in model.named_parameters()}
    rows = sorted(prepared.pool.usable, key=lambda row: (row.num_tokens, row.id))
    found = _pass(engine, rows, tied, num, prepared.pad_id)
    count = len(find_layers(model))
    dots, squares = np.zeros((count, len(rows), num)), np.zeros((count, len(rows)))
    top_dots, top_squares = np.zeros((len(rows), num)), np.zeros(len(rows))
    all_dots, all_squares = np.zeros((len(rows), num)), found["cross"][:, 0].copy()
    for name, values in found.items():
        if name in ("cross", "facts"):
            continue
        all_dots += values[:, :num]
        all_squares += values[:, -1]
        if layer_of[name] is not None:
            dots[layer_of[name]] += values[:, :num]
            squares[layer_of[name]] += values[:, -1]
        elif name != tied[1]:
            top_dots += values[:, num : 2 * num] if name == tied[0] else values[:, :num]
            top_squares += values[:, -1]
    directions = tuple(source.name for source in prepared.directions)
    return Parts(directions, found["facts"], dots, squares, top_dots, top_squares, all_dots, all_squares)


def _pass(engine: GradientEngine, rows: Any, tied: tuple[str, ...], num: int, pad_id: int) -> dict[str, np.ndarray]:
    """Measure the rows; each parameter's dots and square are kept apart, and the tied table's cross term."""
    kept: dict[str, list[np.ndarray]] = {}
    plain_measure, waiting = Block.measure, {}

    def measure(block: Block, parts: Any, totals: Totals) -> Any:
        size = totals.square.shape[0]
        mine = Totals(
            torch.zeros(size, block.directions.shape[0], dtype=torch.float64),
            torch.zeros(size, dtype=torch.float64),
            None,
        )
        squares = plain_measure(block, parts, mine)
        kept.setdefault(block.name, []).append(np.concatenate([mine.dots.numpy(), mine.square.numpy()[:, None]], 1))
        totals.square += mine.square
        totals.dots += mine.dots[:, :num]
        if block.name == tied[0]:
            waiting["outer"] = parts[0]
        if block.name == tied[1]:
            cross = np.zeros((size, 1))
            for b in range(size):
                x, g = waiting["outer"].row(b)
                ids, summed = sum_repeated(parts, b)
                cross[b] = 2 * float((g[:, ids] * (x @ summed.t())).double().sum())
            kept.setdefault("cross", []).append(cross)
        return squares

    Block.measure, room = measure, tray.ROOM
    tray.ROOM = 0  # small parameters are measured one by one too
    try:
        with engine:
            for batch in plan_batches(rows, range(len(rows)), 1024):
                some = [rows[i] for i in batch]
                tokens = collate(some, range(len(some)), pad_id)
                loss = engine.measure(tokens.input_ids, tokens.labels, tokens.lengths).loss.numpy()
                lengths = np.log([[row.num_tokens, row.num_trained] for row in some])
                kept.setdefault("facts", []).append(np.concatenate([loss[:, None], lengths], 1))
                if tied == ("", ""):
                    kept.setdefault("cross", []).append(np.zeros((len(some), 1)))
    finally:
        Block.measure, tray.ROOM = plain_measure, room
    return {name: np.concatenate(values) for name, values in kept.items()}


def compare(parts: Parts, trained: Parts) -> list[dict[str, Any]]:
    """Rank correlation of every choice of layers, and of the trained positions, with everything."""
    count = len(parts.dots)
    choices: dict[str, Any] = {
        f"upper {k}": range(count - k, count) for k in (1, 2, 4, 8, 12, 15, 20, 23, 26, 30) if k <= count
    }
    choices |= {"every 2nd": range(1, count, 2), "every 4th": range(1, count, 4), "lower half": range(count // 2)}
    truth, out = parts.truth, []
    tokens = np.exp(parts.facts[:, 1:])
    # Rows of one turn: the token that predicts the first trained one, those that are trained, and the line break behind them.
    share = float((tokens[:, 1] + 2).sum() / tokens[:, 0].sum())
    ranks = {
        what: asdict(spearman_interval(trained.truth[:, j], truth[:, j]))
        for j, what in enumerate((*parts.names, "norm"))
    }
    out.append(
        {
            "layers": "trained",
            "num_layers": count,
            "share_of_tokens": share,
            "arithmetic_cost": (2 + 4 * share) / 6,
            "ranks": ranks,
        }
    )
    for name, layers in choices.items():
        found = parts.signals(layers)
        ranks = {
            what: asdict(spearman_interval(found[:, j], truth[:, j])) for j, what in enumerate((*parts.names, "norm"))
        }
        # A forward is 2 products of a weight and a token, the backward 2 more down to the lowest layer, a layer's gradient 2.
        lowest = min(layers)
        cost = (2 + 2 * (count - lowest) / count + 2 * len(layers) / count) / 6
        out.append({"layers": name, "num_layers": len(layers), "arithmetic_cost": cost, "ranks": ranks})
    return out


def predict(parts: Parts, trained: Parts) -> list[dict[str, Any]]:
    """Rank correlation of a linear prediction from cheap signals, loss and lengths, on rows that it was not fitted on."""
    count, truth, out = len(parts.dots), parts.truth, []
    sets = [(f"upper {k}", parts, k, parts.signals(range(count - k, count))) for k in (4, 8, 12, 15)]
    for what, one, k, found in [("trained", trained, count, trained.truth), *sets]:
        groups = [one.signals(part) for part in np.array_split(np.arange(count - k, count), 5 if k == count else 4)]
        cheap = {"": [found, one.facts], ", groups of layers apart": [found, one.facts, *groups]}
        for name, columns in cheap.items():
            features, rhos = np.concatenate(columns, 1), []
            for split in range(SPLITS):
                order = np.random.default_rng(split).permutation(len(truth))
                fit = fit_screen(features[order[:FITTED]], truth[order[:FITTED]], ridge=1e-2)
                rest = order[FITTED:]
                said = fit.predict(features[rest])
                rhos.append([spearman_interval(said[:, j], truth[rest, j]).rho for j in range(truth.shape[1])])
            means = dict(zip((*parts.names, "norm"), np.mean(rhos, 0).tolist(), strict=True))
            out.append({"from": f"{what}{name}", "fitted_on": FITTED, "splits": SPLITS, "mean_rho": means})
    return out


def main() -> None:
    """Measure or read the parts, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", choices=("all", "lora"), default="all")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument(
        "--parts", type=Path, required=True, help="folder of the passes: read, or made where they are not there"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    both = []
    for name in ("whole", "trained"):
        file = options.parts / f"{options.parameters}-{name}.npz"
        if not file.is_file():
            options.parts.mkdir(parents=True, exist_ok=True)
            made = measure_parts(options.parameters, options.rows, name == "trained")
            np.savez(file, **{**asdict(made), "names": np.array(made.names)})
        with np.load(file) as kept:
            both.append(Parts(tuple(map(str, kept["names"])), *(kept[f] for f in list(Parts.__dataclass_fields__)[1:])))
    parts, trained = both
    choices, predictions = compare(parts, trained), predict(parts, trained)
    for one in choices:
        ranks = "  ".join(
            f"{name} {r['rho']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for name, r in one["ranks"].items()
        )
        print(f"{one['layers']:<12} {one['arithmetic_cost']:.2f}x  {ranks}")
    for one in predictions:
        print(
            f"predicted from {one['from']}: " + "  ".join(f"{name} {rho:.2f}" for name, rho in one["mean_rho"].items())
        )
    share = (parts.squares / parts.all_squares).mean(1)
    if options.json:
        head = {"command": shlex.join(["python", *sys.argv]), "date": date.today().isoformat(), "commit": git_sha(ROOT),
                "hardware": hardware(), "versions": versions(), "parameters": options.parameters}  # fmt: skip
        body = {"num_rows": len(parts.all_squares), "share_of_squared_norm": {"layers": share, "last norm and head": float(
            (parts.top_squares / parts.all_squares).mean())}, "choices": choices, "predictions": predictions}  # fmt: skip
        write_json_atomic(options.json, plain({**head, **body}))


if __name__ == "__main__":
    main()
