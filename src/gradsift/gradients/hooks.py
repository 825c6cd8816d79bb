"""The engine: hooks keep each layer's input, take the gradient of its output, and measure at once.

Every weight is frozen, so the weight-gradient product of an ordinary backward is never run; the embedding's output
carries the gradient down. Right-padded batches need no attention mask in a causal model: no real token sees a later one,
and padding gets zero gradient. Logits exist only at supervised positions: the LM head's input is gathered before the
product, so no [B, T, V] tensor is ever made.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gradsift.errors import ConfigError, ModelError
from gradsift.gradients import adapters, calls, fused, lookups, on_cuda, products, roads
from gradsift.gradients.adam import unit_length
from gradsift.gradients.blocks import Block, Contribution, Dense, Outer, Routed, Scatter, Totals, make_block
from gradsift.gradients.edges import embedding_squares, head_squares
from gradsift.gradients.embed import pool_positions
from gradsift.gradients.experts import bias_sums, check_router, is_experts, tapped
from gradsift.gradients.layers import LayerRule, Seen, rule_for
from gradsift.gradients.measured import Forwarded, Measured
from gradsift.gradients.prefix import Held, empty_cache, hold_prompts, needs_adjacent, refuse_states
from gradsift.gradients.prefold import refuse_without_norms
from gradsift.gradients.project import Projector
from gradsift.gradients.slopes import Sloped, losses_and_slopes
from gradsift.gradients.taps import find_layers
from gradsift.gradients.tray import Tray

EDGE_NORMS = ("emb_grad_norm", "head_grad_norm")


@dataclass
class _Use:
    """One chosen parameter of one module."""

    block: Block
    local: str


@dataclass
class _Batch:
    """State of the micro-batch in flight."""

    width: int
    lengths: tuple[int, ...]
    head_lengths: tuple[int, ...]
    head_starts: tuple[int, ...]
    positions: Tensor
    places: tuple[Tensor, Tensor]
    totals: Totals
    emb_square: Tensor
    head_square: Tensor
    embedding: Tensor | None = None
    prompt: Tensor | None = None
    parts: tuple[Totals, ...] = ()

    def by_row(self, tokens: Tensor) -> Tensor:
        """Put what a layer saw as [B * T, n], a router perhaps in its output alone, or as [B, 1, T, n] into rows [B, T, n]."""
        if tokens.ndim == 4 and tokens.shape[1] == 1:
            return tokens[:, 0]
        if tokens.ndim == 2 and tokens.is_floating_point() and tokens.shape[0] == len(self.lengths) * self.width:
            return tokens.unflatten(0, (-1, self.width))
        return tokens

    @property
    def apart(self) -> Tensor | None:
        """[B, P, M + 1] dots and squared norm of each part, or None where parts are not kept apart."""
        if not self.parts:
            return None
        return torch.stack([torch.cat([p.dots, p.square[:, None]], 1) for p in self.parts], 1)


class GradientEngine:
    """Measures per-example gradients of a frozen causal language model.

    Args:
        model: a causal language model; put into eval mode, all weights frozen.
        names: parameters to measure (names of ``model.named_parameters()``; tied weights once).
        projector: seed and size of the sketch, or None for none.
        directions: name -> [M, rows * cols] unit directions, from :meth:`flatten`; or None.
        building: also sum the gradients themselves, to build an anchor.
        embedding: also pool the last hidden states, which are the LM head's input.
        norms: False asks for the sketch alone: no gradient is formed, and every norm is NaN.
        edges: also measure the gradient norms of the embedding table and the LM head where they are not among ``names``;
            False leaves those NaN, and the backward ends at the lowest of ``names``.
        road: how gradients are measured; auto takes tiles on a CPU and what is fastest on a GPU, see ``description``.
        first_layer: the backward stops where this decoder layer (from 0) begins: whatever is computed before it is a
            constant, and ``names`` are those of :func:`gradsift.gradients.upper.choose_upper`. None stops at the embedding.
        trained_only: what stands before a row's first trained token is held constant, see :mod:`gradsift.gradients.prefix`;
            gradients are those of the rest.

    Raises:
        ConfigError: the prompt is to be held constant, and embeddings are asked for or the model keeps a state; or no rule
            reads any of ``names``.
        ModelError: the model has no LM head that can be hooked, or has a DoRA adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        projector: Projector | None = None,
        directions: Mapping[str, Tensor] | None = None,
        building: bool = False,
        embedding: bool = False,
        norms: bool = True,
        edges: bool = True,
        road: roads.Road = "auto",
        first_layer: int | None = None,
        trained_only: bool = False,
    ) -> None:
        if trained_only and embedding:
            raise ConfigError(
                "embeddings are those of whole rows", where="collect.positions", got="trained", expected="all",
                do="leave collect.positions out, or choose a method that needs no embedding",
            )  # fmt: skip
        if trained_only:
            refuse_states(model)
        self.trained_only = trained_only
        self.adjacent = trained_only and needs_adjacent(model)
        self.norms = norms
        self.edges = edges and norms
        self.model = model.eval()
        first = next(model.parameters())
        self._device, self._weights = first.device, first.dtype
        self.road = roads.choose_road(road, self._device, self._weights)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.projector = projector
        self.part_of: Mapping[str, int] = {}  # parameter -> its part, where parts are kept apart
        self.bent = False  # sketches are of Adam directions; see gradsift.gradients.adam.bend
        self.num_directions = 0 if not directions else next(iter(directions.values())).shape[0]
        self._embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._head = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(self._head, nn.Linear):
            raise ModelError(
                "the model has no LM head that gradsift can hook",
                got=type(self._head).__name__,
                expected="a causal language model whose output embedding is a linear layer",
                do="choose another --navigator",
            )
        self.embedding_dim = self._head.in_features if embedding else None
        self.blocks: dict[str, Block] = {}
        self._uses: dict[nn.Module, list[_Use]] = defaultdict(list)
        self._rules: dict[nn.Module, LayerRule] = {}
        self.uncovered = self._map_parameters(set(names))
        if names:
            self._refuse_unmeasured()
        for name, block in self.blocks.items():
            if directions:
                block.directions = directions[name]
            block.road = self.road
            if building:
                block.mean = torch.zeros(block.rows, block.cols, dtype=self.dtype, device=self._device)
        # Asking a norm takes its weight, which is not whole here where weights are dealt over processes.
        asks = self.road == "fused" and not calls.is_bound(model)
        self._norms = roads.fast_norms(self._uses, self.dtype) if asks else {}
        self._head_block = self._weight_block(self._head)
        self._embedding_block = self._weight_block(self._embedding)
        self._takes_positions = _accepts_positions(model)
        self._checked: set[nn.Module] = set()  # routers
        self.first_layer = first_layer
        self._first = None if first_layer is None else find_layers(model)[first_layer]
        self._reached = first_layer is None
        self._batch: _Batch | None = None
        self._expected: dict[str, int] = {}
        self._pending: dict[str, list[Contribution]] = {}
        self._handles: list[Any] = []
        self._tapped = ExitStack()
        self._tray = Tray(None if projector is None else projector.dim)

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the measurement: float64 for a float64 model, float32 otherwise (bfloat16 is widened)."""
        return torch.float64 if self._weights == torch.float64 else torch.float32

    @property
    def description(self) -> str:
        """How gradients are measured here, in words."""
        return roads.describe(self.road, self._device, self._weights)

    @property
    def edge_norms(self) -> tuple[str, ...]:
        """Which of :data:`EDGE_NORMS` a pass measures."""
        emb, head = (self.edges or (self.norms and b is not None) for b in (self._embedding_block, self._head_block))
        return tuple(name for name, on in zip(EDGE_NORMS, (emb and self._sees_lookups, head)) if on)

    @property
    def _sees_lookups(self) -> bool:
        """Whether the backward gets to all tokens' lookups; the table may still be measured as the head where not."""
        return self._first is None and not self.trained_only

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    def is_head(self, block: Block) -> bool:
        """Tell whether a parameter is the LM head's weight, a table that is tied to it included."""
        return block is self._head_block

    def looks_up(self, block: Block) -> bool:
        """Tell whether a parameter is a table that tokens are looked up in."""
        return block is self._embedding_block

    def holds_experts(self, block: Block) -> bool:
        """Tell whether a parameter is one of all experts of a layer together."""
        return any(is_experts(module) and use.block is block for module, uses in self._uses.items() for use in uses)

    def _map_parameters(self, wanted: set[str]) -> tuple[str, ...]:
        """Find the module and rule of each wanted parameter; return the names that no rule covers."""
        first_name = {id(p): name for name, p in self.model.named_parameters()}
        covered = set()
        unseen = adapters.of_parameters(self.model)
        for module in self.model.modules():
            rule = None if module in unseen else rule_for(module)
            for local, parameter in module.named_parameters(recurse=False):
                name = first_name[id(parameter)]
                if name not in wanted or rule is None:
                    continue
                if name not in self.blocks:
                    rows, cols = rule.shape(module, local)
                    self.blocks[name] = make_block(
                        name, rows, cols, self.projector, dtype=self.dtype, device=self._device
                    )
                self._uses[module].append(_Use(self.blocks[name], local))
                self._rules[module] = rule
                covered.add(name)
        return tuple(sorted(wanted - covered))

    def _refuse_unmeasured(self) -> None:
        if not self.blocks:
            raise ConfigError(
                "no layer rule reads any of the chosen parameters",
                where="navigator.parameters",
                got=", ".join(self.uncovered[:5]),
                expected="some of linear layers, embeddings, norms or experts",
                do="choose other parameters; gradsift doctor names those that are not read",
            )
        for name, module in self.model.named_modules():
            if len(getattr(module, "lora_magnitude_vector", ())):
                raise ModelError(
                    "an adapter with magnitudes (DoRA) is not measured: its output is no sum of products",
                    where=name,
                    got="lora_magnitude_vector",
                    expected="a plain LoRA adapter",
                    do="make the adapter with use_dora=False, or merge it into the model",
                )

    def _weight_block(self, module: nn.Module) -> Block | None:
        return next((use.block for use in self._uses.get(module, ()) if use.local == "weight"), None)

    def matrix(self, name: str, value: Tensor) -> Float[Tensor, "rows cols"]:
        """View a parameter-shaped tensor as the block's matrix.

        Args:
            name: a covered parameter.
            value: tensor in the parameter's own shape.

        Returns:
            [rows, cols].
        """
        block = self.blocks[name]
        for module, uses in self._uses.items():
            if any(use.block is block for use in uses):
                return self._rules[module].to_matrix(value)
        raise KeyError(name)

    def flatten(self, name: str, matrices: Sequence[Float[Tensor, "rows cols"]]) -> Float[Tensor, "M n"]:
        """Turn direction matrices into the rows that blocks multiply with.

        Args:
            name: a covered parameter.
            matrices: M matrices of the block's shape.

        Returns:
            [M, rows * cols].
        """
        assert name in self.blocks, name
        return torch.stack(list(matrices)).reshape(len(matrices), -1).contiguous()

    # -- hooks ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> GradientEngine:
        self._step_adapters()
        hooked = set(self._uses) | {self._embedding, self._head}
        for module in hooked:
            if is_experts(module):
                self._tapped.enter_context(tapped(module, partial(self._after_product, module)))
            else:
                self._handles.append(module.register_forward_hook(self._after_forward))
        if self._first is not None:
            self._handles.append(self._first.register_forward_pre_hook(self._begin))
        # First of the head's pre-hooks, so that other hooks see the gathered input as well.
        self._handles.append(self._head.register_forward_pre_hook(self._gather, prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tapped.close()

    def _step_adapters(self) -> None:
        """Let adapted layers of which A or B alone are measured run as one step; other devices were not measured."""
        if self.road != "tiles":
            return
        for module in self.model.modules():
            layer = adapters.read(module)
            if layer is None or module.base_layer in self._uses or not {layer.a, layer.b} & set(self._uses):
                continue
            both = (layer.a, layer.b)

            def tracks(_: Tensor, both: tuple[nn.Module, ...] = both) -> bool:
                on = torch.is_grad_enabled() and self._reached and self._batch is not None
                for one in both if on else ():
                    self._expect(one)
                return on

            self._tapped.enter_context(adapters.stepping(module, layer, tracks, self._after_backward))

    def _begin(self, *_: object) -> None:
        self._reached = True

    def _expect(self, module: nn.Module) -> None:
        for use in self._uses.get(module, ()):
            self._expected[use.block.name] = self._expected.get(use.block.name, 0) + 1

    def _gather(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._batch is None:  # another process measures, and the model is called for its sake
            return inputs
        hidden = inputs[0]
        if self.embedding_dim is not None:
            self._batch.embedding = pool_positions(hidden.detach().to(self.dtype), self._batch.lengths)
        return (hidden.reshape(-1, hidden.shape[-1])[self._batch.positions][None], *inputs[1:])

    def _after_forward(
        self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        if self._batch is None or not torch.is_grad_enabled() or not self._reached:
            return
        if isinstance(
            output, tuple
        ):  # a router's logits come first, and are checked to be what its rule takes them for
            output = output[0]
            if module not in self._checked:
                check_router(module, inputs[0], output)
                self._checked.add(module)
        if module not in self._uses and not self.edges:
            return
        if not output.requires_grad:  # nothing before the lowest of those measured is in the graph
            output.requires_grad_(True)
        self._expect(module)
        x = inputs[0].detach()
        output.register_hook(lambda g: self._after_backward(module, x, g))

    def _after_product(
        self, module: nn.Module, local: str, x: Tensor, y: Tensor, token: Tensor, expert: Tensor
    ) -> None:
        """Wait for the output gradient of all experts' products with one fused parameter."""
        uses = [use for use in self._uses[module] if use.local in (local, f"{local}_bias")]
        if self._batch is None or not uses or not torch.is_grad_enabled() or not self._reached:
            return
        if not y.requires_grad:
            y.requires_grad_(True)
        for use in uses:
            self._expected[use.block.name] = self._expected.get(use.block.name, 0) + 1
        x = x.detach()

        def arrived(g: Tensor) -> None:
            assert self._batch is not None
            lengths = torch.tensor(self._batch.lengths, device=token.device)
            example = token // self._batch.width
            live = token % self._batch.width < lengths[example]
            some = Routed(x[live].to(self.dtype), g.detach()[live].to(self.dtype), expert[live], example[live])
            for use in uses:
                bias = use.local != local
                sums = bias_sums(some.g, some.expert, some.example, use.block.rows, len(lengths)) if bias else None
                self._arrive(use.block, some if sums is None else Dense(sums))

        y.register_hook(arrived)

    def _after_backward(self, module: nn.Module, x: Tensor, g: Tensor) -> None:
        assert self._batch is not None
        batch, head = self._batch, module is self._head
        g = g.detach()
        fast_norm = module in self._norms and x.dtype == g.dtype and x.ndim == 3
        if self.road == "tiles" or not (fast_norm or roads.keeps_narrow(module)):
            g = g.to(self.dtype)
            x = x.to(self.dtype) if x.is_floating_point() else x
        x, g = batch.by_row(x), batch.by_row(g)
        if head:
            seen = Seen(x[0], g[0], batch.head_lengths, batch.head_starts)
            if self._head_block is None and self.edges:
                batch.head_square = self._head_squares(seen)
        else:
            lengths = batch.lengths if x.shape[0] == len(batch.lengths) else None
            if lengths is None:
                raise ModelError(
                    "a layer shares one computation between examples, so its gradient cannot be told apart",
                    where=type(module).__name__,
                    got=f"input shape {tuple(x.shape)} in a batch of {len(batch.lengths)}",
                    do="choose another --navigator or leave the layer out of navigator.parameters",
                )
            seen = Seen(x, g, lengths)
            if module is self._embedding and self._embedding_block is None and self.edges and self._sees_lookups:
                batch.emb_square = self._embedding_squares(module, seen)
        if module not in self._uses:
            return
        if fast_norm:
            parts = {"weight": Dense(fused.rms_sums(x, g, seen.lengths, self._norms[module]))}
        else:
            parts = dict(self._rules[module].parts(module, seen))
        for use in self._uses[module]:
            self._arrive(use.block, parts[use.local])

    def _head_squares(self, seen: Seen) -> Tensor:
        if self.road == "tiles":
            return head_squares(seen)
        return on_cuda.head_squares(Outer(seen.x, seen.g, seen.lengths, seen.starts), self.road)

    def _embedding_squares(self, module: nn.Module, seen: Seen) -> Tensor:
        rule = self._rules.get(module) or rule_for(module)
        if self.road == "tiles" or rule is None:
            return embedding_squares(rule, module, seen)
        return lookups.scatter_squares([part for _, part in rule.parts(module, seen) if isinstance(part, Scatter)])

    def _arrive(self, block: Block, part: Contribution) -> None:
        """Measure a parameter once everything that flows into it has arrived (tied or reused weights: several)."""
        assert self._batch is not None
        waiting = self._pending.setdefault(block.name, [])
        waiting.append(part)
        if len(waiting) < self._expected[block.name]:
            return
        totals = self._batch.parts[self.part_of[block.name]] if self.part_of else self._batch.totals
        if self._tray.takes(block, waiting):
            self._tray.add(block, waiting[0], totals)
        else:
            squares = block.measure(waiting, totals)
            if block is self._head_block:
                self._batch.head_square = squares.linear
            if block is self._embedding_block and self._sees_lookups:
                self._batch.emb_square = squares.looked_up
        del self._pending[block.name]

    # -- running -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward_only(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        lengths: Int[Tensor, " B"],
        prompt: Bool[Tensor, "B T"] | None = None,
    ) -> Forwarded:
        """Measure losses, and embeddings where the engine was asked for them: one forward, no backward.

        Args:
            input_ids: [B, T] right-padded tokens.
            labels: [B, T] with -100 where no loss is taken.
            lengths: [B] real tokens per row.
            prompt: [B, T] tokens whose mean loss is measured apart; none where labels are set, none at position 0.

        Returns:
            Losses and embeddings.
        """
        with calls.calling(self.model, None), self._running(input_ids, labels, lengths, prompt) as batch:
            got = self._sloped(self._logits(input_ids), labels, input_ids, slope=False)
            return Forwarded(
                got.loss.cpu(), *(None if t is None else t.cpu() for t in (batch.embedding, got.prompt_loss))
            )

    def measure(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        lengths: Int[Tensor, " B"],
        prompt: Bool[Tensor, "B T"] | None = None,
    ) -> Measured:
        """Measure every signal of a micro-batch: one forward, one backward to activations.

        Args:
            input_ids: [B, T] right-padded tokens.
            labels: [B, T] with -100 where no loss is taken; every row trains at least one token.
            lengths: [B] real tokens per row.
            prompt: [B, T] tokens whose mean loss is measured apart; they have no part in any gradient.

        Returns:
            Losses, squared norms, dots, sketches, embedding and head norms.

        Raises:
            ConfigError: prompts' losses are asked for where prompts are held constant.
        """
        if self.num_directions:
            refuse_without_norms(self.norms, "exact dots")
        logits_of = self._logits
        if self.trained_only:
            if prompt is not None:
                raise ConfigError("prompts' losses are those of whole rows", where="collect.positions", got="trained")
            held = hold_prompts(input_ids, labels, lengths, adjacent=self.adjacent)
            logits_of = self._after_prefix(held)
            input_ids, labels, lengths = held.input_ids, held.labels, held.lengths
        with (
            calls.calling(self.model, self.first_layer or 0),
            self._running(input_ids, labels, lengths, prompt) as batch,
        ):
            logits = logits_of(input_ids)
            got = self._sloped(logits, labels, input_ids)
            assert got.slope is not None
            self._plan_tray(len(lengths))
            torch.autograd.backward(logits, got.slope.to(logits.dtype)[None])
            if self._pending:
                raise AssertionError(f"no gradient arrived for {sorted(self._pending)}")
            totals = batch.totals
            self._tray.measure()
            for part in batch.parts:
                totals.dots += part.dots
                totals.square += part.square
            return Measured(
                got.loss.cpu(),
                totals.square.cpu(),
                totals.dots.cpu(),
                None if totals.sketch is None else self._sketch(totals).cpu(),
                batch.emb_square.clamp_min(0).sqrt().cpu(),
                batch.head_square.clamp_min(0).sqrt().cpu(),
                None if batch.embedding is None else batch.embedding.cpu(),
                None if got.prompt_loss is None else got.prompt_loss.cpu(),
                None if batch.apart is None else batch.apart.cpu(),
            )

    def _plan_tray(self, size: int) -> None:
        """Small parameters that are used once will arrive in the reverse order of the forward."""
        ends = (self._head_block, self._embedding_block)
        once = (
            [self.blocks[name] for name, count in reversed(self._expected.items()) if count == 1] if self.norms else []
        )
        self._tray.plan([block for block in once if block not in ends], size)

    def _sloped(self, logits: Tensor, labels: Tensor, input_ids: Tensor, *, slope: bool = True) -> Sloped:
        assert self._batch is not None
        prompt, places = self._batch.prompt, self._batch.places
        kernels = self.road == "fused"
        return losses_and_slopes(logits[0], labels, input_ids, prompt, places, kernels=kernels, slope=slope)

    def _sketch(self, totals: Totals) -> Tensor:
        assert totals.sketch is not None
        return unit_length(totals.sketch, totals.square) if self.bent else totals.sketch

    def _logits(self, input_ids: Tensor) -> Tensor:
        # Explicit positions: a shared [1, T] position lookup would sum the batch's gradients into one.
        extra = {}
        if self._takes_positions:
            extra["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self._call(input_ids=input_ids, use_cache=False, **extra)

    def _after_prefix(self, held: Held) -> Callable[[Tensor], Tensor]:
        """Run the prefixes without a graph; what is returned gives the logits of the rest."""
        if not held.prefix.shape[1]:
            return self._logits
        kept = empty_cache(self.model)
        nothing = torch.full_like(held.prefix, -100)
        padded: dict[str, Tensor] = {}
        if self.adjacent:
            padded["attention_mask"] = held.seen.long()
            padded |= {"position_ids": held.prefix_positions} if self._takes_positions else {}
        with (
            torch.no_grad(),
            self._running(held.prefix, nothing, held.starts, None),
        ):  # no logits: nothing is supervised
            self._call(input_ids=held.prefix, use_cache=True, **kept, **padded)
        extra = {"position_ids": held.positions} if self._takes_positions else {}
        return lambda input_ids: self._call(
            input_ids=input_ids, attention_mask=held.mask, use_cache=True, **kept, **extra
        )

    def _call(self, **inputs: Any) -> Tensor:
        """Run the model forward to its logits."""
        # Weights that are dealt out are whole only while a layer runs, so no graph may hold them.
        compiled = hasattr(self.model, "_orig_mod")
        fast = self.road == "tiles" and products.pays() and not calls.is_bound(self.model) and not compiled
        with products.FrozenProducts() if fast else nullcontext():
            return self.model(**inputs).logits

    @contextmanager
    def _running(self, input_ids: Tensor, labels: Tensor, lengths: Tensor, prompt: Tensor | None) -> Iterator[_Batch]:
        size, width = input_ids.shape
        supervised = labels[:, 1:] != -100
        if prompt is not None:  # logits exist where something is predicted: here the prompt's too
            supervised = supervised | prompt[:, 1:]
        rows, columns = supervised.nonzero(as_tuple=True)
        counts = supervised.sum(1)
        starts = torch.cumsum(counts, 0) - counts
        dim = None if self.projector is None else self.projector.dim
        self._batch = _Batch(
            width,
            tuple(lengths.tolist()),
            tuple(counts.tolist()),
            tuple(starts.tolist()),
            rows * width + columns,
            (rows, columns),
            Totals(
                torch.zeros(size, self.num_directions, dtype=torch.float64, device=self._device),
                self._start(size, self.norms),
                None if dim is None else torch.zeros(size, dim, dtype=self.dtype, device=self._device),
                self.norms,
            ),
            *(self._start(size, name in self.edge_norms) for name in EDGE_NORMS),
            prompt=prompt,
        )
        totals = self._batch.totals
        self._batch.parts = tuple(
            replace(totals, dots=torch.zeros_like(totals.dots), square=torch.zeros_like(totals.square))
            for _ in range(max(self.part_of.values(), default=-1) + 1)
        )
        self._expected.clear()
        self._pending.clear()
        self._reached = self._first is None
        try:
            yield self._batch
        finally:
            self._batch = None
            self._expected.clear()
            self._pending.clear()

    def _start(self, size: int, measured: bool) -> Float[Tensor, " B"]:
        return torch.full((size,), 0.0 if measured else float("nan"), dtype=torch.float64, device=self._device)


def _accepts_positions(model: nn.Module) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "position_ids" in inspect.signature(inner.forward).parameters
