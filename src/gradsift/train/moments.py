"""Adam's moments by parameter name, as safetensors: what a resumed run and an Adam-form gradient need; no pickle (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.data.cache import published_file
from gradsift.errors import StoreError
from gradsift.models.foreign import short
from gradsift.train.parts import trainable

PARTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Moments:
    """First and second moments of Adam and the number of steps taken.

    Args:
        exp_avg: name -> m, shaped like the parameter.
        exp_avg_sq: name -> v, shaped like the parameter, >= 0.
        step: name -> optimizer steps taken; parameters that never had a gradient are absent from all three.
    """

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: Mapping[str, int]


def read_moments(model: nn.Module, optimizer: Any) -> Moments:
    """Copy the moments out of an optimizer.

    Args:
        model: its trainable parameters name the moments.
        optimizer: torch's Adam or AdamW, or a wrapper with its ``state``.

    Returns:
        Copies on the CPU.
    """
    states = {name: optimizer.state[p] for name, p in trainable(model) if p in optimizer.state}
    return Moments(
        {name: s["exp_avg"].detach().cpu().clone() for name, s in states.items()},
        {name: s["exp_avg_sq"].detach().cpu().clone() for name, s in states.items()},
        {name: int(s["step"]) for name, s in states.items()},
    )


def put_moments(model: nn.Module, optimizer: Any, moments: Moments) -> None:
    """Put moments into a fresh optimizer.

    Args:
        model: its trainable parameters are named by the moments.
        optimizer: torch's Adam or AdamW over these parameters, or a wrapper with its ``state``.
        moments: from :func:`read_moments` or :func:`load_moments`.

    Raises:
        StoreError: a name or shape does not fit the model.
    """
    known = dict(trainable(model))
    for name, average in moments.exp_avg.items():
        if name not in known or known[name].shape != average.shape:
            raise StoreError(
                "the moments do not fit the model", where=name, got=str(tuple(average.shape)),
                expected=str(tuple(known[name].shape)) if name in known else "a trainable parameter of that name",
            )  # fmt: skip
        p = known[name]
        optimizer.state[p] = {
            "step": torch.tensor(float(moments.step[name])),
            "exp_avg": average.to(p.device, copy=True),
            "exp_avg_sq": moments.exp_avg_sq[name].to(p.device, copy=True),
        }


def save_moments(moments: Moments, path: Path) -> None:
    """Publish moments as one safetensors file with keys ``exp_avg/NAME``, ``exp_avg_sq/NAME`` and ``step/NAME``.

    Args:
        moments: of a run.
        path: the file.
    """
    from safetensors.torch import save_file

    tensors = {f"exp_avg/{name}": t.contiguous() for name, t in moments.exp_avg.items()}
    tensors |= {f"exp_avg_sq/{name}": t.contiguous() for name, t in moments.exp_avg_sq.items()}
    tensors |= {f"step/{name}": torch.tensor(n, dtype=torch.int64) for name, n in moments.step.items()}
    with published_file(path) as temporary:
        save_file(tensors, str(temporary))


def load_moments(path: Path) -> Moments:
    """Read what :func:`save_moments` wrote.

    Args:
        path: the file.

    Returns:
        The moments, on the CPU.

    Raises:
        StoreError: the file is missing, damaged or holds something else.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
        split = {
            part: {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(f"{part}/")} for part in PARTS
        }
        if len({frozenset(names) for names in split.values()}) != 1 or sum(map(len, split.values())) != len(tensors):
            raise ValueError("exp_avg, exp_avg_sq and step do not name the same parameters")
        return Moments(split["exp_avg"], split["exp_avg_sq"], {k: int(t) for k, t in split["step"].items()})
    except Exception as error:  # safetensors raises many kinds
        raise StoreError(
            "the moments cannot be read", where=str(path), got=short(error), do="train again with save_moments=true"
        ) from None


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """Give the update direction one Adam step would take with this gradient: Gamma(g), LESS (arXiv 2402.04333) sec. 3.1.

    It equals (theta_before - theta_after) / lr of one real AdamW step without weight decay. eps stands outside the root.

    Args:
        grad: gradient g, any shape.
        exp_avg: m before the step, the same shape.
        exp_avg_sq: v before the step, the same shape.
        step: steps taken before this one, >= 0.
        betas: of Adam.
        eps: of Adam.

    Returns:
        The direction, shaped like the gradient.
    """
    first, second = betas
    m = first * exp_avg + (1 - first) * grad
    v = second * exp_avg_sq + (1 - second) * grad.square()
    return (m / (1 - first ** (step + 1))) / ((v / (1 - second ** (step + 1))).sqrt() + eps)
