"""How much memory a run will take, before it takes it; and the micro-batch that fits what there is (ours).

Resident memory at the peak is the sum of what this process holds already when the rows are read and tokenized (the libraries
and the pool), the weights, the exact directions twice (as built and as multiplied with), and the larger of what loading
needs and what one micro-batch keeps: activations between forward and backward as the model's own code saves them
(:mod:`gradsift.gradients.outline`), and three tables of positions by vocabulary: logits, their exponentials, their slope.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradsift.data.batches import plan_batches, plan_order
from gradsift.data.prompts import prompt_mask
from gradsift.gradients import products
from gradsift.gradients.outline import Kept, trace_kept
from gradsift.models.adapter import attach_lora
from gradsift.models.load import resolve_device
from gradsift.models.outline import outline_model
from gradsift.models.parameters import choose_parameters
from gradsift.pipeline.prepare import Prepared
from gradsift.recipe import AUTO
from gradsift.types import Note, TokenRow

SHARE = 0.8  # of the memory that is free, for auto: the rest is for what else runs and for what is not foreseen
LEAST, MOST = 256, 16_384  # tokens per batch that auto chooses from, in powers of two
TILES = 8 << 20  # scratch of the tiles and of the fold
HEAP = 0.15  # of what a micro-batch keeps: freed pieces that malloc keeps between sizes (measured 0.02 to 0.4, glibc)
CACHE = 0.1  # the same of CUDA's caching allocator (not measured)
FIRST_USE = 48 << 20  # what the arithmetic libraries set up when they first run
COMPILED = 128 << 20  # kernels that oneDNN compiles for the shapes it meets, where it is used (products.pays)


@dataclass(frozen=True)
class Batch:
    """The micro-batch that keeps most.

    Args:
        num_rows: its rows.
        length: its padded length.
        num_positions: positions at which logits are made.
    """

    num_rows: int
    length: int
    num_positions: int


@dataclass(frozen=True)
class PassMemory:
    """Bytes at the peak of a run, by what they are for.

    Args:
        held: by the process already: libraries, rows as read and as tokens.
        weights: of the navigator, adapter included.
        loading: the weights' file while it is read, where it is not the weights themselves.
        directions: anchors and target, exact.
        activations: kept by one micro-batch for its backward.
        logits: with their exponentials and slope.
        allocator: memory that was freed and is kept, in pieces that do not fit what is asked for.
        learner: short trainings' gradients, moments and starting weights.
        chosen: sketches that a method has in memory while it chooses.
        device: ``cpu``, or where the model is: there ``held`` and ``chosen`` do not count.
        traced: whether what is kept was counted on the model's own code; else 16 vectors per layer and token are taken.
    """

    held: int
    weights: int
    loading: int
    directions: int
    activations: int
    logits: int
    allocator: int = 0
    learner: int = 0
    chosen: int = 0
    device: str = "cpu"
    traced: bool = True

    @property
    def peak(self) -> int:
        """Bytes at the peak, in the memory that the model is in."""
        compiled = COMPILED if self.device == "cpu" and products.pays() else 0
        kept = self.activations + self.logits + self.allocator + TILES + FIRST_USE + compiled
        return self.held + self.weights + max(self.loading, self.directions + self.learner + max(kept, self.chosen))

    def lines(self) -> Iterator[tuple[str, int]]:
        """Name the parts that count.

        Yields:
            Words and bytes.
        """
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size and field.name not in ("device", "traced"):
                yield field.name, size


def resident() -> int:
    """Tell how much memory this process has resident now.

    Returns:
        Bytes; the peak so far where the system has no ``/proc``.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available(device: str) -> int | None:
    """Tell how much memory could be taken now.

    Args:
        device: cpu or cuda:N.

    Returns:
        Bytes, a limit of the control group respected; None where the system does not say.
    """
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        found += [int(line.split()[1]) * 1024 for line in meminfo.read_text("utf-8").splitlines()
                  if line.startswith("MemAvailable:")]  # fmt: skip
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text("utf-8").strip() != "max":
        found.append(max(0, int(limit.read_text("utf-8")) - int(used.read_text("utf-8"))))
    return min(found, default=None)


def largest_batch(
    rows: Sequence[TokenRow], tokens_per_batch: int, rows_per_shard: int, vocabulary: int, *, prompts: bool = False
) -> Batch:
    """Find the micro-batch that keeps most, as shards are cut and batches planned.

    Args:
        rows: the rows that are measured, of pool, anchors and target.
        tokens_per_batch: the budget.
        rows_per_shard: rows of a shard; no batch is larger.
        vocabulary: weighs positions against tokens: logits are most of what small models keep.
        prompts: whether prompts' losses are measured, so that logits are made there too.

    Returns:
        Its shape; one row of one token where there are no rows.
    """
    ordered = plan_order(rows)
    best, most = Batch(1, 1, 1), -1
    for start in range(0, len(ordered), rows_per_shard):
        shard = [rows[int(i)] for i in ordered[start : start + rows_per_shard]]
        for batch in plan_batches(shard, range(len(shard)), tokens_per_batch):
            some = [shard[i] for i in batch]
            positions = sum(_predicted(row) if prompts else row.num_trained for row in some)
            found = Batch(len(some), max(row.num_tokens for row in some), positions)
            size = found.num_rows * found.length * 4096 + found.num_positions * vocabulary * 3
            if size > most:
                best, most = found, size
    return best


def _predicted(row: TokenRow) -> int:
    """Positions of a row at which its own loss or its prompt's is taken; nothing predicts the first token."""
    return int((row.trained | prompt_mask(row))[1:].sum())


def pass_memory(
    prepared: Prepared, rows: Sequence[TokenRow], *, gradients: bool, num_gradients: int = 0, prompts: bool = False
) -> PassMemory:
    """Work out the peak of a run with its recipe's budget of tokens; loads no weights.

    Args:
        prepared: the run's inputs.
        rows: the pool rows that are measured.
        gradients: whether there is a backward.
        num_gradients: gradients that a proxy keeps beside those of a step.
        prompts: whether prompts' losses are measured.

    Returns:
        The bytes, by what they are for.
    """
    return _Outline.of(prepared, gradients, prompts).memory(prepared, rows, num_gradients)


def fitting_budget(prepared: Prepared, rows: Sequence[TokenRow], *, gradients: bool, prompts: bool = False) -> int:
    """Choose the budget of tokens: the largest power of two whose peak fits the memory that is free (ours).

    Args:
        prepared: the run's inputs.
        rows: the pool rows that are measured.
        gradients: whether there is a backward.
        prompts: whether prompts' losses are measured.

    Returns:
        Tokens per batch, 256 to 16,384, never more than the rows have; 1,024 where the free memory is not known.
    """
    outline = _Outline.of(prepared, gradients, prompts)
    room = available(resolve_device(prepared.recipe.navigator.device))
    if room is None:
        return 1024
    chosen = LEAST
    while chosen < MOST and chosen < sum(row.num_tokens for row in rows):
        found = outline.memory(_with_tokens(prepared, 2 * chosen), rows, 0)
        if found.peak - found.held > SHARE * room:
            break
        chosen *= 2
    return chosen


def with_budget(prepared: Prepared, rows: Sequence[TokenRow], *, gradients: bool, prompts: bool = False) -> Prepared:
    """Settle a budget of tokens that the recipe leaves open.

    Args:
        prepared: the run's inputs.
        rows: the pool rows that are measured.
        gradients: whether there is a backward.
        prompts: whether prompts' losses are measured.

    Returns:
        The inputs with a number in their recipe, and a remark that says which; unchanged where one was given.
    """
    if prepared.recipe.collect.tokens_per_batch != AUTO:
        return prepared
    chosen = fitting_budget(prepared, rows, gradients=gradients, prompts=prompts)
    note = Note("batch_budget", f"micro-batches of up to {chosen:,} tokens were chosen for the memory that was free")
    return dataclasses.replace(_with_tokens(prepared, chosen), notes=(*prepared.notes, note))


def _with_tokens(prepared: Prepared, tokens: int) -> Prepared:
    collect = prepared.recipe.collect.model_copy(update={"tokens_per_batch": tokens})
    return dataclasses.replace(prepared, recipe=prepared.recipe.model_copy(update={"collect": collect}))


@dataclass(frozen=True)
class _Outline:
    """The model's shapes, traced once."""

    weights: int
    file_bytes: int
    measured: int
    vocabulary: int
    per_token: float
    per_position: float
    gradient: float
    device: str
    traced: bool
    prompts: bool

    @classmethod
    def of(cls, prepared: Prepared, gradients: bool, prompts: bool) -> _Outline:
        """Trace the model for one row of 512 tokens; what is kept grows with tokens and positions alone."""
        navigator, length = prepared.recipe.navigator, 512
        model = outline_model(prepared.resolved, navigator.dtype)
        own = sum(tensor.untyped_storage().nbytes() for tensor in {id(p): p for p in model.parameters()}.values())
        lora = navigator.parameters == "lora" and gradients
        adapted = attach_lora(model, navigator.lora, prepared.recipe.seed) if lora else model
        names = choose_parameters(adapted, navigator.parameters).names if gradients else ()
        sizes = {name: parameter.numel() for name, parameter in adapted.named_parameters()}
        longest = getattr(model.config, "max_position_embeddings", None)
        length = min(length, longest) if isinstance(longest, int) else length
        head, own_size = model.get_output_embeddings(), next(model.parameters()).element_size()
        vocabulary, width = (int(n) for n in head.weight.shape)  # type: ignore[union-attr]
        traced = True
        try:
            low, high = (trace_kept(adapted, names, num_rows=1, length=length, num_positions=n) for n in (1, 65))
        except Exception:  # a forward may raise anything; the estimate then says "by a formula"
            traced, layers = False, int(getattr(model.config, "num_hidden_layers", 24))
            kept = 16 * layers * length * width * own_size
            low, high = (Kept(kept, n * vocabulary * own_size, 8 * length * width * own_size) for n in (1, 65))
        positions = (high.activations + high.logits - low.activations - low.logits) / 64
        size = 8 if navigator.dtype == "float64" else 4
        # Logits, exponentials and slope are in float32; a half-precision model has its own beside them.
        positions += 2 * size * vocabulary if navigator.dtype != "bfloat16" else 10 * vocabulary
        files = sum(path.stat().st_size for path in prepared.resolved.folder.glob("*.safetensors"))
        widest = low.gradient / length
        kept = low.activations / length if gradients else 3 * widest
        return cls(
            own + (4 * sum(sizes[name] for name in names) if lora else 0),
            0 if abs(files - own) < 0.02 * own else files,
            sum(sizes[name] for name in names),
            vocabulary,
            kept,
            positions,
            widest,
            resolve_device(navigator.device),
            traced,
            prompts,
        )

    def _kept(self, batch: Batch) -> float:
        tokens = batch.num_rows * batch.length
        return tokens * (self.per_token + self.gradient) + batch.num_positions * self.per_position

    def memory(self, prepared: Prepared, rows: Sequence[TokenRow], num_gradients: int) -> PassMemory:
        """Fill in the rows."""
        collect = prepared.recipe.collect
        tokens, vocabulary = collect.tokens_per_batch, self.vocabulary
        batches = [largest_batch(rows, tokens, collect.rows_per_shard, vocabulary, prompts=self.prompts)]
        if self.measured:  # directions are built without shards and without prompts
            roles = [source.usable for source in prepared.directions]
            batches += [largest_batch(some, tokens, max(1, len(some)), vocabulary) for some in roles]
        worst = max(batches, key=self._kept)
        needs = prepared.method.needs
        learns = needs.probes is not None or needs.warmup is not None or needs.proxy
        adapter = prepared.recipe.navigator.parameters == "lora"
        own = self.measured or self.weights // (80 if adapter else 4)  # an adapter is about a twentieth of the weights
        logits = round(worst.num_positions * self.per_position)
        activations = round(self._kept(worst)) - logits
        sketches = 4 * collect.sketch_dim * len(rows) if "sketch" in needs.signals else 0
        return PassMemory(
            held=resident() if self.device == "cpu" else 0,
            weights=self.weights,
            loading=self.file_bytes if self.device == "cpu" else 0,
            directions=2 * len(prepared.directions) * self.measured * 4,
            activations=activations,
            logits=logits,
            allocator=round((activations + logits) * (HEAP if self.device == "cpu" else CACHE)),
            learner=(4 + num_gradients) * own * 4 if learns else 0,
            chosen=4 * min(sketches, 1 << 28) if self.device == "cpu" else 0,
            device=self.device,
            traced=self.traced,
        )
