"""What a backward pass keeps in memory, found without weights: the model's shapes alone, on torch's meta device (ours).

The forward is run on tensors without content; what autograd saves and what the engine's hooks hold is counted, each
storage once. So the count follows the model's own code, whatever its kind, and costs no memory. Attention is taken to
keep what fused attention keeps (its inputs, output and log-sums) and no table of length by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Kept:
    """Bytes that are alive when the backward begins, without the weights.

    Args:
        activations: saved by autograd or held by a hook.
        logits: of the supervised positions, in the model's own precision.
        gradient: widest pair of activation gradients that stand beside them in the backward.
    """

    activations: int
    logits: int
    gradient: int


class _Attention(torch.autograd.Function):
    """Keeps what fused attention keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Give an output of the right shape, heads beside each other: what follows takes it without a copy."""
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Never run: an outline is a forward."""
        raise AssertionError("an outline runs no backward")


class _Shapes(TorchFunctionMode):
    """Answers what tensors without content cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value"), args[:3], strict=False)), **(kwargs or {})}
            return _Attention.apply(given["query"], given["key"], given["value"])
        if func is Tensor.__bool__:  # "are these positions of one sequence each?" is the one question models ask
            return True
        if func is Tensor.__contains__:  # "is there padding in these rows?"
            return False
        return func(*args, **(kwargs or {}))


def trace_kept(model: nn.Module, names: Sequence[str], *, num_rows: int, length: int, num_positions: int) -> Kept:
    """Count what a micro-batch keeps between forward and backward.

    Args:
        model: a causal language model on the meta device, frozen.
        names: parameters that the engine measures.
        num_rows: rows of the micro-batch, B.
        length: their padded length, T.
        num_positions: positions at which logits are made, S.

    Returns:
        The bytes. A model whose forward asks for numbers cannot be traced: torch raises what it raises.
    """
    fixed = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    alive: dict[int, torch.UntypedStorage] = {}  # holding them keeps their keys from being used again
    widest = 0

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed:
            alive[storage._cdata] = storage
        return tensor

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal widest
        if inputs and isinstance(inputs[0], Tensor):
            note(inputs[0])
        if isinstance(output, Tensor):
            widest = max(widest, output.untyped_storage().nbytes())

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    owners = {name.rpartition(".")[0] for name in names}
    hooks = [module.register_forward_hook(after) for name, module in model.named_modules()
             if name in owners and module is not head]  # fmt: skip
    hooks.append(embedding.register_forward_hook(lambda *given: given[2].requires_grad_(True)))
    hooks.append(
        head.register_forward_pre_hook(lambda _, inputs: (note(_gathered(inputs[0], num_positions)), *inputs[1:]))
    )
    ids = torch.zeros(num_rows, length, dtype=torch.long, device="meta")
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept), _Shapes():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    kept = sum(storage.nbytes() for storage in alive.values())
    return Kept(kept, logits.untyped_storage().nbytes(), 2 * widest)


def _gathered(hidden: Tensor, num_positions: int) -> Tensor:
    """A gathered copy of the head's input; indexing by a list of positions copies too."""
    return hidden.reshape(-1, hidden.shape[-1])[:1].expand(num_positions, -1).clone()[None]
