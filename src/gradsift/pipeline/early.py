"""What a method asks of the pool and of the navigator that can be told before a model loads: rows and layers (ours)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from gradsift.data.token_rows import places
from gradsift.errors import DataError
from gradsift.gradients.taps import refuse_layers

if TYPE_CHECKING:
    from gradsift.pipeline.prepare import Prepared


def check_early(prepared: Prepared) -> None:
    """Refuse a pool with too few rows for the method, and a layer that the navigator does not have.

    Args:
        prepared: the run's inputs.

    Raises:
        DataError: the pool, or a label of it, has too few usable rows.
    """
    _check_rows(prepared)
    layers, found = prepared.method.needs.layers, layer_count(prepared.resolved.folder)
    if layers and found is not None:  # elsewhere it is refused when the model has loaded
        refuse_layers(layers, found)


def layer_count(folder: Path) -> int | None:
    """Read the number of decoder layers from a model's configuration.

    Args:
        folder: a model folder.

    Returns:
        The number, or None where the configuration does not say it by a known name.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text("utf-8"))
    config = config.get("text_config") or config
    found = config.get("num_hidden_layers", config.get("n_layer"))
    return found if isinstance(found, int) else None


def _check_rows(prepared: Prepared) -> None:
    needs, name = prepared.method.needs, prepared.method.name
    if not needs.least_rows:
        return
    pool = prepared.pool.pool
    where = places(pool, prepared.pool.usable)
    counts = Counter(pool.label(int(i)) if needs.each_label else "pool" for i in where)
    for what, count in sorted(counts.items()):
        if count < needs.least_rows:
            raise DataError(
                f"{name} needs more rows" + (f" of {what}" if needs.each_label else ""),
                where="--pool",
                got=f"{count} usable rows",
                expected=f"at least {needs.least_rows}",
                do="add rows" + (", or take all labels as one: --set per_source=false" if needs.each_label
                                 else f", change the settings of {name}, or choose another method"),
            )  # fmt: skip
