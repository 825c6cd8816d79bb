"""Adapters to other collectors, each on its fastest in-memory road with settings in its favor.

Everybody gets the same batches, the same forward (logits at supervised positions only), frozen weights with the gradient
starting at the embedding's output, no bias terms, no disk. What differs is what happens inside the hooks.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator

import torch
from arms import Arm, NotRunError
from torch import Tensor, nn
from worlds import NUM_DIRECTIONS, Batch, backward, body_layers, body_weights, freeze, random_directions, share

RANK = 16


def directions_by_layer(model: nn.Module) -> dict[str, Tensor]:
    """Give gradsift's directions under the layers' names, as [M, rows * cols]."""
    parameters = dict(model.named_parameters())
    layers = body_layers(model)
    shapes = []
    for layer, weight in zip(layers, body_weights(model), strict=True):
        size = tuple(parameters[weight].shape)
        transposed = type(model.base_model.get_submodule(layer)).__name__ == "Conv1D"
        shapes.append((weight, *(reversed(size) if transposed else size)))
    drawn = random_directions(shapes)
    return {
        layer: torch.stack(drawn[weight]).flatten(1) for layer, weight in zip(layers, body_weights(model), strict=True)
    }


class Bergson(Arm):
    """Bergson 2.5.1's InMemoryCollector: projected gradients into its builder, or cosines by its streaming scorer."""

    def __init__(self, model: nn.Module, num_rows: int, *, exact: bool, seed: int | None = None) -> None:
        what = ("exact", "exact cosine (a second run)", f"{NUM_DIRECTIONS} cosines")
        sketch = ("projected", f"projected p={RANK}", f"{RANK * RANK} a layer")
        key, label, returns = what if exact else sketch
        super().__init__(f"bergson-{key}", f"bergson 2.5.1, {label}", returns)
        try:
            from bergson import GradientProcessor, IndexConfig, InMemoryCollector, Scorer
            from bergson.score.score_writer import InMemorySequenceScoreWriter
            from datasets import Dataset
        except ImportError as error:
            raise NotRunError(f"{error} (pip install --no-deps -r benchmarks/requirements.txt)") from error
        logging.getLogger("bergson").setLevel(logging.WARNING)
        self.model = share(model)
        layers = body_layers(self.model)
        self.writer = InMemorySequenceScoreWriter(num_rows, NUM_DIRECTIONS) if exact else None
        scorer = None
        if exact:
            queries = directions_by_layer(self.model)
            scorer = Scorer(queries, layers, self.writer, torch.device("cpu"), torch.float32, unit_normalize=True)
        self.collector = InMemoryCollector(  # reads the gradients' dtype off weights that are still trainable
            model=self.model.base_model,
            data=Dataset.from_dict({"length": [0] * num_rows}),
            cfg=IndexConfig(run_path="unused", loss_reduction="mean"),
            processor=GradientProcessor(projection_dim=None if exact else RANK, projection_seed=seed),
            target_modules=set(layers),
            scorer=scorer,
        )
        freeze(self.model)
        self.collector.with_batch(None).__enter__()

    def step(self, batch: Batch) -> None:
        losses = backward(self.model, batch)
        self.collector.process_batch(batch.indices, losses=losses)
        if self.writer is not None:
            self.cosines = self.writer.scores[batch.indices]

    def close(self) -> None:
        self.collector.__exit__(None, None, None)


class DattriLlm(Arm):
    """dattri-llm 0.1.0's HookManager: LoGra capture, or factors contracted once for dots and norm."""

    def __init__(self, model: nn.Module, *, exact: bool) -> None:
        key, label, returns = (
            ("exact", "exact cosine", f"{NUM_DIRECTIONS} cosines")
            if exact
            else ("logra", f"LoGra {RANK}", f"{RANK * RANK} a layer")
        )
        super().__init__(f"dattri-{key}", f"dattri-llm 0.1.0, {label}", returns)
        try:
            from dattri_llm import HookManager, HookManagerConfig
        except ImportError as error:
            raise NotRunError(f"{error} (pip install dattri-llm==0.1.0)") from error
        self.model = share(model)
        layers = body_layers(self.model)
        freeze(self.model)
        projection = {"__default__": {"style": "logra", "proj_dim": RANK, "proj_seed": 0}}
        config = HookManagerConfig(
            hook_types=dict.fromkeys(layers, "linear_io"),
            projection_kwargs=None if exact else projection,
            projector=None if exact else rademacher,
            capture_style="factorized" if exact else "materialized",
            include_frozen=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that frozen layers need gradient from above, which they get
            self.manager = HookManager(self.model.base_model, config)
        self.anchors = directions_by_layer(self.model) if exact else None
        self._collecting = self.manager.collect(deregister_on_exit=True)
        self._collecting.__enter__()

    def step(self, batch: Batch) -> None:
        backward(self.model, batch)
        gradient = self.manager.get_gradient()
        if self.anchors is None:
            assert all(isinstance(value, Tensor) for value in gradient.data.values())
            return
        dots, square = exact_dots(gradient, self.anchors)
        self.cosines = dots / square.sqrt()[:, None]

    def close(self) -> None:
        self._collecting.__exit__(None, None, None)


def exact_dots(gradient: object, anchors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Contract each captured layer once with dattri-llm's own operations, then take dots and squared norms of it."""
    from dattri_llm.gradient import ops

    dots, square = 0, 0
    for name, value in gradient.data.items():
        kind = gradient.layer_types[name]
        dense = ops.materialize(value, kind, include_bias=False)
        dots = dots + ops.cross_dot(dense, anchors[name], kind)
        square = square + ops.grad_norm_sq(dense, kind)
    return dots, square


def rademacher(
    feature: Tensor, batch_size: int, *, proj_dim: int, proj_seed: int = 0, **_: object
) -> Callable[[Tensor], Tensor]:
    """Random signs under dattri-llm's projector protocol; it reads the matrix once and then multiplies by it itself."""
    generator = torch.Generator().manual_seed(proj_seed)
    bits = torch.randint(0, 2, (feature.shape[-1], proj_dim), generator=generator)
    matrix = (2 * bits - 1).to(feature.dtype) / proj_dim**0.5
    return lambda x: x @ matrix


def rival_makers(model: nn.Module, num_rows: int) -> Iterator[tuple[str, str, Callable[[], Arm]]]:
    """List the rivals as (key, label, maker); a maker raises NotRunError, or whatever the rival raises.

    Args:
        model: a model from :mod:`worlds`.
        num_rows: rows of all batches together.

    Yields:
        One triple an arm.
    """
    yield "bergson-projected", f"bergson 2.5.1, projected p={RANK}", lambda: Bergson(model, num_rows, exact=False)
    yield "bergson-exact", "bergson 2.5.1, exact cosine (a second run)", lambda: Bergson(model, num_rows, exact=True)
    yield "dattri-logra", f"dattri-llm 0.1.0, LoGra {RANK}", lambda: DattriLlm(model, exact=False)
    yield "dattri-exact", "dattri-llm 0.1.0, exact cosine", lambda: DattriLlm(model, exact=True)
