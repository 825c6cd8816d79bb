"""The navigator loaded: frozen, and identified by the hashes of its weights and tokenizer.

Weights are read from safetensors alone and no code of a model is run. A weight that the file lacks would be random, so
that is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.data.cache import sha256_file
from gradsift.errors import ModelError
from gradsift.manifest import hash_parts
from gradsift.models.foreign import no_progress_bar, short
from gradsift.models.gguf import RECORD, read_conversion
from gradsift.models.resolve import Resolved, resolve_navigator
from gradsift.types import Note

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Navigator",
    "Resolved",
    "load_navigator",
    "load_tokenizer",
    "resolve_device",
    "resolve_navigator",
    "tokenizer_sha256",
]


@dataclass(frozen=True)
class Navigator:
    """The small model that measures: frozen, in eval mode, without key-value cache.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        resolved: where it came from.
        model_sha256: hash over names and bytes of the weights files.
        tokenizer_sha256: hash over vocabulary, special tokens and chat template.
        dtype: float32, bfloat16 or float64.
        device: cpu or cuda:N.
        architecture: class of the model.
        notes: remarks of loading, such as weights of the file the model does not use.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    resolved: Resolved
    model_sha256: str
    tokenizer_sha256: str
    dtype: str
    device: str
    architecture: str
    notes: tuple[Note, ...] = ()


def load_tokenizer(resolved: Resolved) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone.

    Args:
        resolved: a navigator that was found.

    Returns:
        The tokenizer.

    Raises:
        ModelError: the folder has none, or it needs code of its own.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolved.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for files it does not know
        raise ModelError(
            "the tokenizer cannot be loaded",
            where=f"--navigator {resolved.name}",
            got=short(error),
            expected="tokenizer files that transformers reads without running code of the model",
            do="add tokenizer.json and tokenizer_config.json to the folder, or give another --navigator",
        ) from None


def load_navigator(resolved: Resolved, *, dtype: str = "float32", device: str = "auto") -> Navigator:
    """Load the model frozen for measuring.

    Args:
        resolved: a navigator that was found.
        dtype: float32, bfloat16 or float64.
        device: auto (cuda if there is one, else cpu), cpu, cuda or cuda:N.

    Returns:
        The navigator; every parameter has requires_grad False.

    Raises:
        ModelError: the weights do not fit the configuration, are damaged, or need code of their own.
    """
    import torch

    place = resolve_device(device)
    digest = _weights_sha256(resolved.folder)
    tokenizer = load_tokenizer(resolved)
    model, unused = _load_model(resolved, getattr(torch, dtype))
    try:
        model.to(place)  # pyright: ignore[reportArgumentType]
    except torch.OutOfMemoryError:
        raise ModelError(
            "the navigator does not fit the device",
            where="navigator.device",
            got=place,
            do="use a smaller --navigator, --set navigator.dtype=bfloat16 or --set navigator.device=cpu",
        ) from None
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    notes = ()
    if unused:
        text = f"the model does not use {len(unused)} tensors of its weights file: {', '.join(unused[:5])}"
        notes = (Note("unused_weights", text, len(unused), tuple(unused[:5])),)
    return Navigator(
        model=model,
        tokenizer=tokenizer,
        resolved=resolved,
        model_sha256=digest,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        dtype=dtype,
        device=place,
        architecture=type(model).__name__,
        notes=notes,
    )


def resolve_device(device: str, where: str = "navigator.device") -> str:
    """Turn ``auto`` into a device, and refuse one that is not there.

    Args:
        device: auto, cpu, cuda or cuda:N.
        where: the setting or option that asked for it, named when it is refused.

    Returns:
        cpu or cuda:N.

    Raises:
        ModelError: there is no such CUDA device.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device == "cpu":
        return device
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise ModelError(
            "there is no such CUDA device",
            where=where,
            got=device,
            expected=f"one of {count} devices" if count else "cpu: torch sees no CUDA device",
            do=f"use {where} cpu" if where.startswith("--") else f"use --set {where}=cpu",
        )
    return f"cuda:{index}"


def _load_model(resolved: Resolved, dtype: Any) -> tuple[PreTrainedModel, Sequence[str]]:
    """Load the weights; a parameter that the file lacks would be random, so that is refused."""
    from transformers import AutoModelForCausalLM

    try:
        with no_progress_bar():
            model, info = AutoModelForCausalLM.from_pretrained(
                resolved.folder,
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )  # pyright: ignore[reportGeneralTypeIssues] - with output_loading_info it returns a pair
    except Exception as error:  # transformers raises many kinds for files it does not know
        raise not_loaded(resolved, error) from None
    wrong = sorted(str(key) for group in ("missing_keys", "mismatched_keys") for key in info.get(group) or ())
    if wrong:
        raise ModelError(
            "the weights do not fit the configuration; what is missing would be random",
            where=f"--navigator {resolved.name}",
            got=f"{len(wrong)} missing or misshapen: {', '.join(wrong[:5])}",
            do="download the model again, or give the whole causal language model",
        )
    return model, sorted(str(key) for key in info.get("unexpected_keys") or ())


def not_loaded(resolved: Resolved, error: Exception) -> ModelError:
    """Say that transformers cannot make a model of a folder.

    Args:
        resolved: a navigator that was found.
        error: what transformers raised.

    Returns:
        The refusal.
    """
    return ModelError(
        "the model cannot be loaded",
        where=f"--navigator {resolved.name}",
        got=short(error),
        expected="a causal language model that transformers knows without running code of the model",
        do="give another --navigator",
    )


def weights_key(folder: Path) -> str:
    """Hash a base model's weights as the manifest of fine-tuning names them.

    Args:
        folder: a model folder.

    Returns:
        32 hexadecimal digits.
    """
    return hash_parts(f"{path.name}\x1f{sha256_file(path)}".encode() for path in sorted(folder.glob("*.safetensors")))


def _weights_sha256(folder: Path) -> str:
    """Hash names and bytes of the weights files; a converted folder must still be what was converted."""
    record = read_conversion(folder)
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest = sha256_file(path)
        if record is not None and record.weights_sha256.get(path.name) != digest:
            raise ModelError(
                "the converted weights are not what was converted",
                where=str(path),
                got=f"sha256 {digest}",
                expected=f"sha256 {record.weights_sha256.get(path.name)} ({RECORD})",
                do=f"delete {folder} and run the command again",
            )
        whole.update(f"{path.name}\x1f{digest}\n".encode())
    return whole.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides a tokenizer's output: vocabulary, rules, special tokens and chat template.

    Truncation and padding are left out: they are state of the last call.

    Args:
        tokenizer: any tokenizer.

    Returns:
        64 hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocab": sorted(tokenizer.get_vocab().items())}
    rules.pop("truncation", None)
    rules.pop("padding", None)
    whole = {
        "class": type(tokenizer).__name__,
        "rules": rules,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "bos": [getattr(tokenizer, "add_bos_token", None), getattr(tokenizer, "add_eos_token", None)],
        "template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
