"""Forward signals beside the loss: losses of prompts and of answers alone, and mean hidden states after some layers.

The prompt's loss and the hidden states ride on the forward that measures the loss. The answer alone is another text, so
it takes a forward of its own, over the trained tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gradsift.data.prompts import prompt_mask
from gradsift.errors import ConfigError, ModelError
from gradsift.types import TokenRow


@dataclass(frozen=True)
class Extras:
    """What a pass measures beside the loss.

    Args:
        prompt: mean loss of the prompt tokens.
        alone: loss of the trained tokens with everything else removed.
        layers: whose hidden states are averaged, rising; 0 is what enters the first layer, l what leaves the l-th.
        start_id: token that stands before an answer alone, so that its first token is predicted too.
        parts: numbers that say of a row what each group of layers adds to its dots and its squared norm; 0 for none.
    """

    prompt: bool = False
    alone: bool = False
    layers: tuple[int, ...] = ()
    start_id: int = 0
    parts: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the signals as the store calls them, sorted."""
        flags = (("alone_loss", self.alone), ("prompt_loss", self.prompt))
        return (*(name for name, on in flags[:1] if on), *sorted(hidden_name(n) for n in self.layers),
                *((PARTS,) if self.parts else ()), *(name for name, on in flags[1:] if on))  # fmt: skip


PARTS = "layer_parts"
NO_EXTRAS = Extras()


def hidden_name(layer: int) -> str:
    """Name the signal of one layer's hidden states.

    Args:
        layer: 0 or above.

    Returns:
        ``hidden_3`` and the like.
    """
    return f"hidden_{layer}"


def start_token(model: nn.Module, pad_id: int) -> int:
    """Choose the token that stands before an answer alone: the model's begin token, else its end token, else padding.

    Args:
        model: a causal language model.
        pad_id: padding token.

    Returns:
        A token id.
    """
    config: Any = model.config
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    return pad_id


def stack_masks(rows: Sequence[TokenRow], width: int) -> Bool[Tensor, "B T"]:
    """Pad the prompt masks of a micro-batch on the right.

    Args:
        rows: B token rows.
        width: T, at least the longest row.

    Returns:
        bool [B, T].
    """
    out = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        out[b, : row.num_tokens] = torch.from_numpy(prompt_mask(row))
    return out


def alone_row(row: TokenRow, start_id: int) -> TokenRow:
    """Remove everything that carries no loss.

    Args:
        row: a usable token row.
        start_id: token that stands before what is left.

    Returns:
        A row whose trained tokens are those of ``row``; ``row`` itself where there is nothing to remove.
    """
    if row.num_tokens - row.num_trained <= 1:
        return row
    left = row.input_ids[1:][row.trained[1:]]
    ids = np.concatenate([np.array([start_id], dtype=np.int32), left])
    trained = np.arange(len(ids)) > 0
    return replace(row, input_ids=ids, trained=trained, num_untruncated=len(ids), template=None)


class Taps:
    """Averages hidden states of the batches that run while it is entered.

    Args:
        model: a causal language model.
        layers: numbers of layers.
        lengths: real tokens of every row of the batch.
        dtype: arithmetic of the mean.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], lengths: Sequence[int], dtype: torch.dtype) -> None:
        self.values: dict[int, Float[Tensor, "B d"]] = {}
        self._model, self._layers, self._lengths, self._dtype = model, tuple(layers), tuple(lengths), dtype
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        if not self._layers:
            return self
        stack = find_layers(self._model)
        refuse_layers(self._layers, len(stack))
        for number in self._layers:
            if number == 0:
                handle = stack[0].register_forward_pre_hook(self._entering, with_kwargs=True)
            else:
                handle = stack[number - 1].register_forward_hook(self._leaving(number))
            self._handles.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _entering(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._keep(0, inputs[0] if inputs else named["hidden_states"])

    def _leaving(self, number: int) -> Any:
        return lambda _module, _inputs, output: self._keep(number, output[0] if isinstance(output, tuple) else output)

    def _keep(self, number: int, states: Float[Tensor, "B T d"]) -> None:
        self.values[number] = mean_states(states.detach().to(self._dtype), self._lengths).cpu()


def mean_states(states: Float[Tensor, "B T d"], lengths: Sequence[int]) -> Float[Tensor, "B d"]:
    """Average the states of a row's real tokens.

    Args:
        states: [B, T, d] of a right-padded batch.
        lengths: B numbers of real tokens, each in [1, T].

    Returns:
        [B, d] in the dtype of ``states``; padding has no part in it, whatever it holds.
    """
    count = torch.tensor(list(lengths), device=states.device)[:, None]
    real = torch.arange(states.shape[1], device=states.device)[None] < count
    # Masked and not only weighted by 0: a padding state that is not finite would poison the row.
    weight = real.to(states.dtype) / count.to(states.dtype)
    return torch.bmm(weight[:, None, :], states.masked_fill(~real[:, :, None], 0))[:, 0]


def find_layers(model: nn.Module) -> nn.ModuleList:
    """Find the stack of layers of a causal language model.

    Args:
        model: a model of the transformers library, with or without an adapter.

    Returns:
        Its list of layers, in order.

    Raises:
        ModelError: no list has as many modules as the configuration says layers.
    """
    config: Any = model.config
    wanted = config.get_text_config().num_hidden_layers
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted}
    if not found:
        raise ModelError(
            "the model's layers cannot be found, so their hidden states cannot be read",
            got=type(model).__name__,
            expected=f"a list of {wanted} modules",
            do="choose another --navigator",
        )
    return found[min(found, key=lambda name: (name.count("."), name))]  # the outermost: lists within layers are deeper


def refuse_layers(layers: Sequence[int], num_layers: int) -> None:
    """Refuse a layer beyond the model.

    Args:
        layers: numbers asked for.
        num_layers: layers of the model.

    Raises:
        ConfigError: one of them is not there.
    """
    beyond = [n for n in layers if not 0 <= n <= num_layers]
    if beyond:
        raise ConfigError(
            "the model has no such layer",
            where="the method's layer",
            got=str(beyond[0]),
            expected=f"0 to {num_layers}",
            do="choose another layer with --set, or another --navigator",
        )


def hidden_size(model: nn.Module) -> int:
    """Read the width of a model's hidden states.

    Args:
        model: a model of the transformers library.

    Returns:
        d.
    """
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def empty_extras(extras: Extras, model: nn.Module, num_rows: int) -> dict[str, np.ndarray]:
    """Signals of rows that could not be measured.

    Args:
        extras: what is measured.
        model: gives the width of hidden states.
        num_rows: n.

    Returns:
        Name -> NaN of the signal's shape.
    """
    widths = {PARTS: (extras.parts,)}
    return {
        name: np.full(
            (num_rows, *((hidden_size(model),) if name.startswith("hidden") else widths.get(name, ()))), np.nan
        )
        for name in extras.names
    }
