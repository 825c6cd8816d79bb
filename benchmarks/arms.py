"""What is timed: plain PyTorch, gradsift, and the interface that rivals fill in."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from worlds import NUM_DIRECTIONS, Batch, backward, body_weights, freeze, random_directions, row_losses, share

from gradsift.gradients import products
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector

SKETCH = 4093


class NotRunError(Exception):
    """An arm that cannot run here, with the reason to print."""


@dataclass
class Arm:
    """One line of the table. Making it is set-up and untimed; its hooks stay registered on its own copy of the modules.

    Args:
        key: short name, used by the thresholds.
        label: what the table calls it.
        returns: what one pass returns for each example.
        against: key of the arm whose seconds divide this one's.
        cosines: exact cosines [B, M] of the last batch, for arms that have them.
        head: whether the gradient of the head's weight is part of the work.
    """

    key: str
    label: str
    returns: str
    against: str = "plain"
    cosines: Tensor | None = field(default=None, repr=False)
    head: bool = field(default=False, repr=False)

    def before(self) -> None:
        """Do untimed clean-up before each batch."""

    def step(self, batch: Batch) -> None:
        """Do the timed work of one batch."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back hooks and memory."""


class Plain(Arm):
    """Ordinary training's forward and backward: the gradient of the batch, every weight."""

    def __init__(self, model: nn.Module, key: str = "plain", label: str = "", *, head: bool = True) -> None:
        super().__init__(key, label or "plain forward+backward", "batch gradient", head=head)
        self.model = share(model)

    def before(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self, batch: Batch) -> None:
        backward(self.model, batch, head_gradient=self.head)


class PlainProducts(Plain):
    """The same step, every product of a linear layer by oneDNN: what plain would take with gradsift's products."""

    def step(self, batch: Batch) -> None:
        with TrainedProducts():
            super().step(batch)


class _Trained(torch.autograd.Function):
    """A linear layer by oneDNN whose weight and bias may be trained."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        g = grads[0].reshape(-1, weight.shape[0])
        down = products.linear(grads[0], weight.t()) if ctx.needs_input_grad[0] else None
        whole = None
        if ctx.needs_input_grad[1]:
            flat = x.reshape(-1, x.shape[-1])  # the smaller factor is the one that is laid out anew
            small = g.shape[1] < flat.shape[1]
            whole = products.linear(g.t(), flat.t()) if small else products.linear(flat.t(), g.t()).t()
        return down, whole, g.sum(0) if ctx.needs_input_grad[2] else None


class TrainedProducts(TorchFunctionMode):
    """Products of linear layers that are trained, by oneDNN."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and not kwargs:
            return _Trained.apply(*args, *[None] * (3 - len(args)))
        if func is torch.addmm and not kwargs:
            return _Trained.apply(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


class ForwardOnly(Arm):
    """Losses only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("forward", "forward only", "loss")
        self.model = share(model)

    @torch.no_grad()
    def step(self, batch: Batch) -> None:
        row_losses(self.model, batch.input_ids, batch.labels)


class Floor(Arm):
    """Forward and input gradients: what every collector must pay before it measures anything."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("floor", "floor: forward + input gradients", "nothing")
        self.model = share(model)
        freeze(self.model)

    def step(self, batch: Batch) -> None:
        backward(self.model, batch)


class Less(Arm):
    """LESS's collection loop without its projection: one backward an example, gradients flattened into one vector."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("less", "LESS: batch-1 loop, flatten", "full gradient", head=True)
        self.model = share(model)

    def step(self, batch: Batch) -> None:
        for b, n in enumerate(batch.lengths.tolist()):
            row_losses(self.model, batch.input_ids[b : b + 1, :n], batch.labels[b : b + 1, :n]).sum().backward()
            torch.cat([p.grad.view(-1) for p in self.model.parameters() if p.grad is not None])
            self.model.zero_grad()


class Gradsift(Arm):
    """gradsift's engine: one pass, whatever is asked for."""

    def __init__(
        self, model: nn.Module, key: str, label: str, returns: str, names: list[str], *, dots: bool, norms: bool = True
    ) -> None:
        super().__init__(key, label, returns)
        self.engine = GradientEngine(model, names, projector=Projector(0, SKETCH), norms=norms, edges=False)
        if self.engine.uncovered:
            raise AssertionError(f"gradsift does not cover {self.engine.uncovered}")
        if dots:
            drawn = random_directions((n, b.rows, b.cols) for n, b in self.engine.blocks.items())
            self.engine.num_directions = NUM_DIRECTIONS
            for name, block in self.engine.blocks.items():
                block.directions = self.engine.flatten(name, drawn[name])
        self.engine.__enter__()

    def step(self, batch: Batch) -> None:
        got = self.engine.measure(batch.input_ids, batch.labels, batch.lengths)
        self.cosines = got.dots / got.square.sqrt()[:, None]

    def close(self) -> None:
        self.engine.__exit__()


class PlainLora(Arm):
    """Ordinary training of a LoRA adapter: forward and backward, gradients of the adapter's weights."""

    def __init__(self, model: nn.Module, *, fast: bool = False) -> None:
        key, label = ("lora-plain-products", ", by oneDNN") if fast else ("lora-plain", "")
        super().__init__(key, f"LoRA r=16: plain forward+backward{label}", "batch gradient", "lora-plain")
        self.model, self.fast = share(model), fast
        self.adapted = adapt(self.model)

    def before(self) -> None:
        self.adapted.zero_grad(set_to_none=True)

    def step(self, batch: Batch) -> None:
        with TrainedProducts() if self.fast else nullcontext():
            backward(self.model, batch)


def adapt(model: nn.Module) -> nn.Module:
    """Put a LoRA adapter of rank 16 on every linear layer of the body; its B is not zero."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft corrects fan_in_fan_out for GPT-2 by itself and warns about it
        config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config).eval()
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted


def own_arms(model: nn.Module) -> list[Arm]:
    """Make the arms that need no other project.

    Args:
        model: a model from :mod:`worlds`.

    Returns:
        Plain PyTorch's arms first, then gradsift's.
    """
    every = [name for name, _ in model.named_parameters()]
    body = body_weights(model)
    adapted = adapt(share(model))
    three = f"sketch {SKETCH} + {NUM_DIRECTIONS} dots + norm"
    lora = Gradsift(
        adapted,
        "gradsift-lora",
        "gradsift, LoRA r=16: all three",
        three,
        [name for name, _ in adapted.named_parameters() if "lora_" in name],
        dots=True,
    )
    lora.against = "lora-plain"
    every_weight = Gradsift(share(model), "gradsift-all", "gradsift, every weight: all three", three, every, dots=True)
    every_weight.head = True
    return [
        Plain(model),
        Plain(model, "plain-headless", "plain, no gradient of the head's weight", head=False),
        PlainProducts(model, "plain-products", "plain, its products by oneDNN"),
        PlainProducts(model, "plain-headless-products", "both of these", head=False),
        ForwardOnly(model),
        Floor(model),
        Less(model),
        Gradsift(
            share(model), "gradsift-sketch", "gradsift, body: sketch", f"sketch {SKETCH}", body, dots=False, norms=False
        ),
        Gradsift(share(model), "gradsift-body", "gradsift, body: all three", three, body, dots=True),
        every_weight,
        PlainLora(model),
        PlainLora(model, fast=True),
        lora,
    ]
