"""A model without weights: its configuration's modules on torch's meta device, to learn shapes from (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsift.models.load import not_loaded
from gradsift.models.resolve import Resolved

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def outline_model(resolved: Resolved, dtype: str) -> PreTrainedModel:
    """Build the navigator's modules without reading a weight; takes next to no memory.

    Args:
        resolved: a navigator that was found.
        dtype: float32, bfloat16 or float64.

    Returns:
        The model on the meta device, frozen, with tied tables tied.

    Raises:
        ModelError: transformers does not know the configuration, or needs code of the model; as for loading it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(resolved.folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=getattr(torch, dtype), trust_remote_code=False
            )
    except Exception as error:  # transformers raises many kinds for files it does not know
        raise not_loaded(resolved, error) from None
    model.config.use_cache = False
    return model.eval().requires_grad_(False)
