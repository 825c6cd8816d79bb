"""Anchor and target directions: mean gradients of a set of rows, kept exactly (ogs.md 2.2; equal weight per row).

The rows go through the same engine as the pool, once: the pass sums their gradients and keeps each row's sketch, from
which the split-half reliability is computed. A direction is stored unit length; its length before that is kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.data.batches import collate, plan_batches
from gradsift.errors import NumericsError
from gradsift.gradients.embed import content_order, reorder
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.manifest import write_bytes_atomic, write_json_atomic
from gradsift.types import TokenRow


@dataclass(frozen=True)
class BuiltDirection:
    """The mean gradient of a set of rows.

    Args:
        name: the anchor's name, or ``target``.
        matrices: parameter name -> unit direction as [rows, cols].
        norm: length of the mean gradient.
        sketches: float32 [n, D] sketches of the rows' gradients.
        num_rows: n.
        num_tokens: tokens of those rows.
        mean_loss: mean of the rows' losses, nats per trained token.
        embeddings: float32 [n, d] pooled hidden states of the rows in content order, or None.
    """

    name: str
    matrices: Mapping[str, Float[Tensor, "rows cols"]]
    norm: float
    sketches: Float[np.ndarray, "n D"]
    num_rows: int
    num_tokens: int
    mean_loss: float
    embeddings: Float[np.ndarray, "n d"] | None = None


def build_direction(
    name: str,
    model: nn.Module,
    parameters: Sequence[str],
    rows: Sequence[TokenRow],
    projector: Projector,
    *,
    tokens_per_batch: int,
    pad_id: int,
    tick: Callable[[int, int], None] = lambda rows, tokens: None,
    before: Callable[[Sequence[TokenRow]], None] = lambda rows: None,
    embedding: bool = False,
    first_layer: int | None = None,
    trained_only: bool = False,
) -> BuiltDirection:
    """Average the gradients of some rows.

    Args:
        name: the anchor's name, or ``target``.
        model: the navigator.
        parameters: names of the parameters that count.
        rows: usable token rows; they are read in (length, id) order, so their order in the file does not matter.
        projector: seed and size of the sketches.
        tokens_per_batch: longest row times rows of a micro-batch.
        pad_id: padding token.
        tick: called with rows and tokens done.
        before: called with the rows of every micro-batch before it is measured.
        embedding: also keep the rows' embeddings.
        first_layer: where the backward stops; None for the embedding.
        trained_only: hold what stands before the first trained token constant.

    Returns:
        The unit direction, its length and the rows' sketches.

    Raises:
        NumericsError: the mean gradient is zero or not finite, or a row's loss is not finite.
    """
    ordered = sorted(rows, key=lambda row: (row.num_tokens, row.id))
    engine = GradientEngine(
        model, parameters, projector=projector, building=True, embedding=embedding, norms=False, first_layer=first_layer,
        trained_only=trained_only,
    )  # fmt: skip
    device = next(model.parameters()).device
    sketches, losses, embeddings = [], [], []
    with engine:
        for batch in plan_batches(ordered, range(len(ordered)), tokens_per_batch):
            some = [ordered[i] for i in batch]
            before(some)
            tokens = collate(some, range(len(some)), pad_id)
            got = engine.measure(tokens.input_ids.to(device), tokens.labels.to(device), tokens.lengths)
            assert got.sketch is not None
            sketches.append(got.sketch.numpy())
            losses.append(got.loss.numpy())
            embeddings += [] if got.embedding is None else [got.embedding.numpy().astype(np.float32)]
            tick(len(some), sum(row.num_tokens for row in some))
    loss = np.concatenate(losses)
    square = sum(float(b.mean.double().square().sum()) for b in engine.blocks.values() if b.mean is not None)
    norm = square**0.5 / len(ordered)
    if not np.isfinite(loss).all() or not np.isfinite(norm) or norm == 0:
        bad = next((row.id for row, value in zip(ordered, loss, strict=True) if not np.isfinite(value)), "none")
        raise NumericsError(
            f"the mean gradient of {name} is {'zero' if norm == 0 else 'not finite'}",
            where=f"anchor or target {name}",
            got=f"norm {norm}, first row with a bad loss: {bad}",
            expected="a finite direction",
            do="look at these rows with gradsift inspect, and check the model with gradsift doctor",
        )
    matrices = {n: b.mean / (norm * len(ordered)) for n, b in engine.blocks.items() if b.mean is not None}
    return BuiltDirection(
        name,
        matrices,
        norm,
        np.concatenate(sketches).astype(np.float32),
        len(ordered),
        sum(row.num_tokens for row in ordered),
        float(loss.mean()),
        reorder(np.concatenate(embeddings), [row.id for row in ordered], content_order(rows)) if embedding else None,
    )


def sketch_directions(built: Sequence[BuiltDirection]) -> Float[np.ndarray, "A D"]:
    """Sketch the unit directions: sketches are linear, so each is the mean of its rows' sketches over its length.

    Args:
        built: A directions.

    Returns:
        float32 [A, D] in the order given.
    """
    return np.stack([d.sketches.mean(axis=0) / d.norm for d in built]).astype(np.float32)


def gram(directions: Sequence[BuiltDirection]) -> Float[np.ndarray, "K K"]:
    """Inner products of unit directions.

    Args:
        directions: K directions over the same parameters.

    Returns:
        float64 [K, K], ones on the diagonal.
    """
    k = len(directions)
    out = np.eye(k)
    names = sorted(directions[0].matrices) if directions else []  # read back, they stand in another order
    for i in range(k):
        for j in range(i):
            pairs = ((directions[i].matrices[n], directions[j].matrices[n]) for n in names)
            out[i, j] = out[j, i] = sum(float((a.double() * b.double()).sum()) for a, b in pairs)
    return out


def attach(engine: GradientEngine, directions: Sequence[BuiltDirection]) -> None:
    """Give an engine the directions to take dots with.

    Args:
        engine: a fresh engine over the same parameters.
        directions: the order of the dots.
    """
    engine.num_directions = len(directions)
    for name, block in engine.blocks.items():
        block.directions = engine.flatten(name, [d.matrices[name] for d in directions]) if directions else None


def save_direction(direction: BuiltDirection, folder: Path, digest: str) -> None:
    """Keep a direction on disk, so that a resumed run does not measure the anchor again.

    Args:
        direction: what was built.
        folder: an existing folder.
        digest: hash of the rows it was built from.
    """
    from safetensors.torch import save

    tensors = {f"direction.{n}": m.contiguous().cpu() for n, m in direction.matrices.items()}
    tensors["sketches"] = torch.from_numpy(direction.sketches)
    if direction.embeddings is not None:
        tensors["embeddings"] = torch.from_numpy(direction.embeddings)
    write_bytes_atomic(folder / f"{digest}.safetensors", save(tensors))
    facts = {k: getattr(direction, k) for k in ("norm", "num_rows", "num_tokens", "mean_loss")}
    write_json_atomic(folder / f"{digest}.json", facts)


def load_direction(name: str, folder: Path, digest: str, device: torch.device) -> BuiltDirection | None:
    """Read a direction back, or None when it is not there in full.

    Args:
        name: the anchor's name, or ``target``.
        folder: where :func:`save_direction` wrote.
        digest: hash of the rows it must have been built from.
        device: where the matrices go.

    Returns:
        The direction, bit for bit as it was built, or None.
    """
    import json

    from safetensors.torch import load_file

    facts_file, tensors_file = folder / f"{digest}.json", folder / f"{digest}.safetensors"
    if not facts_file.is_file() or not tensors_file.is_file():
        return None
    tensors = load_file(tensors_file)
    sketches, embeddings = tensors.pop("sketches").numpy(), tensors.pop("embeddings", None)
    return BuiltDirection(
        name=name,
        matrices={n.removeprefix("direction."): t.to(device) for n, t in tensors.items()},
        sketches=sketches,
        embeddings=None if embeddings is None else embeddings.numpy(),
        **json.loads(facts_file.read_text("utf-8")),
    )


def save_embeddings(embeddings: Float[np.ndarray, "n d"], folder: Path, digest: str) -> None:
    """Keep a target's embeddings on disk, where no gradient of it is measured.

    Args:
        embeddings: float32 [n, d] in content order.
        folder: an existing folder.
        digest: hash of the rows they were made from.
    """
    from safetensors.torch import save

    write_bytes_atomic(
        folder / f"{digest}.safetensors", save({"embeddings": torch.from_numpy(np.ascontiguousarray(embeddings))})
    )


def load_embeddings(folder: Path, digest: str) -> Float[np.ndarray, "n d"] | None:
    """Read embeddings back, or None when they are not there.

    Args:
        folder: where :func:`save_embeddings` wrote.
        digest: hash of the rows they must have been made from.

    Returns:
        float32 [n, d] in content order, bit for bit as they were measured, or None.
    """
    from safetensors.torch import load_file

    path = folder / f"{digest}.safetensors"
    return load_file(path)["embeddings"].numpy() if path.is_file() else None
