"""Choose the deep study's learning rate from its pilot, and write it into the recipes that are to run at one rate.

The rule was fixed before the pilot ran: the rate at which the random arm's hypervolume, a single point per seed, is largest in
the mean over the pilot's seeds. Other arms are printed and do not decide. Give no recipe whose comparison has begun: its
manifest holds the rate it was declared with and refuses another.

    python benchmarks/pick_rate.py docs/results/deep-pilot benchmarks/studies/deep-medical.yaml benchmarks/studies/deep-legal.yaml
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from gradsift.compare.plane import coordinates
from gradsift.compare.results import gather
from gradsift.compare.store import declared_config
from gradsift.evaluate.pareto import hypervolume_2d

_RATES = re.compile(r"(?<=lrs: \[)[^\]]+(?=\])|(?<=rollout: \{lr: )[0-9.e+-]+")


def rates(folder: Path) -> dict[str, dict[float, list[float]]]:
    """Hypervolume of each arm, learning rate and seed of a finished pilot."""
    config = declared_config(folder)
    filed, missing = gather(folder, config)
    if missing:
        raise SystemExit(f"the pilot is not finished: {len(missing)} cells are missing in {folder}")
    assert config.reference is not None
    out: dict[str, dict[float, list[float]]] = {}
    for (arm, _), one in sorted(filed.items()):
        for point in one.cell.points:
            at = np.array([coordinates(point, one.roles, config.metric)])
            value = hypervolume_2d(at, tuple(config.reference))
            out.setdefault(arm, {}).setdefault(point.lr, []).append(value)
    return out


def main() -> None:
    """Print the table, choose, and rewrite the recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pilot", type=Path, help="folder of the finished pilot")
    parser.add_argument("recipes", type=Path, nargs="*", help="recipes to write the rate into")
    arguments = parser.parse_args()
    found = rates(arguments.pilot)
    for arm, by_rate in found.items():
        for lr, values in sorted(by_rate.items()):
            print(f"{arm:24} {lr:9.3g}  {np.mean(values):.4f}  {', '.join(f'{v:.4f}' for v in values)}")
    best = max(found["random"], key=lambda lr: float(np.mean(found["random"][lr])))
    print(f"chosen: {best:g}")
    for recipe in arguments.recipes:
        text, count = _RATES.subn(f"{best:.3e}", recipe.read_text("utf-8"))
        if not count:
            raise SystemExit(f"{recipe} names no learning rates: expected a line with lrs: [...]")
        recipe.write_text(text, "utf-8")
        print(f"  {recipe}")


if __name__ == "__main__":
    main()
