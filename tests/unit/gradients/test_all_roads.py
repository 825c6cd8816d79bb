"""One property for every way to measure a linear layer: squared norms, dots and sketches are those of explicit gradients.

Batches without a row, rows without a token and rows of one token are among the examples. Padding has a gradient of zero, as
in the engine, and inputs that are not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests import interpreted

from gradsift.gradients import blocks, fused, products
from gradsift.gradients.blocks import Outer, Totals, make_block
from gradsift.gradients.project import Projector, sketch_reference

KERNELS = interpreted.HERE and fused.interpreted()
if KERNELS:
    interpreted.prepare()
ROADS = {
    "tiles": {},
    "tiles, products by oneDNN": {"skip": not torch.backends.mkldnn.is_available()},
    "torch": {},
    "fused": {"skip": not KERNELS},
    "folded": {},
}
DIM = 61


def outer_of(lengths, rows, cols, dtype, seed, *, flat):
    rng = np.random.default_rng(seed)
    shape = (sum(lengths),) if flat else (len(lengths), max(lengths, default=0))
    x, g = (torch.from_numpy(rng.standard_normal((*shape, n))).to(dtype) for n in (cols, rows))
    if not flat:
        for b, n in enumerate(lengths):
            g[b, n:] = 0
    starts = tuple(int(s) for s in np.cumsum([0, *lengths])[:-1]) if flat else None
    return Outer(x, g, tuple(lengths), starts)


@pytest.mark.parametrize("road", ROADS)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 37), max_size=5), rows=st.integers(2, 40), cols=st.integers(1, 70),
    flat=st.booleans(), tile=st.sampled_from([64, 1 << 16]), seed=st.integers(0, 99),
)  # fmt: skip
@example(lengths=[], rows=5, cols=7, flat=False, tile=64, seed=0)
@example(lengths=[], rows=5, cols=7, flat=True, tile=64, seed=0)
@example(lengths=[0, 0], rows=5, cols=7, flat=True, tile=64, seed=0)
@example(lengths=[1], rows=2, cols=1, flat=False, tile=64, seed=1)
@example(lengths=[17, 0, 1, 33, 16], rows=33, cols=65, flat=False, tile=64, seed=2)
def test_a_linear_layer_is_measured_as_its_gradients_say(road, lengths, rows, cols, flat, tile, seed):
    if ROADS[road].get("skip"):
        pytest.skip(f"not run: {road} is not here")
    dtype = torch.float64 if road in ("tiles", "torch", "folded") else torch.float32
    outer = outer_of(lengths, rows, cols, dtype, seed, flat=flat)
    projector, num = Projector(3, DIM), len(lengths)
    block = make_block("w", rows, cols, projector, dtype=dtype, device=torch.device("cpu"))
    block.road = road.partition(",")[0]
    matrices = torch.from_numpy(np.random.default_rng(seed + 9).standard_normal((3, rows, cols))).to(dtype)
    block.directions = None if road == "folded" else matrices.flatten(1)
    totals = Totals(torch.zeros(num, 3).double(), torch.zeros(num).double(), torch.zeros(num, DIM, dtype=dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TILE", tile)
        patch.setattr(products, "pays", lambda: "oneDNN" in road)
        patch.setattr(products, "WORTH", 0)
        block.measure([outer], totals)
    close = 1e-10 if dtype == torch.float64 else 1e-4
    for b in range(num):
        x, g = (part.double() for part in outer.row(b))
        gradient = g.t() @ x
        scale = max(1.0, float(gradient.norm()))
        assert abs(float(totals.square[b] - gradient.square().sum())) <= close * scale**2
        want = sketch_reference(gradient.numpy(), projector, "w")
        assert float((totals.sketch[b].double() - torch.from_numpy(want)).abs().max()) <= close * scale
        if road != "folded":  # its dots are estimates
            dots = (matrices.double() * gradient).sum((1, 2))
            assert float((totals.dots[b] - dots).abs().max()) <= close * scale * rows * cols
