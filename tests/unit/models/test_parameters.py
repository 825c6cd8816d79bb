import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradsift.errors import ConfigError
from gradsift.models.adapter import attach_lora
from gradsift.models.parameters import Parameters, choose_parameters, coverage
from gradsift.recipe import LoraConfig


def llama(tied):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2))


@pytest.mark.parametrize("model", [llama(True), llama(False), gpt2()], ids=["tied", "untied", "gpt2"])
def test_all_counts_every_parameter_once(model):
    chosen = choose_parameters(model, "all")
    unique = {id(p): p.numel() for p in model.parameters()}
    assert chosen.kind == "all"
    assert chosen.numel == sum(unique.values())
    assert len({id(model.get_parameter(n)) for n in chosen.names}) == len(chosen.names) == len(unique)
    assert list(chosen.names) == [n for n, _ in model.named_parameters() if n in chosen.names]


def test_a_tied_weight_has_its_embeddings_name_even_if_the_head_comes_first():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 6, bias=False)
            self.embed = nn.Embedding(6, 4)
            self.head.weight = self.embed.weight
            self.counter = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)

    model = Backwards()
    assert choose_parameters(model, "all") == Parameters(("embed.weight",), (24,), "all")
    assert choose_parameters(model, ("head.*",)).names == ("embed.weight",)


def test_patterns_keep_model_order_and_take_each_once():
    model = llama(True)
    chosen = choose_parameters(model, ("*.1.*", "*embed*", "lm_head.weight", "*.q_proj.weight"))
    expected = [n for n, _ in model.named_parameters() if ".1." in n or "embed" in n or n.endswith("q_proj.weight")]
    assert list(chosen.names) == expected
    assert chosen.kind == "patterns"


def test_a_pattern_without_a_match_lists_names():
    with pytest.raises(ConfigError, match=r"nosuch[\s\S]*embed_tokens"):
        choose_parameters(llama(True), ("*q_proj*", "nosuch"))
    with pytest.raises(ConfigError, match="no LoRA"):
        choose_parameters(llama(True), "lora")


def test_lora_takes_the_adapter_alone():
    model = attach_lora(llama(True), LoraConfig(rank=2), 0)
    chosen = choose_parameters(model, "lora")
    assert set(chosen.names) == {n for n, p in model.named_parameters() if p.requires_grad}
    # Seven linear layers in each of two blocks, A and B; the head is left out.
    assert len(chosen.names) == 28


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    data=st.data(),
)
def test_coverage_adds_up(sizes, data):
    names = tuple(f"p{i}" for i in range(len(sizes)))
    seen = data.draw(st.sets(st.sampled_from([*names, "other"])))
    result = coverage(Parameters(names, tuple(sizes), "all"), seen)
    assert result.num_seen + sum(sizes[names.index(n)] for n in result.unseen) == sum(sizes) == result.num_chosen
    assert set(result.unseen).isdisjoint(seen)
    assert result.enough == (result.num_seen >= 0.95 * sum(sizes))
