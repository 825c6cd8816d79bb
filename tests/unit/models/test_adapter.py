import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradsift.errors import ConfigError, ModelError
from gradsift.models.adapter import adapter_parameters, adapter_sha256, attach_lora, load_adapter, save_adapter
from gradsift.recipe import LoraConfig

LORA = LoraConfig(rank=4, alpha=6.0)


def llama(width=32, layers=2, tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)).eval()


IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(make):
    model = make()
    before = model(IDS).logits
    adapted = attach_lora(model, LORA, 7)
    torch.testing.assert_close(adapted(IDS).logits, before, rtol=0, atol=0)
    trains = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in adapter_parameters(adapted)}
    assert trains
    assert not adapted.training
    assert not any("lm_head" in n for n in trains)
    for name, p in adapter_parameters(adapted):
        if ".lora_B." in name:
            assert not p.any()
        else:
            bound = 1 / math.sqrt(p.shape[1])
            assert p.shape[0] == 4
            assert 0.8 * bound < p.abs().max() <= bound
            assert p.detach().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)


def test_the_scale_is_alpha_over_rank():
    adapted = attach_lora(llama(), LORA, 0)
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x = torch.randn(3, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + 1.5 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)


def test_bits_depend_on_names_and_seed_alone():
    first = adapter_sha256(attach_lora(llama(), LORA, 7))
    torch.manual_seed(99)
    assert adapter_sha256(attach_lora(llama(), LORA, 7)) == first
    assert adapter_sha256(attach_lora(llama(), LORA, 8)) != first
    louder = LORA.model_copy(update={"alpha": 2 * LORA.alpha})  # the same matrices, but every gradient is twice as long
    assert adapter_sha256(attach_lora(llama(), louder, 7)) != first
    # A layer draws the same numbers whatever other layers have adapters, and different layers differ.
    every = dict(adapter_parameters(attach_lora(llama(), LORA, 7)))
    few = dict(
        adapter_parameters(attach_lora(llama(layers=1), LoraConfig(rank=4, alpha=6.0, target_modules=("q_proj",)), 7))
    )
    assert few
    for name, parameter in few.items():
        torch.testing.assert_close(parameter, every[name], rtol=0, atol=0)
    q, k = (every[f"base_model.model.model.layers.0.self_attn.{n}_proj.lora_A.default.weight"] for n in "qk")
    assert not torch.equal(q, k)


def test_committed_draws():
    # The same bits everywhere: a change of these numbers is a change of every stored signal.
    adapted = attach_lora(llama(), LORA, 42)
    weight = adapted.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    expected = torch.tensor(COMMITTED)
    torch.testing.assert_close(weight[0, :4].detach(), expected, rtol=0, atol=0)


COMMITTED = [-0.15702582895755768, 0.052680183202028275, -0.08969737589359283, 0.14405857026576996]


def test_global_generator_is_left_alone():
    model = llama()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    attach_lora(model, LORA, 7)
    assert torch.equal(torch.rand(3), expected)


def test_dtypes():
    kinds = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        kinds[dtype] = dict(adapter_parameters(attach_lora(llama().to(dtype), LORA, 7)))
    assert {p.dtype for p in kinds[torch.float64].values()} == {torch.float64}
    assert {p.dtype for p in kinds[torch.bfloat16].values()} == {torch.float32}
    for name, p in kinds[torch.float32].items():
        assert torch.equal(p.double(), kinds[torch.float64][name])
        assert torch.equal(p, kinds[torch.bfloat16][name])


def test_unknown_modules_are_refused_with_names():
    with pytest.raises(ConfigError, match=r"target_modules[\s\S]*q_proj"):
        attach_lora(llama(), LoraConfig(target_modules=("nosuch",)), 0)


@pytest.mark.parametrize(("targets", "got"), [
    (("q_proj", "v_porj"), "v_porj"),
    (("q_proj", "embed_tokens"), "embed_tokens"),
    (("embed_tokens",), "embed_tokens"),
    (".*(q_proj|embed_tokens)", "embed_tokens"),
    ("*_proj", "nothing to repeat"),
])  # fmt: skip
def test_every_name_must_give_matrices_that_are_measured(targets, got):
    with pytest.raises(ConfigError, match="target_modules") as refused:
        attach_lora(llama(tied=False), LoraConfig(target_modules=targets), 0)
    assert got in refused.value.got
    assert "q_proj" in refused.value.expected


def test_names_may_be_paths_and_patterns():
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    for targets in (("layers.1.self_attn.q_proj",), ("model.layers.1.self_attn.q_proj",), r".*layers\.1.*q_proj"):
        adapted = attach_lora(llama(tied=False), LoraConfig(target_modules=targets), 0)
        assert {name.partition(".lora_")[0] for name, _ in adapter_parameters(adapted)} == {layer}


def warm(make=llama):
    adapted = attach_lora(make(), LORA, 7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in adapter_parameters(adapted):
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return adapted


@pytest.mark.parametrize("make", [llama, gpt2])
def test_saved_and_loaded_again(tmp_path, make):
    adapted = warm(make)
    save_adapter(adapted, tmp_path / "adapter")
    back = load_adapter(make(), tmp_path / "adapter")
    assert adapter_sha256(back) == adapter_sha256(adapted)
    torch.testing.assert_close(back(IDS).logits, adapted(IDS).logits, rtol=0, atol=0)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {n for n, _ in adapter_parameters(back)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert sorted(p.suffix for p in (tmp_path / "adapter").iterdir()) == [".json", ".safetensors"]


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    save_adapter(warm(), tmp_path / "adapter")
    for other in (llama(width=16), llama(layers=1), gpt2()):
        with pytest.raises(ModelError, match="does not fit"):
            load_adapter(other, tmp_path / "adapter")


def test_pickled_and_damaged_adapters_are_refused(tmp_path):
    save_adapter(warm(), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    cut = dict(list(weights.items())[1:])
    save_file(cut, path)
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(llama(), tmp_path / "adapter")
    path.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(llama(), tmp_path / "adapter")
    path.unlink()
    with pytest.raises(ModelError, match="not a safetensors adapter"):
        load_adapter(llama(), tmp_path / "adapter")
