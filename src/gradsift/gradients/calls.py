"""Calls of a model whose weights are dealt over several processes: every one of them must call it at the same time (ours).

Whoever deals the weights out says how a call begins; the engine only wraps its calls. A model that is whole is called as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

Around = Callable[[int | None], AbstractContextManager[None]]
_AROUND: WeakKeyDictionary[nn.Module, Around] = WeakKeyDictionary()


def bind(model: nn.Module, around: Around) -> None:
    """Let every call of a model that the engine makes be wrapped.

    Args:
        model: whose weights are dealt out.
        around: number of the decoder layer where the backward ends, or None for a forward alone -> what is entered for the
            forward and the backward of one micro-batch.
    """
    _AROUND[model] = around


def is_bound(model: nn.Module) -> bool:
    """Tell whether other processes have to call a model at the same time.

    Args:
        model: any model.

    Returns:
        True where its weights are dealt out.
    """
    return model in _AROUND


@contextmanager
def calling(model: nn.Module, first: int | None) -> Iterator[None]:
    """Call a model, together with the processes that hold its other weights.

    Args:
        model: any model.
        first: decoder layer where the backward ends; None for a forward alone.

    Yields:
        Nothing.
    """
    around = _AROUND.get(model)
    if around is None:
        yield
        return
    with around(first):
        yield


@contextmanager
def backward_to(layer: nn.Module) -> Iterator[None]:
    """Let the backward end where a decoder layer begins, whatever is measured there, so that it is the same everywhere.

    Args:
        layer: the decoder layer.

    Yields:
        Nothing.
    """

    def begin(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = inputs[0] if inputs else named["hidden_states"]
        if torch.is_grad_enabled() and not states.requires_grad:
            states.requires_grad_(True)

    # First of all pre-hooks: those that gather the layer's weights look at what has a gradient.
    handle = layer.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
