"""Flat parameter vectors under Adam: a value between epochs, torch tensors within one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.errors import NumericsError
from gradsift.policy.learned import tensor


@dataclass(frozen=True)
class Descent:
    """A parameter vector under Adam (Kingma and Ba 1412.6980).

    Args:
        weights: float32 [P].
        first: float32 [P] first moment.
        second: float32 [P] second moment.
        num_steps: steps taken.
    """

    weights: Float[np.ndarray, " P"]
    first: Float[np.ndarray, " P"]
    second: Float[np.ndarray, " P"]
    num_steps: int = 0


def adam_step(weights: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], num_steps: int, lr: float) -> None:
    """One step downhill, in place (Adam, betas 0.9 and 0.999).

    Args:
        weights: float32 [P].
        gradient: float32 [P].
        moments: first and second, float32 [P].
        num_steps: this step's number, from 1.
        lr: step size.
    """
    first, second = moments
    first.lerp_(gradient, 0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    scale = second.sqrt().div_((1 - 0.999**num_steps) ** 0.5).add_(1e-8)
    weights.addcdiv_(first, scale, value=-lr / (1 - 0.9**num_steps))


class Runner:
    """A parameter vector on its way through several steps.

    Args:
        start: where it stands; not changed.
    """

    def __init__(self, start: Descent) -> None:
        self.weights = tensor(start.weights).requires_grad_()
        self.moments = (tensor(start.first), tensor(start.second))
        self.num_steps = start.num_steps

    def descend(self, loss: Tensor, lr: float, largest: float, where: str) -> None:
        """Take one step down a loss.

        Args:
            loss: scalar function of ``weights``.
            lr: step size.
            largest: norm that the gradient is scaled down to.
            where: whose loss it is, for the error.

        Raises:
            NumericsError: the gradient is not finite.
        """
        (gradient,) = torch.autograd.grad(loss, self.weights)
        norm = float(gradient.norm())
        if not np.isfinite(norm):
            raise NumericsError("the gradient of a network is not finite", where=where, got=norm,
                                do="lower the learning rate")  # fmt: skip
        self.num_steps += 1
        with torch.no_grad():
            gradient = gradient * min(1.0, largest / (norm + 1e-12))
            adam_step(self.weights, gradient, self.moments, self.num_steps, lr)

    def stop(self) -> Descent:
        """Where it stands.

        Returns:
            Copies.
        """
        first, second = self.moments
        return Descent(
            self.weights.detach().numpy().copy(), first.numpy().copy(), second.numpy().copy(), self.num_steps
        )
