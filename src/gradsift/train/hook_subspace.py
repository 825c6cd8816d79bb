"""Step hooks that keep whole subspaces free: OGD (directions of parameters) and GPM (directions of layer inputs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from gradsift.errors import ConfigError
from gradsift.train.hook_base import HookSettings, Moment, Outcome, SurgeryHook
from gradsift.train.hook_reference import Sources, agree, mean_gradient, quiet
from gradsift.train.parts import make_batch, trainable
from gradsift.train.surgery import dot
from gradsift.train.surgery_subspace import Basis, Compress, compress, empty_basis, extend, gpm, input_subspace, ogd


@dataclass(frozen=True)
class OgdSettings(HookSettings):
    """Settings of ``ogd``; by default the directions are taken once, at the weights before training.

    Args:
        refresh: steps after which more directions are taken in; 0 for never.
        directions: ``row`` keeps the gradient of every reference row, ``source`` one mean per source.
        r_max: most directions kept; memory is r_max times the trained parameters.
        compress: how a full basis is shrunk.
    """

    refresh: Annotated[int, Field(ge=0)] = 0
    directions: Literal["row", "source"] = "row"
    r_max: Annotated[int, Field(ge=1)] = 200
    compress: Compress = "svd"


@dataclass(frozen=True)
class GpmSettings(HookSettings):
    """Settings of ``gpm``; the subspaces are measured once, before the first step.

    Args:
        refresh: 0, the subspaces are static.
        energy: share of the energy of a layer's inputs that is kept.
    """

    refresh: Annotated[int, Field(ge=0, le=0)] = 0
    energy: Annotated[float, Field(gt=0, le=1)] = 0.97


class OgdHook(SurgeryHook):
    """OGD with gradients of the loss; the paper's are of the true-class logit (arXiv 1910.07104)."""

    basis: Basis | None = None

    def measure(self, model: nn.Module, step: int) -> Float[Tensor, "M P"]:
        """Take directions into the basis, and return the sources' mean gradients."""
        found = []
        for name in self.sources.names:
            rows = self.sources.draw(name, step)
            groups = [(row,) for row in rows] if self.settings.directions == "row" else [rows]
            total = torch.zeros(())
            for group in groups:
                gradient = mean_gradient(model, group, self.sources)
                total = gradient + total.to(gradient)
                self._keep(gradient)
            found.append(total / len(groups))
            self.spend(model, rows)
        return torch.stack(found)

    def _keep(self, gradient: Tensor) -> None:
        basis = empty_basis(gradient.numel(), gradient) if self.basis is None else self.basis
        self.basis = basis
        length = dot(gradient, gradient)
        if not (np.isfinite(length) and length > 0):
            self.tally.count("num_bad_directions")
            return
        wider = extend(basis, gradient)
        self.tally.count("num_dependent_directions", int(wider.size == basis.size))
        self.tally.count("num_compressions", int(wider.size > self.settings.r_max))
        self.basis = compress(wider, self.settings.r_max, self.settings.compress)

    def rule(self, moment: Moment) -> Outcome:
        """Remove the kept directions, always."""
        assert self.basis is not None
        z = ogd(moment.g, self.basis)
        return Outcome(z, z is not moment.g)

    def summary(self) -> Mapping[str, float]:
        """Return the figures of every hook and what is known of the basis."""
        names = ("num_bad_directions", "num_dependent_directions", "num_compressions")
        extra = {name: float(self.tally.counts.get(name, 0)) for name in names}
        return {**super().summary(), **extra, "num_kept_directions": float(self.basis.size if self.basis else 0)}

    def state(self) -> dict[str, Any]:
        """Return the state of every hook and the basis."""
        basis = self.basis
        kept = None if basis is None else {"vectors": basis.vectors.clone(), "coordinates": basis.coordinates.tolist()}
        return {**super().state(), "basis": kept}

    def restore(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Go back to a state."""
        super().restore(state, device)
        kept = state["basis"]
        if kept is not None:
            vectors = kept["vectors"].clone().to(device)
            kept = Basis(vectors, np.array(kept["coordinates"], dtype=np.float64).reshape(-1, len(vectors)))
        self.basis = kept


class GpmHook(SurgeryHook):
    """GPM: no gradient along the inputs that the sources send into a layer (arXiv 2103.09762).

    With LoRA only A is projected: B does not read the base layer's input. Biases, norms and embeddings have no input
    subspace and pass as they are; a head tied to the embedding is projected with it.
    """

    def __init__(self, name: str, settings: GpmSettings, sources: Sources) -> None:
        super().__init__(name, settings, sources)
        self.subspaces: dict[str, Tensor] = {}
        self.transposed: set[str] = set()
        self.protected_share = float("nan")

    def measure(self, model: nn.Module, step: int) -> Float[Tensor, "M P"]:
        """Measure the subspaces; no gradient is needed, so there are no references."""
        layers = input_layers(model)
        if not layers:
            raise ConfigError(
                "gpm finds no trained linear layer",
                where="step hook gpm",
                got="no trainable weight that multiplies a layer's input",
                do="train linear layers, or use another hook",
            )
        rows = [row for name in self.sources.names for row in self.sources.draw(name, step)]
        for name, moment in input_moments(model, layers, rows, self.sources.pad_id).items():
            self.subspaces[name] = input_subspace(agree(moment), self.settings.energy)
        self.transposed = {name for name, layer in layers.items() if not isinstance(layer, nn.Linear)}
        self.spend(model, rows, backwards=0)
        sizes = {name: p.numel() for name, p in trainable(model)}
        self.protected_share = sum(sizes[name] for name in layers) / sum(sizes.values())
        first = next(p for _, p in trainable(model))
        return torch.zeros((0, sum(sizes.values())), device=first.device)

    def rule(self, moment: Moment) -> Outcome:
        """Project every layer that has a subspace."""
        pieces, changed = [], False
        for name, span, shape in zip(moment.names, moment.spans, moment.shapes, strict=True):
            piece, subspace = moment.g[span], self.subspaces.get(name)
            if subspace is not None and subspace.shape[1]:
                matrix = piece.view(shape)
                new = gpm(matrix.T, subspace).T if name in self.transposed else gpm(matrix, subspace)
                piece, changed = new.reshape(-1), True
            pieces.append(piece)
        return Outcome(torch.cat(pieces), True) if changed else Outcome(moment.g, False)

    def summary(self) -> Mapping[str, float]:
        """Return the figures of every hook, the share of parameters projected and of input directions kept free."""
        kept = [u.shape[1] / u.shape[0] for u in self.subspaces.values()]
        return {
            **super().summary(),
            "protected_share": self.protected_share,
            "kept_direction_share": float(np.mean(kept)) if kept else float("nan"),
        }

    def state(self) -> dict[str, Any]:
        """Return the state of every hook and the subspaces."""
        subspaces = {name: u.clone() for name, u in self.subspaces.items()}
        extra = {"transposed": sorted(self.transposed), "protected_share": self.protected_share}
        return {**super().state(), "subspaces": subspaces, **extra}

    def restore(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Go back to a state."""
        super().restore(state, device)
        self.subspaces = {name: u.clone().to(device) for name, u in state["subspaces"].items()}
        self.transposed, self.protected_share = set(state["transposed"]), state["protected_share"]


def input_layers(model: nn.Module) -> dict[str, nn.Module]:
    """List the linear layers whose trained weight multiplies the layer's input; with LoRA these are the A matrices.

    Args:
        model: the model in training.

    Returns:
        Layers by the name of their weight; ``nn.Linear`` and the transposed ``Conv1D`` of GPT-2.
    """
    from transformers.pytorch_utils import Conv1D

    names = {id(p): name for name, p in trainable(model)}
    return {
        names[id(module.weight)]: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in names and ".lora_B." not in f"{path}."
    }


def input_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], rows: Any, pad_id: int
) -> dict[str, Float[Tensor, "d d"]]:
    """Sum x x' over every position of every row, for each layer's input x.

    Args:
        model: the model.
        layers: from :func:`input_layers`.
        rows: reference rows; each goes alone, so no padding is seen whatever shape a layer's input has.
        pad_id: padding token.

    Returns:
        float64 [d_in, d_in] by layer name; zeros for a layer that was never called.
    """
    device = next(model.parameters()).device
    moments: dict[str, Tensor] = {}
    handles = []
    for name, layer in layers.items():
        width = layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0]  # pyright: ignore
        moments[name] = torch.zeros((int(width), int(width)), dtype=torch.float64, device=device)  # pyright: ignore

        def add(_: nn.Module, args: tuple[Any, ...], moment: Tensor = moments[name]) -> None:
            x = args[0].detach().reshape(-1, moment.shape[0]).double()
            moment += x.T @ x

        handles.append(layer.register_forward_pre_hook(add))
    try:
        with quiet(model), torch.no_grad():
            for row in rows:
                batch = make_batch([row], pad_id, device)
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return moments
