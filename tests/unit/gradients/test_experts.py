"""Fused experts and their routers against autograd, one example at a time; every layout that transformers has."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.toy import COMMON, _finish
from tests.unit.gradients.test_engine import PROJECTOR, batch, random_directions
from torch import nn

from gradsift.errors import ModelError
from gradsift.gradients import adam
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.gradients.experts import is_experts, tapped
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.gradients.project import sketch_reference
from gradsift.models.parameters import choose_parameters, coverage
from gradsift.types import RowStatus, TokenRow

SMALL = {**COMMON, "num_key_value_heads": 2}


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **SMALL, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40
    )
    return Qwen2MoeForCausalLM(config)


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SMALL, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, head_dim=8, norm_topk_prob=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=8, attn_implementation="eager", sliding_window=128
    )
    return GptOssForCausalLM(config)


def granite_moe():
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    return GraniteMoeForCausalLM(GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


GROUPED = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip


def deepseek_v3():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**SMALL, "num_key_value_heads": 4}, **GROUPED, **heads))


def glm4_moe():
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    return Glm4MoeForCausalLM(Glm4MoeConfig(**SMALL, **GROUPED, head_dim=8))


FAMILIES = {f.__name__: f for f in (mixtral, qwen2_moe, qwen3_moe, gpt_oss, granite_moe, deepseek_v3, glm4_moe)}
WHOLE = {
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "glm4_moe",
}  # every weight is measured; the others are told what is not


def made(name, seed=0):
    torch.manual_seed(seed)
    model = FAMILIES[name]()
    model.config._experts_implementation = "eager"  # grouped products know no float64
    return _finish(model, seed, torch.float64)


def expert_names(model):
    modules = {name: module for name, module in model.named_modules() if is_experts(module)}
    assert modules, "the family has fused experts"
    return [f"{name}.{local}" for name, m in modules.items() for local, _ in m.named_parameters(recurse=False)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tapped_forward_is_the_models_own(name):
    model = made(name)
    ids, _, _ = batch([9, 6, 12])
    with torch.no_grad():
        want = model(input_ids=ids).logits
        experts = [m for m in model.modules() if is_experts(m)]
        from contextlib import ExitStack

        calls = []
        with ExitStack() as stack:
            for module in experts:
                stack.enter_context(tapped(module, lambda *got: calls.append(got[0])))
            got = model(input_ids=ids).logits
        assert len(calls) == 2 * len(experts)
        assert torch.equal(model(input_ids=ids).logits, want), "the module's own forward is back"
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("road", ["tiles", "torch"])
def test_every_example_equals_autograd(name, road):
    model = made(name)
    parameters = choose_parameters(model, "all")
    engine = GradientEngine(model, parameters.names, projector=PROJECTOR, road=road)
    covered = coverage(parameters, engine.blocks)
    assert set(expert_names(model)) <= set(engine.blocks)
    if name in WHOLE:
        assert covered.unseen == ()
    directions = random_directions(engine, 3, torch.float64)
    engine.num_directions = 3
    for key, block in engine.blocks.items():
        block.directions = engine.flatten(key, directions[key])
    ids, labels, lengths = batch([9, 1 + 5, 12, 2])
    with engine:
        got = engine.measure(ids, labels, lengths)
    for b, n in enumerate(lengths.tolist()):
        gradient = example_gradient(model, list(engine.blocks), ids[b, :n], labels[b, :n])
        matrices = {key: engine.matrix(key, g).double() for key, g in gradient.by_name.items()}
        square = sum(float(m.square().sum()) for m in matrices.values())
        assert float(got.square[b]) == pytest.approx(square, rel=1e-5)
        for i in range(3):
            dot = sum(float((m * directions[key][i]).sum()) for key, m in matrices.items())
            assert float(got.dots[b, i]) == pytest.approx(dot, rel=1e-5, abs=1e-5 * square**0.5)
        sketch = sum(sketch_reference(m.numpy(), PROJECTOR, key) for key, m in matrices.items())
        np.testing.assert_allclose(got.sketch[b].numpy(), sketch, atol=1e-5 * square**0.5)


def test_experts_alone_are_measured_with_the_backward_stopped_and_without_norms():
    model = made("mixtral")
    names = [n for n in expert_names(model) if "layers.1" in n]
    ids, labels, lengths = batch([9, 6])
    full = GradientEngine(model, names, projector=PROJECTOR, edges=False)
    with full:
        want = full.measure(ids, labels, lengths)
    bare = GradientEngine(model, names, projector=PROJECTOR, norms=False)
    with bare:
        got = bare.measure(ids, labels, lengths)
    torch.testing.assert_close(got.sketch, want.sketch)
    assert torch.isnan(got.square).all()
    for b, n in enumerate(lengths.tolist()):
        by_name = example_gradient(model, names, ids[b, :n], labels[b, :n]).by_name
        assert float(want.square[b]) == pytest.approx(sum(float(g.square().sum()) for g in by_name.values()), rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_anchors_mean_and_adam_directions_take_experts_too(name):
    model = made(name)
    names = [n for n in expert_names(model) if "layers.0" in n]
    ids, labels, lengths = batch([9, 6])
    building = GradientEngine(model, names, projector=PROJECTOR, building=True)
    with building:
        building.measure(ids, labels, lengths)
    each = [example_gradient(model, names, ids[b, :n], labels[b, :n]).by_name for b, n in enumerate(lengths.tolist())]
    for key in names:
        want = sum(building.matrix(key, one[key]) for one in each)
        torch.testing.assert_close(building.blocks[key].mean, want, rtol=1e-5, atol=1e-8)
    engine = GradientEngine(model, names, projector=PROJECTOR)
    size = {key: dict(model.named_parameters())[key].shape for key in names}
    first = {key: torch.full(size[key], 0.01) for key in names}
    second = {key: torch.full(size[key], 0.02) for key in names}
    adam.bend(engine, first, second, "adam")
    with engine:
        got = engine.measure(ids, labels, lengths)
    for b, one in enumerate(each):
        bent = {key: adam.gamma(g, first[key].double(), second[key].double()) for key, g in one.items()}
        sketch = sum(sketch_reference(engine.matrix(key, g).numpy(), PROJECTOR, key) for key, g in bent.items())
        want = torch.as_tensor(sketch) / np.linalg.norm(sketch) * got.square[b].sqrt()
        torch.testing.assert_close(got.sketch[b], want, rtol=1e-4, atol=1e-6)


def test_a_router_that_returns_something_else_is_refused():
    model = made("mixtral")
    router = next(m for m in model.modules() if type(m).__name__.endswith("TopKRouter"))
    own = router.forward
    router.forward = lambda x: (own(x)[0].softmax(-1), *own(x)[1:])
    name = next(n for n, m in model.named_modules() if m is router)
    ids, labels, lengths = batch([9, 6])
    engine = GradientEngine(model, [f"{name}.weight"])
    with engine, pytest.raises(ModelError, match="router does not return the logits"):
        engine.measure(ids, labels, lengths)


def test_a_router_meets_a_row_that_is_not_finite_first_and_sets_that_row_alone_aside():
    model = _finish(FAMILIES["mixtral"](), 0, torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    generator = np.random.default_rng(0)
    rows = [TokenRow(f"r{i}", generator.integers(8, 200, 9), np.arange(9) > 4, 9, RowStatus.OK) for i in range(4)]
    rows[1].input_ids[2] = 7
    engine = GradientEngine(model, choose_parameters(model, "all").names, projector=PROJECTOR)
    run = Pass(engine, (), 100, 3)
    with engine:
        got = measure_shard(run, rows)
        want = [measure_shard(run, [row]).grad_norm[0] for row in rows if row.id != "r1"]
    assert got.status == (RowStatus.OK, RowStatus.NONFINITE_LOSS, RowStatus.OK, RowStatus.OK)
    np.testing.assert_allclose(got.grad_norm[[0, 2, 3]], want, rtol=1e-5)


def test_an_adapter_on_fused_experts_is_told_as_not_read():
    """Peft adds such an adapter to the weight itself: its A and B see no token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft speaks of patterns that it set itself
        config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
        model = get_peft_model(made("mixtral"), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    names = choose_parameters(model, "lora").names
    engine = GradientEngine(model, names)
    assert set(engine.uncovered) == {name for name in names if ".experts." in name}
    assert engine.uncovered
    ids, labels, lengths = batch([9, 6])
    with engine:
        got = engine.measure(ids, labels, lengths)
    for b, n in enumerate(lengths.tolist()):
        by_name = example_gradient(model, list(engine.blocks), ids[b, :n], labels[b, :n]).by_name
        assert float(got.square[b]) == pytest.approx(sum(float(g.square().sum()) for g in by_name.values()), rel=1e-5)


def test_experts_are_told_from_other_modules():
    model = made("mixtral")
    found = [type(m).__name__ for m in model.modules() if is_experts(m)]
    assert found == ["MixtralExperts"] * 2
    assert not is_experts(nn.Linear(2, 2))
