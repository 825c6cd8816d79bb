"""The navigator with its weights trainable again, at the weights that measured the pool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.models.adapter import attach_lora
from gradsift.models.load import load_navigator
from gradsift.models.parameters import choose_parameters
from gradsift.pipeline.measure import Measurement, measured_rows, with_adapter
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.progress import Clock

if TYPE_CHECKING:
    from torch import nn


def trainable_navigator(
    prepared: Prepared, measured: Measurement, warmed: tuple[Path, Clock] | None = None
) -> nn.Module:
    """Make the model of the pass trainable: what ``navigator.parameters`` names has ``requires_grad``, nothing else.

    An adapter is made anew from its seed: the pass's own model stays as it is.

    Args:
        prepared: the run's inputs.
        measured: the pass over the pool.
        warmed: the run folder and its clock, to start from the warmed adapter where the recipe has one; None for a fresh one.

    Returns:
        The model.
    """
    recipe = prepared.recipe
    model: Any = measured.navigator.model
    if recipe.navigator.parameters == "lora":
        navigator = measured.navigator
        if measured.spec.parameters != "none":  # its model carries the pass's adapter
            navigator = load_navigator(prepared.resolved, dtype=recipe.navigator.dtype, device=recipe.navigator.device)
        if warmed is None:
            model = attach_lora(navigator.model, recipe.navigator.lora, recipe.seed)
        else:
            model, _ = with_adapter(prepared, navigator, measured_rows(prepared), *warmed)
    names = set(choose_parameters(model, recipe.navigator.parameters).names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in names)
    return model
