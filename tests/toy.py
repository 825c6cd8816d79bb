"""Tiny seeded models and tokenizers of several families, made in memory: no file, no network."""

from __future__ import annotations

from types import MethodType

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ (message['content'] or '') + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{%- else -%}{{ (message['content'] or '') + '<|im_end|>' + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
VOCABULARY = 260


def toy_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: 256 bytes and four special tokens; ChatML with generation markers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def _finish(model: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """Seed every weight, vectors included, and let norms work in the model's dtype (float64 must be float64)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        if parameter.ndim == 1:
            parameter.data += 1.0
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(_rms_in_dtype, module)
    return model.to(dtype).eval()


def _rms_in_dtype(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    weight = 1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def toy_llama(seed: int = 0, dtype: torch.dtype = torch.float32, *, tied: bool = False) -> LlamaForCausalLM:
    """Grouped queries, RMSNorm, untied head."""
    config = LlamaConfig(**COMMON, num_key_value_heads=2, tie_word_embeddings=tied)
    return _finish(LlamaForCausalLM(config), seed, dtype)


def toy_gpt2(seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Conv1D layers with biases, LayerNorm, learned positions, tied head."""
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=3,
        resid_pdrop=0.1,
    )
    return _finish(GPT2LMHeadModel(config), seed, dtype)


def toy_qwen2(seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Biases on q, k, v; tied head."""
    config = Qwen2Config(**COMMON, num_key_value_heads=2, tie_word_embeddings=True)
    return _finish(Qwen2ForCausalLM(config), seed, dtype)


def toy_qwen3(seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """A norm on every head of q and k."""
    config = Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8)
    return _finish(Qwen3ForCausalLM(config), seed, dtype)


def toy_gemma(seed: int = 0, dtype: torch.dtype = torch.float32) -> GemmaForCausalLM:
    """Scaled embedding, (1 + w) RMSNorm, tied head, one key-value head."""
    config = GemmaConfig(**COMMON, num_key_value_heads=1, head_dim=8)
    return _finish(GemmaForCausalLM(config), seed, dtype)


def toy_lora(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama with a LoRA adapter whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    model = toy_llama(seed, dtype)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.1
    return adapted.to(dtype).eval()


TOYS = {
    "llama": toy_llama,
    "gpt2": toy_gpt2,
    "qwen2": toy_qwen2,
    "qwen3": toy_qwen3,
    "gemma": toy_gemma,
    "lora": toy_lora,
}
