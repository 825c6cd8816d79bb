"""The navigator's LoRA adapter, its first bits decided by names and a seed.

Arithmetic: adapter weights have the model's dtype, except that under bfloat16 they are float32, as peft and the
trainers on top of it keep them. The draws are rounded to float32 once, so float32 and float64 models start equal.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.data.cache import disk_errors, published_folder
from gradsift.errors import ConfigError, ModelError
from gradsift.models.foreign import short
from gradsift.recipe import LoraConfig
from gradsift.seeds import stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"


def attach_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """Put a fresh adapter on a model; the model is changed in place and its own weights stay frozen.

    A is uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5), peft's own choice), drawn from a stream named after the
    layer; B is zero, so the adapted model computes what the model did. torch's global generator is not touched.

    Args:
        model: the navigator's model.
        lora: rank, alpha and target modules.
        seed: the run's seed.

    Returns:
        The model with its adapter; only the adapter requires gradients.

    Raises:
        ConfigError: a target module is not in the model, or is none that gets matrices A and B; some names are listed.
    """
    import torch
    from peft import get_peft_model

    names = _linear_names(model)

    try:
        # Building the layers draws from torch's global generator; what it drew is replaced below.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", category=FutureWarning)  # of peft towards transformers
            adapted = get_peft_model(model, _peft_config(model, lora))
    except (ValueError, re.error) as error:
        got = f"{lora.target_modules}: {' '.join(str(error).split())[:160]}"
        raise _wrong_targets("the adapter cannot be attached", got, names) from None
    _check_targets(adapted, lora, names)
    with torch.no_grad():
        for name, parameter in adapter_parameters(adapted):
            if ".lora_B." in name:
                parameter.zero_()
                continue
            bound = 1 / math.sqrt(parameter[0].numel())
            generator = stream(seed, f"adapter/{_layer(name)}").numpy()
            draws = generator.uniform(-bound, bound, size=tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(draws).float())
    adapted.eval()
    return adapted  # pyright: ignore[reportReturnType]


def _linear_names(model: torch.nn.Module) -> list[str]:
    """Last parts of the names of layers that can be adapted."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})


def _check_targets(adapted: PeftModel, lora: LoraConfig, names: Sequence[str]) -> None:
    """Every name that is listed adapts a layer, and every adapted layer has the matrices that are seeded and measured."""
    layers = {
        name.removeprefix("base_model.model."): module for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }  # fmt: skip
    listed = () if isinstance(lora.target_modules, str) else lora.target_modules
    unmet = [one for one in listed if not any(name == one or name.endswith(f".{one}") for name in layers)]
    if unmet:
        raise _wrong_targets("a target module of the adapter is not in the model", ", ".join(unmet), names)
    without = [name for name, module in layers.items() if not (module.lora_A and module.lora_B)]
    if without:
        what = "an adapter of a table has no matrices A and B that are measured"
        raise _wrong_targets(what, ", ".join(without[:5]), names)


def _wrong_targets(what: str, got: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        what,
        where="navigator.lora.target_modules",
        got=got,
        expected=f"all-linear, or names or a regular expression of linear layers such as {', '.join(names[:12])}",
        do="correct the names",
    )


def _peft_config(model: PreTrainedModel, lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftConfig
    from peft import TaskType
    from transformers.pytorch_utils import Conv1D

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - a float serves: it is divided by r
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def adapter_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Walk over the A and B matrices in model order.

    Args:
        model: a model with an adapter.

    Yields:
        tuple[str, torch.nn.Parameter]: name and parameter.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            yield name, parameter


def _layer(name: str) -> str:
    """Name the adapted layer as in the bare model: wrappers' prefixes may change, the draws must not."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def adapter_sha256(model: torch.nn.Module) -> str:
    """Hash the adapter: names, shapes, dtypes and bits of its matrices, and the scale (alpha / rank) of its layers.

    Args:
        model: a model with an adapter.

    Returns:
        64 hexadecimal digits.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(adapter_parameters(model), key=lambda pair: pair[0]):
        digest.update(f"{name}\x1f{tuple(parameter.shape)}\x1f{parameter.dtype}\x1f".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in sorted(model.named_modules()):
        scales = getattr(module, "scaling", None)  # attention has one too, and it is a number there
        for adapter, scale in sorted(scales.items()) if isinstance(scales, dict) else ():
            digest.update(f"{name}\x1f{adapter}\x1f{scale!r}\x1f".encode())
    return digest.hexdigest()


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in peft's own layout (safetensors), published whole.

    Args:
        model: a model with an adapter.
        folder: where it is to stand; must not exist.
    """
    with disk_errors(folder), published_folder(folder) as temporary:
        # With "auto" peft would ask the hub whether the vocabulary grew.
        model.save_pretrained(str(temporary), safe_serialization=True, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on a model; the model is changed in place.

    Args:
        model: the model it was made for.
        folder: a folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        The model with its adapter; only the adapter requires gradients.

    Raises:
        ModelError: the folder is no safetensors adapter, or it does not fit the model.
    """
    import torch
    from peft import PeftModel
    from safetensors import safe_open

    missing = [name for name in ("adapter_config.json", WEIGHTS) if not (folder / name).is_file()]
    if missing:  # peft would go on to a pickle, or to the hub
        raise ModelError(
            "the folder is not a safetensors adapter", where=str(folder), got=f"no {' and no '.join(missing)}"
        )
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft only warns of missing keys; they are compared below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", category=FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # peft and safetensors raise many kinds
        raise ModelError(
            "the adapter does not fit the model",
            where=str(folder),
            got=short(error),
            do="use the model that it was made for",
        ) from None
    expected = {name.replace(".default.", "."): tuple(p.shape) for name, p in adapter_parameters(adapted)}
    if saved != expected:
        odd = sorted(set(saved.items()) ^ set(expected.items()))
        raise ModelError(
            "the adapter does not fit the model",
            where=str(folder),
            got=f"{len(odd)} matrices differ, the first is {odd[0][0]}",
            do="use the model that it was made for",
        )
    adapted.eval()
    return adapted
