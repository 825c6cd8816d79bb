"""A model's weights dealt over the processes of a run with torch's ``fully_shard``, layer by layer (ours).

Every process holds one slice of each weight. A decoder layer's weights are whole while the layer runs, forward and
backward, and those around the layers (embedding, last norm, LM head) while the model does. Weights are frozen, so nothing
but weights travels. An adapter is small and stays whole in every process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Sharded:
    """What this process holds of a model.

    Args:
        model: the model, its weights dealt out.
        layers: its decoder layers.
        local_bytes: weights that this process holds at any time.
        whole_bytes: all weights, each once.
        largest_bytes: weights that are whole at most beside them: those around the layers, and two layers, since the next
            one is fetched while one runs.
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    local_bytes: int
    whole_bytes: int
    largest_bytes: int


def refuse_quantized(folder: Path) -> None:
    """Refuse weights that are kept in a packed form, which cannot be cut into slices; before they are loaded.

    Args:
        folder: a model folder with ``config.json``.

    Raises:
        ConfigError: the configuration names a quantization.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    found = next((part["quantization_config"] for part in nested if part.get("quantization_config")), None)
    if found is not None:
        kind = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise ConfigError(
            "a quantized navigator cannot be dealt over several processes",
            where="--fsdp",
            got=f"quantization_config: {kind}",
            expected="weights in float32 or bfloat16",
            do="give the model that was quantized, or leave --fsdp out",
        )


def shard_model(model: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> Sharded:
    """Freeze a model and deal its weights out; every process of the mesh does the same.

    No process waits for another here. Where the mesh is of GPUs, a model in main memory goes to the GPU layer by layer.

    Args:
        model: a causal language model, with its adapter where it has one; changed in place.
        layers: its decoder layers.
        mesh: the processes, in one dimension.

    Returns:
        The model and what this process holds.

    Raises:
        ModelError: layers share weights, or a layer has a weight that cannot be cut.
    """
    from torch.distributed.fsdp import fully_shard

    layers = tuple(layers)
    _refuse_shared(model, layers)
    model.requires_grad_(False)  # before the first call, which fixes what gets a gradient
    adapter = {p for name, p in model.named_parameters() if ".lora_" in name}
    whole = _num_bytes(model.parameters())
    sizes = sorted(_num_bytes(p for p in layer.parameters() if p not in adapter) for layer in layers)
    around = whole - sum(sizes) - _num_bytes(adapter)
    device = _device(mesh)
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    try:
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=adapter)
        fully_shard(model, mesh=mesh, ignored_params=adapter)
    except (NotImplementedError, AssertionError, ValueError) as error:
        raise ModelError(
            "the model's weights cannot be dealt over several processes", where="--fsdp",
            got=str(error).splitlines()[0][:200], do="choose another --navigator, or leave --fsdp out",
        ) from error  # fmt: skip
    return Sharded(model, layers, local_bytes(model), whole, around + sum(sizes[-2:]))


def local_bytes(model: nn.Module) -> int:
    """Count the bytes of weights that this process holds now.

    Args:
        model: any model.

    Returns:
        Bytes; of a weight that is dealt out, those of this process's slice.
    """
    return _num_bytes(_local(p) for p in model.parameters())


def give_back(model: nn.Module) -> None:
    """Give back whatever is whole after a forward without a backward; no process waits for another.

    Args:
        model: from :func:`shard_model`.
    """
    some: Any = model
    some.reshard()


def _local(parameter: nn.Parameter) -> torch.Tensor:
    part: Any = parameter
    return part.to_local() if hasattr(part, "to_local") else part


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _device(mesh: DeviceMesh) -> torch.device:
    import torch

    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.cuda.current_device())


def _refuse_shared(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """A weight that two layers use, or a layer and what is around it, would be gathered and freed under each other."""
    names = {id(p): name for name, p in model.named_parameters()}
    owner: dict[int, int] = {}
    inside = {module for layer in layers for module in layer.modules()}
    groups = [*(list(layer.modules()) for layer in layers), [m for m in model.modules() if m not in inside]]
    for number, modules in enumerate(groups):
        for parameter in {p for module in modules for p in module.parameters(recurse=False)}:
            if owner.setdefault(id(parameter), number) != number:
                raise ModelError(
                    "layers share a weight, so the model cannot be dealt over several processes", where="--fsdp",
                    got=names[id(parameter)], expected="layers with weights of their own",
                    do="choose another --navigator, or leave --fsdp out",
                )  # fmt: skip
