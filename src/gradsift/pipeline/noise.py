"""The numerical bound of a pass: some rows measured a second time, alone and in other company."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from gradsift.data.token_rows import sorted_by_id
from gradsift.gradients.collect import Pass, measure_noise
from gradsift.manifest import hash_parts, write_json_atomic
from gradsift.seeds import stream
from gradsift.store.shards import ShardResult
from gradsift.store.signals import SignalStore
from gradsift.types import Noise, TokenRow


def noise_of(run: Pass, rows: Sequence[TokenRow], store: SignalStore, folder: Path, seed: int) -> Noise:
    """Measure the numerical bound once per set of rows; a repeated run reads it back.

    Args:
        run: engine and settings.
        rows: what was measured.
        store: its signals.
        folder: of the store; the bound is kept there.
        seed: of the draw.

    Returns:
        The bound.
    """
    path = folder / "noise.json"
    key = hash_parts(row.id.encode("utf-8", "surrogatepass") for row in sorted_by_id(rows))
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept.pop("rows") == key:
            return Noise(**kept)
    with run.engine:
        noise = measure_noise(
            run, rows, _one_row(store, run.directions), stream(seed, "noise"), count=_probe_size(len(rows))
        )
    write_json_atomic(path, {**dataclasses.asdict(noise), "rows": key})
    return noise


def _probe_size(num_rows: int) -> int:
    """Rows that are measured twice: 4%, at least 2 and at most 8."""
    return min(8, max(2, num_rows // 25))


def _one_row(store: SignalStore, directions: tuple[str, ...]) -> Callable[[str], ShardResult]:
    dots, embeds = store.dots(directions), "embedding" in store.spec.signals

    def look_up(row: str) -> ShardResult:
        at = store.positions([row])
        one = int(at[0])
        return ShardResult(
            ids=(row,),
            content_hashes=(store.content_hashes[one],),
            status=(store.status[one],),
            reason=(store.reason[one],),
            num_tokens=store.num_tokens[at],
            num_trained=store.num_trained[at],
            loss=store.loss[at],
            grad_norm=store.grad_norm[at],
            emb_grad_norm=store.emb_grad_norm[at],
            head_grad_norm=store.head_grad_norm[at],
            dots=dots[at],
            directions=directions,
            embedding=store.embedding([row]) if embeds and store.status[one].usable else None,
            extra={n: store.extra(n, [row]) for n in store.spec.extras} if store.status[one].usable else {},
        )

    return look_up
