"""The norms that grads ranks by: the specification's figures, soft-capped and scaled families, and autograd."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.toy import COMMON
from tests.unit.gradients.test_engine import batch
from torch import nn

from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.gradients.project import Projector

E = [[0.5, -0.2], [0.1, 0.3], [-0.4, 0.2], [0.2, 0.1]]
W = [[0.3, 0.1], [-0.2, 0.4], [0.1, -0.3], [0.0, 0.2]]
IDS, LABELS = torch.tensor([[1, 2, 1, 3]]), torch.tensor([[-100, -100, 1, 3]])


class Small(nn.Module):
    """h_t = tanh(mean of the embeddings up to t), logits W h_t."""

    def __init__(self, tied):
        super().__init__()
        self.table = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.table.weight = nn.Parameter(torch.tensor(E, dtype=torch.float64))
        self.head.weight = self.table.weight if tied else nn.Parameter(torch.tensor(W, dtype=torch.float64))

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        x = self.table(input_ids)
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
        return SimpleNamespace(logits=self.head(torch.tanh(x.cumsum(1) / count)))


@pytest.mark.parametrize(
    ("tied", "loss", "head", "emb"), [(False, 1.319216, 0.131489, 0.154749), (True, 1.368046, 0.138388, 0.077923)]
)
@pytest.mark.parametrize("chosen", [["table.weight"], []], ids=["by the block", "by the closed form"])
def test_the_figures_of_the_specification(tied, loss, head, emb, chosen):
    engine = GradientEngine(Small(tied), chosen)
    with engine:
        got = engine.measure(IDS, LABELS, torch.tensor([4]))
    assert float(got.loss[0]) == pytest.approx(loss, abs=5e-7)
    assert float(got.head_norm[0]) == pytest.approx(head, abs=5e-7)
    assert float(got.emb_norm[0]) == pytest.approx(emb, abs=5e-7)
    # Without summing repeated tokens, and with the shared gradient that autograd gives, the norm would be another one.
    assert abs(float(got.emb_norm[0]) - 0.145132) > 1e-3
    shared = example_gradient(Small(tied), ["table.weight"], IDS[0], LABELS[0]).by_name["table.weight"].norm()
    if tied:
        assert float(shared) == pytest.approx(0.146078, abs=5e-7)
        assert all(abs(float(shared) - float(n)) > 5e-3 for n in (got.head_norm[0], got.emb_norm[0]))


def gemma2(tied):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **COMMON, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=5.0,
        attn_implementation="eager", tie_word_embeddings=tied,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def granite(tied):
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        **COMMON, num_key_value_heads=2, embedding_multiplier=7.0, logits_scaling=3.0, tie_word_embeddings=tied
    )
    return GraniteForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [gemma2, granite])
def test_soft_caps_and_multipliers_are_in_the_norms(make, tied):
    torch.manual_seed(3)
    model = make(False).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        if tied:
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    ids, labels, lengths = batch([9, 6])
    wants = [example_gradient(model, names, ids[b, :n], labels[b, :n]).by_name for b, n in enumerate(lengths.tolist())]
    if tied:  # the same function, with one table: its parts must stay what they were apart
        model.lm_head.weight = model.model.embed_tokens.weight
    for chosen in (["model.norm.weight"], ["model.embed_tokens.weight"]):
        engine = GradientEngine(model, chosen)
        with engine:
            got = engine.measure(ids, labels, lengths)
        for b, want in enumerate(wants):
            assert float(got.emb_norm[b]) == pytest.approx(float(want[names[0]].norm()), rel=1e-9)
            assert float(got.head_norm[b]) == pytest.approx(float(want[names[1]].norm()), rel=1e-9)


def test_norms_do_not_depend_on_neighbors_or_order():
    torch.manual_seed(1)
    model = granite(False).double()
    ids, labels, lengths = batch([9, 6, 12])
    engine = GradientEngine(model, ["lm_head.weight"])
    with engine:
        together, turned = (
            engine.measure(ids, labels, lengths),
            engine.measure(ids.flip(0), labels.flip(0), lengths.flip(0)),
        )
        for b, n in enumerate(lengths.tolist()):
            alone = engine.measure(ids[b : b + 1, :n], labels[b : b + 1, :n], lengths[b : b + 1])
            for name in ("emb_norm", "head_norm"):
                want = float(getattr(alone, name)[0])
                np.testing.assert_allclose([getattr(together, name)[b], getattr(turned, name)[2 - b]], want, rtol=1e-10)


@pytest.mark.parametrize("lora", [False, True])
def test_without_edges_the_pass_is_the_same_and_ends_at_the_lowest_chosen_weight(lora):
    torch.manual_seed(1)
    model = granite(False).double()
    if lora:
        from gradsift.models.adapter import attach_lora
        from gradsift.recipe import LoraConfig

        model = attach_lora(model, LoraConfig(rank=2, alpha=4.0), 0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    names = [n for n, _ in model.named_parameters() if ("lora_" in n if lora else "layers.1.mlp" in n)]
    ids, labels, lengths = batch([9, 6, 12])
    got, reached = {}, {}
    for edges in (True, False):
        engine = GradientEngine(model, names, projector=Projector(7, 61), edges=edges)
        below: list[bool] = []
        look = model.get_input_embeddings().register_forward_hook(
            lambda *a, below=below: below.append(a[2].requires_grad)
        )
        with engine:
            got[edges] = engine.measure(ids, labels, lengths)
        look.remove()
        reached[edges] = below
    assert engine.edge_norms == ()
    assert torch.isnan(got[False].emb_norm).all()
    assert torch.isnan(got[False].head_norm).all()
    assert torch.isfinite(got[True].emb_norm).all()
    assert torch.isfinite(got[True].head_norm).all()
    assert torch.allclose(got[True].square, got[False].square, rtol=1e-12)
    assert torch.allclose(got[True].sketch, got[False].sketch, rtol=1e-9, atol=1e-12)
    for b, n in enumerate(lengths.tolist()):
        want = example_gradient(model, names, ids[b, :n], labels[b, :n])
        square = sum(float(g.double().square().sum()) for g in want.by_name.values())
        assert float(got[False].square[b]) == pytest.approx(square, rel=1e-9)
    assert reached[False] == [False], "no gradient is to go down to the embedding"


def test_chosen_tables_bring_their_norms_without_being_asked():
    torch.manual_seed(1)
    model = granite(False).double()
    ids, labels, lengths = batch([9, 6])
    for chosen, named in (
        (["lm_head.weight"], ("head_grad_norm",)),
        (["model.embed_tokens.weight"], ("emb_grad_norm",)),
    ):
        full, bare = GradientEngine(model, chosen), GradientEngine(model, chosen, edges=False)
        assert full.edge_norms == ("emb_grad_norm", "head_grad_norm")
        assert bare.edge_norms == named
        with full:
            want = full.measure(ids, labels, lengths)
        with bare:
            got = bare.measure(ids, labels, lengths)
        for name, norm in (("emb_grad_norm", "emb_norm"), ("head_grad_norm", "head_norm")):
            if name in named:
                assert torch.allclose(getattr(got, norm), getattr(want, norm), rtol=1e-12)
            else:
                assert torch.isnan(getattr(got, norm)).all()
