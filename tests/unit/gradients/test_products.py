"""Products by oneDNN: right in every shape and layout, forward and backward, and taken nowhere else than where they are meant."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import TOYS, VOCABULARY, toy_gpt2, toy_llama
from torch.nn import functional

from gradsift.gradients import products, roads
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.gradients.project import Projector, sketch_reference

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="not run: torch without oneDNN")
NARROW, LONG = st.integers(1, 40), st.integers(1, 70)


@pytest.fixture(params=[True, False], ids=["onednn", "plain"])
def pays(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("not run: torch without oneDNN")
    monkeypatch.setattr(products, "pays", lambda: request.param)
    monkeypatch.setattr(products, "WORTH", 0)  # toys are small
    return request.param


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setattr(products, "pays", lambda: True)
    monkeypatch.setattr(products, "WORTH", 0)


def drawn(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def close(got, want):
    """Float32 sums in another order: a few roundings of the sum of sizes."""
    return torch.allclose(got.double(), want, rtol=1e-5, atol=1e-4)


@needs_onednn
@given(rows=NARROW, cols=NARROW, length=LONG, seed=st.integers(0, 9), wide=st.booleans(), whole=st.booleans())
@settings(max_examples=60, deadline=None)
def test_outer_products_in_any_shape_and_layout(rows, cols, length, seed, wide, whole):
    left, right = drawn(seed, (length, rows + 3), (length, cols))
    left = left[:, 1 : rows + 1] if wide else left[:, :rows].contiguous()  # a slice of wider rows, or rows of their own
    want = left.double().t() @ right.double()
    out = torch.full((rows, cols), float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "pays", lambda: True)
        patch.setattr(products, "WORTH", 0)
        products.outer_(out, products.turned(left) if whole else left, right)
        assert close(out, want)
        products.add_product_(out, left, right)
    assert close(out, 2 * want)


@needs_onednn
def test_a_matrix_is_added_to_in_slabs(monkeypatch, forced):
    left, right = drawn(1, (20, 30), (20, 7))
    monkeypatch.setattr(products, "SLAB", 7 * 8)  # eight rows at a time, six in the last
    out = torch.ones(30, 7)
    products.add_product_(out, left, right)
    assert close(out, 1 + left.double().t() @ right.double())


BIASES = ("none", "whole", "strided", "expanded", "one")
LAYOUTS = ("rows", "turned", "columns of wider rows", "expanded")


def bias_of(kind, n):
    (some,) = drawn(6, (2 * n,))
    kinds = {"none": None, "whole": some[:n], "strided": some[::2], "expanded": some[:1].expand(n), "one": some[:1]}
    return kinds[kind]


def laid_out(kind, n, k):
    wide, turned, row = drawn(7, (n, k + 3), (k, n), (1, k))
    kinds = {"rows": wide[:, :k].contiguous(), "turned": turned.t(), "columns of wider rows": wide[:, 1 : k + 1]}
    return {**kinds, "expanded": row.expand(n, k)}[kind]


@needs_onednn
@given(lead=st.lists(st.integers(1, 5), max_size=3), n=NARROW, k=NARROW, bias=st.sampled_from(BIASES),
       weight=st.sampled_from(LAYOUTS), input_=st.sampled_from(["whole", "turned", "expanded"]))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_frozen_layer_is_the_same_layer(lead, n, k, bias, weight, input_):
    x, slope = drawn(2, (*lead, k), (*lead, n))
    shift, weight = bias_of(bias, n), laid_out(weight, n, k)
    if input_ == "turned" and lead:
        x = drawn(3, (*lead[:-1], k, lead[-1]))[0].transpose(-1, -2)
    if input_ == "expanded":
        x, slope = drawn(4, (k,))[0].expand(*lead, k), drawn(5, (n,))[0].expand(*lead, n)
    found = {}
    for name in (True, False):
        seen = x.detach().requires_grad_(True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "pays", lambda name=name: name)
            patch.setattr(products, "WORTH", 0)
            with products.FrozenProducts():
                out = functional.linear(seen, weight, shift)
            (grad,) = torch.autograd.grad(out, seen, slope)
        found[name] = (out, grad)
    for fast, plain in zip(found[True], found[False], strict=True):
        assert fast.shape == plain.shape
        assert close(fast, plain.double())


@needs_onednn
def test_a_weight_that_is_written_to_before_the_backward_is_told(forced):
    x, weight = drawn(3, (4, 8), (5, 8))
    with products.FrozenProducts():
        out = functional.linear(x.requires_grad_(True), weight)
    weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@needs_onednn
def test_what_is_trained_or_double_or_empty_is_left_to_torch(monkeypatch, forced):
    taken = []
    monkeypatch.setattr(products, "linear", lambda *args: taken.append(args))
    x, weight = drawn(3, (4, 8), (5, 8))
    with products.FrozenProducts():
        trained = functional.linear(x, weight.clone().requires_grad_(True))
        functional.linear(x, weight, torch.zeros(5, requires_grad=True))
        functional.linear(x.double(), weight.double())
        functional.linear(x.bfloat16(), weight.bfloat16())
        functional.linear(x[:0], weight)
        torch.addmm(torch.zeros(4, 5), x, weight.t())  # no bias: a matrix
        torch.addmm(torch.zeros(5), x, weight.t(), beta=2)
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.linear(x, weight).dtype == torch.bfloat16
    assert not taken
    assert trained.requires_grad
    functional.linear(x, weight)  # outside
    assert not taken
    with products.FrozenProducts():
        functional.linear(x, weight)
        functional.linear(input=x, weight=weight)
        torch.addmm(torch.zeros(5), x, weight.t())
    assert len(taken) == 3


@needs_onednn
def test_small_products_stay_with_torch(monkeypatch):
    monkeypatch.setattr(products, "pays", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)  # a call would raise
    x, weight = drawn(3, (4, 8), (5, 8))
    products.linear(x, weight)
    products.outer_(torch.empty(8, 5), x, drawn(4, (4, 5))[0])
    with pytest.raises(TypeError):
        products.linear(torch.ones(128, 128), torch.ones(128, 128))


def test_lengths_are_rounded_up_to_what_is_there(monkeypatch):
    monkeypatch.setattr(products, "pays", lambda: True)
    assert [products.rounded(n, 40) for n in (1, 16, 17, 33, 40)] == [16, 16, 32, 40, 40]
    monkeypatch.setattr(products, "pays", lambda: False)
    assert products.rounded(17, 40) == 17


@pytest.mark.parametrize("toy", sorted(TOYS))
def test_the_engine_agrees_with_the_oracle_on_both_roads(toy, pays):
    """Rows long enough for oneDNN's outer products and one that is not, float32 against float64."""
    model = TOYS[toy](dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    names = [name for name in names if "lora_" in name] or names
    lengths = (5, 23, 30)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, VOCABULARY, (3, 30), generator=generator)
    labels = ids.clone()
    for b, n in enumerate(lengths):
        labels[b, n:] = -100
    labels[:, :3] = -100
    exact = copy.deepcopy(model).double()
    projector = Projector(seed=7, dim=61)
    engine = GradientEngine(model, names, projector=projector)
    directions = {name: drawn(5, (b.rows, b.cols))[0] for name, b in engine.blocks.items()}
    engine.num_directions = 1
    for name, block in engine.blocks.items():
        block.directions = engine.flatten(name, [directions[name]])
    with engine:
        got = engine.measure(ids, labels, torch.tensor(lengths))
    assert ("oneDNN" in engine.description) is pays
    for b, n in enumerate(lengths):
        want = example_gradient(exact, names, ids[b, :n], labels[b, :n])
        matrices = {name: engine.matrix(name, value) for name, value in want.by_name.items()}
        square = sum(float(m.square().sum()) for m in matrices.values())
        dot = sum(float((m * directions[name].double()).sum()) for name, m in matrices.items())
        scale = square**0.5
        assert got.loss[b].item() == pytest.approx(want.loss, rel=1e-5)
        assert got.square[b].item() == pytest.approx(square, rel=1e-4)
        assert got.dots[b, 0].item() == pytest.approx(dot, abs=1e-4 * scale)
        sketch = sum(sketch_reference(m.numpy(), projector, name) for name, m in matrices.items())
        assert torch.allclose(got.sketch[b].double(), torch.as_tensor(sketch), atol=1e-4 * scale)


@pytest.mark.parametrize("make", [toy_llama, toy_gpt2])
def test_linear_layers_of_both_kinds_go_the_faster_way(make, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("not run: torch without oneDNN")
    monkeypatch.setattr(products, "pays", lambda: True)
    monkeypatch.setattr(products, "WORTH", 0)
    calls, plain = [], products.linear
    monkeypatch.setattr(products, "linear", lambda *args: calls.append(args[1].shape) or plain(*args))
    model = make(dtype=torch.float32)
    engine = GradientEngine(model, [])
    ids = torch.arange(4, 24)[None]
    with engine:
        engine.measure(ids, ids.clone(), torch.tensor([20]))
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert len(calls) == 2 * len(layers)  # forward and back to the input, the head included
    calls.clear()
    model(input_ids=ids)  # nothing stays behind
    assert not calls


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 2\n", "AuthenticAMD"),
        ("vendor_id : GenuineIntel\n", "GenuineIntel"),
        ("processor : 0\nCPU implementer : 0x41\n", ""),
        (None, ""),
    ],
)
def test_the_vendor_is_what_linux_says(text, name, monkeypatch):
    def read(self, *_):
        if text is None:
            raise FileNotFoundError(self)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert products.vendor() == name


@pytest.mark.parametrize(
    ("vendor", "capability", "onednn", "mkl", "want"),
    [
        ("AuthenticAMD", "AVX512", True, True, True),
        ("GenuineIntel", "AVX512", True, True, False),
        ("AuthenticAMD", "AVX2", True, True, False),
        ("AuthenticAMD", "AVX512", False, True, False),
        ("AuthenticAMD", "AVX512", True, False, False),
        ("", "AVX512", True, True, False),
    ],
)
def test_it_pays_on_other_vendors_processors_with_avx512(vendor, capability, onednn, mkl, want, monkeypatch):
    monkeypatch.setattr(products, "vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    assert products.pays.__wrapped__() is want
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"  # a user's own setting stays
    assert os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == ("64" if want else None)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)


@needs_onednn
@pytest.mark.filterwarnings("ignore:TF32")
def test_it_is_switched_off_with_onednn_itself():
    with torch.backends.mkldnn.flags(enabled=False):
        assert products.pays.__wrapped__() is False


def test_only_a_cpu_in_single_precision_is_said_to_use_it(monkeypatch):
    monkeypatch.setattr(products, "pays", lambda: True)
    cpu = torch.device("cpu")
    assert roads.describe("tiles", cpu, torch.float32).endswith("oneDNN")
    assert "oneDNN" not in roads.describe("tiles", cpu, torch.float64)
    assert "oneDNN" not in roads.describe("torch", cpu, torch.float32)
