"""GGUF files become ordinary folders: config.json, model.safetensors and tokenizer files, in float32.

Llama-architecture files are read directly: tensors dequantized and renamed, the rows of q and k put back from the
interleaved rotary order of llama.cpp into the half-split order of transformers. That takes seconds where transformers'
own route takes a minute. Everything else goes the way of transformers. float32 is the smallest type that keeps every
bit: a Q4_1 weight is a 4-bit number times a float16 scale plus a float16 minimum, which bfloat16 would round.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from gradsift.data.cache import published_folder, sha256_file
from gradsift.errors import DependencyError, ModelError
from gradsift.models.foreign import no_progress_bar, short

if TYPE_CHECKING:
    from gguf import GGUFReader

# Raise it whenever the same file would convert to other bytes: old conversions are then left alone.
CONVERTER_VERSION = 2
RECORD = "gradsift.json"
WEIGHTS = "model.safetensors"

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


@dataclass(frozen=True)
class Conversion:
    """What made a converted folder; stored in it as ``gradsift.json``.

    Args:
        source: file name of the GGUF file.
        source_sha256: its hash.
        architecture: ``general.architecture`` of the file.
        license: ``general.license`` of the file, empty when it states none.
        route: ``direct`` or ``transformers``.
        converter: version of the converter.
        weights_sha256: hash of each weights file of the folder, by name.
    """

    source: str
    source_sha256: str
    architecture: str
    license: str
    route: str
    converter: int
    weights_sha256: dict[str, str]


def read_conversion(folder: Path) -> Conversion | None:
    """Read the record of a converted folder.

    Args:
        folder: any model folder.

    Returns:
        The record, or None for a folder that was not converted here.

    Raises:
        ModelError: the record is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return Conversion(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):
        raise ModelError(
            "the record of the converted model is damaged", where=str(path), do=f"delete {folder} and try again"
        ) from None


def convert_gguf(source: Path, folder: Path, *, source_sha256: str | None = None) -> Conversion:
    """Convert a GGUF file to an ordinary model folder, published whole.

    A file that is damaged, split, or of a kind that neither route can read is a ModelError; without the package gguf
    it is a DependencyError.

    Args:
        source: the GGUF file.
        folder: where the folder is to stand; must not exist.
        source_sha256: hash of the file, if it is known already.

    Returns:
        What was done.
    """
    reader = _open(source)
    architecture = _text(reader, "general.architecture")
    direct = architecture == "llama" and _is_plain_llama(reader)
    with published_folder(folder) as temporary:
        # Alone in a folder, so that no version of transformers mixes in config or template files lying beside it.
        alone = temporary / "alone"
        alone.mkdir()
        _place(source, alone / "model.gguf")
        if direct:
            _write_llama(reader, temporary)
        else:
            _write_by_transformers(alone, temporary, architecture)
        _write_tokenizer(reader, alone, temporary)
        shutil.rmtree(alone)
        record = Conversion(
            source=source.name,
            source_sha256=source_sha256 or sha256_file(source),
            architecture=architecture,
            license=_text(reader, "general.license"),
            route="direct" if direct else "transformers",
            converter=CONVERTER_VERSION,
            weights_sha256={p.name: sha256_file(p) for p in sorted(temporary.glob("*.safetensors"))},
        )
        (temporary / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", "utf-8")
    return record


def _open(source: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise DependencyError(
            "reading a GGUF file needs the package gguf", where=str(source), do="pip install 'gradsift[demo]'"
        ) from None
    with source.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError("this is not a GGUF file", where=str(source), got=repr(magic), expected="b'GGUF' at its start")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", source.name) and not source.name.endswith("-00001-of-00001.gguf"):
        raise ModelError(
            "the GGUF file is one part of several",
            where=str(source),
            do="join the parts with llama-gguf-split --merge and give the joined file",
        )
    try:
        return GGUFReader(source)
    except Exception as error:  # the reader raises whatever its parsing met: index, value, memory-map, decoding errors
        raise ModelError(
            "the GGUF file is damaged or of an unknown version",
            where=str(source),
            got=short(error),
            do="download it again",
        ) from None


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _number(reader: GGUFReader, key: str, default: float | None = None) -> Any:
    field = reader.get_field(f"llama.{key}")
    if field is None and default is None:
        raise ModelError("the GGUF file lacks a field", got=f"llama.{key} is missing", do="use another file")
    return default if field is None else field.contents()


def _rename(name: str) -> str | None:
    """Give the name in transformers, or None for a tensor the direct route does not know."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}" if match and match[2] in _BLOCK else None


def _is_plain_llama(reader: GGUFReader) -> bool:
    """Whether the direct route knows everything in the file: no scaled or partial rotary embedding, no experts."""
    scaling = _text(reader, "llama.rope.scaling.type")
    plain = _number(reader, "embedding_length") // _number(reader, "attention.head_count")
    sizes = {int(_number(reader, key, plain)) for key in ("rope.dimension_count", "attention.key_length")}
    return scaling in ("", "none") and len(sizes) == 1 and all(_rename(t.name) for t in reader.tensors)


def unpermute(weight: Float[np.ndarray, "out in"], num_heads: int) -> Float[np.ndarray, "out in"]:
    """Undo llama.cpp's reordering of the rows of q or k.

    llama.cpp stores the two halves of each head interleaved, (0, h, 1, h+1, ...), for its rotary embedding;
    transformers rotates halves, (0, 1, ..., h, h+1, ...).

    Args:
        weight: [num_heads * head_dim, in], interleaved.
        num_heads: heads of this matrix: query heads for q, key-value heads for k.

    Returns:
        The same rows, half-split.
    """
    out, width = weight.shape
    return weight.reshape(num_heads, out // num_heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def _llama_tensors(reader: GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, Float[np.ndarray, "*shape"]]]:
    from gguf.quants import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        name = _rename(tensor.name)
        assert name is not None
        try:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            raise ModelError(
                "the quantization of a tensor is not supported",
                where=f"{tensor.name} in the GGUF file",
                got=tensor.tensor_type.name,
                do="use a file in Q8_0, Q4_1, Q4_K or F16",
            ) from None
        part = name.split(".")[-2]
        yield name, np.ascontiguousarray(unpermute(weight, heads[part]) if part in heads else weight)


def _llama_config(reader: GGUFReader) -> dict[str, Any]:
    """Build the config.json of a Llama from the file's fields, as transformers reads them."""
    heads = int(_number(reader, "attention.head_count"))
    width = int(_number(reader, "embedding_length"))
    shapes = {t.name: t.shape for t in reader.tensors}
    ids = {
        key: field.contents() if (field := reader.get_field(f"tokenizer.ggml.{name}_token_id")) else None
        for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": int(_number(reader, "feed_forward_length")),
        "num_hidden_layers": int(_number(reader, "block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_number(reader, "attention.head_count_kv", heads)),
        "head_dim": int(
            _number(reader, "attention.key_length", _number(reader, "rope.dimension_count", width // heads))
        ),
        "max_position_embeddings": int(_number(reader, "context_length")),
        "rms_norm_eps": float(_number(reader, "attention.layer_norm_rms_epsilon")),
        "rope_theta": float(_number(reader, "rope.freq_base", 10000.0)),
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "tie_word_embeddings": "output.weight" not in shapes,
        "dtype": "float32",
        **{key: value for key, value in ids.items() if value is not None},
    }


def _write_llama(reader: GGUFReader, folder: Path) -> None:
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    config = _llama_config(reader)
    save_file(dict(_llama_tensors(reader, config)), folder / WEIGHTS, metadata={"format": "pt"})
    LlamaConfig(**config).save_pretrained(folder)


def _write_by_transformers(alone: Path, folder: Path, architecture: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with no_progress_bar():
            model, info = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file="model.gguf",
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )  # pyright: ignore[reportGeneralTypeIssues] - with output_loading_info it returns a pair
    except Exception as error:  # transformers raises many kinds for a file it does not know
        raise ModelError(
            "transformers cannot read this GGUF file",
            where="--navigator",
            got=f"architecture {architecture!r}: {short(error)}",
            do="give the model as a safetensors folder or hub id",
        ) from None
    wrong = sorted(str(key) for group in ("missing_keys", "mismatched_keys") for key in info.get(group) or ())
    if wrong:
        raise ModelError(
            "transformers does not find every weight in this GGUF file; what is missing would be random",
            where="--navigator",
            got=f"architecture {architecture!r}: {len(wrong)} missing, such as {', '.join(wrong[:3])}",
            do="give the model as a safetensors folder or hub id",
        )
    # The weights are ordinary ones now; these leftovers would make saving and every later load believe they are not.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def _special_ids(reader: GGUFReader) -> dict[str, int]:
    """Read which token begins, ends, pads and stands for the unknown; what the file does not name is left out."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    fields = {own: reader.get_field(f"tokenizer.ggml.{name}_token_id") for own, name in names.items()}
    return {own: int(field.contents()) for own, field in fields.items() if field is not None}


def _write_tokenizer(reader: GGUFReader, alone: Path, folder: Path) -> None:
    """Write the tokenizer with the special tokens that the file names.

    Some versions of transformers guess them (5.17 takes SmolLM2's beginning of a turn for its end), and every row that
    is tokenized ends with one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            alone, gguf_file="model.gguf", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as above
        raise ModelError(
            "the tokenizer of this GGUF file cannot be read",
            where="--navigator",
            got=short(error),
            do="give the model as a safetensors folder or hub id",
        ) from None
    wanted = _special_ids(reader)
    for own, token_id in wanted.items():
        # A leftover number would be saved beside the token and win when the folder is loaded.
        tokenizer.init_kwargs.pop(f"{own}_token_id", None)
        if getattr(tokenizer, f"{own}_token_id") != token_id:
            setattr(tokenizer, f"{own}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    got = {own: getattr(again, f"{own}_token_id") for own in wanted}
    if got != wanted:
        raise ModelError(
            "the special tokens of this GGUF file are lost in conversion", where="--navigator", got=str(got), expected=str(wanted),
            do="use another version of transformers, or give the model as a safetensors folder or hub id",
        )  # fmt: skip


def _place(source: Path, target: Path) -> None:
    """Make the file appear at the target, by a link where the system allows one."""
    try:
        target.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, target)
