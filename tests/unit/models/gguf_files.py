"""Writes small real GGUF files of random models, with a byte-level tokenizer, through the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "he", "ll", "hell", "hello"]
MERGES = ["h e", "l l", "he ll", "hell o"]
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def llama(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied, rope_theta=50000.0, rms_norm_eps=1e-5)
    return LlamaForCausalLM(config).eval()


def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False, rope_theta=50000.0, rms_norm_eps=1e-5))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Order rows as llama.cpp does, one row at a time: row 2i of a head is its row i, row 2i+1 is its row h+i."""
    head = weight.shape[0] // num_heads
    out = np.empty_like(weight)
    for h in range(num_heads):
        for i in range(head // 2):
            out[h * head + 2 * i] = weight[h * head + i]
            out[h * head + 2 * i + 1] = weight[h * head + head // 2 + i]
    return out


def write(model: torch.nn.Module, path: Path, *, architecture: str = "llama", quantize: bool = False) -> Path:
    config = model.config
    out = gguf.GGUFWriter(path, architecture)
    out.add_license("apache-2.0")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(50000.0)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(TOKENS)
    out.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    out.add_token_merges(MERGES)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(2)
    out.add_unk_token_id(0)
    out.add_add_bos_token(False)
    out.add_chat_template(TEMPLATE)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        parts = stem.split(".")
        block = parts[1:3] == ["layers", parts[2]] if len(parts) > 2 else False
        target = f"blk.{parts[2]}.{_NAMES['.'.join(parts[3:])]}" if block else _NAMES[stem]
        weight = parameter.detach().float().numpy()
        if architecture == "llama" and parts[-1] in heads:
            weight = interleave(weight, heads[parts[-1]])
        if quantize and weight.ndim == 2:
            q4 = gguf.GGMLQuantizationType.Q4_1
            out.add_tensor(f"{target}.{kind}", gguf.quants.quantize(weight, q4), raw_dtype=q4)
        else:
            out.add_tensor(f"{target}.{kind}", np.ascontiguousarray(weight))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
