"""The nouns that travel between stages: frozen, and their constructors hold the invariants.

N pool rows, M anchor directions, D sketch size, k chosen rows, B batch rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import BudgetError, NumericsError


class RowStatus(StrEnum):
    """What became of an input row; every row has exactly one (first failing check wins)."""

    OK = "OK"
    TRUNCATED = "TRUNCATED"
    DUPLICATE = "DUPLICATE"
    MALFORMED = "MALFORMED"
    EMPTY = "EMPTY"
    NO_TRAINED_TOKEN = "NO_TRAINED_TOKEN"
    TOKENIZE_ERROR = "TOKENIZE_ERROR"
    NONFINITE_LOSS = "NONFINITE_LOSS"
    NONFINITE_GRAD = "NONFINITE_GRAD"
    ZERO_GRAD = "ZERO_GRAD"
    OOM_AT_1 = "OOM_AT_1"
    WORKER_CRASH = "WORKER_CRASH"
    SCREENED_OUT = "SCREENED_OUT"

    @property
    def usable(self) -> bool:
        """Whether a row of this status may be selected."""
        return self in (RowStatus.OK, RowStatus.TRUNCATED)


Shape = Literal["messages", "prompt_completion", "text"]
LossOn = Literal["assistant", "completion", "all"]


@dataclass(frozen=True, slots=True)
class Example:
    """One training item in the trainer's own columns.

    Args:
        id: given, or a hash of the raw row; unique in its pool.
        shape: which columns ``fields`` has: ``messages`` (and optionally ``tools``, ``chat_template_kwargs``),
            ``prompt_completion`` (``prompt`` and ``completion``, both strings or both message lists, and the same
            optional columns), or ``text``.
        fields: the columns the trainer reads; everything else of the row stays in the raw row.
    """

    id: str
    shape: Shape
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One input row: where it came from, and either an example or the reason why not.

    Args:
        id: the example's id.
        source: label of the pool file, or the anchor's name.
        file: path or hub id as given.
        row: 0-based position in its file.
        status: OK, DUPLICATE, MALFORMED or EMPTY at reading time.
        reason: empty for OK, otherwise a sentence.
        example: present exactly when the row could be parsed (OK and DUPLICATE rows).
        copy_of: id of the first exact copy, for later copies only.
    """

    id: str
    source: str
    file: str
    row: int
    status: RowStatus
    reason: str = ""
    example: Example | None = None
    copy_of: str | None = None


@dataclass(frozen=True)
class TokenRow:
    """One row as the trainer would see it.

    Args:
        id: the row's id.
        input_ids: int32 [T], truncated to the maximum length.
        trained: bool [T], True where the label is the token itself and False where it is -100 (before the shift).
        num_untruncated: token count before truncation.
        status: OK, TRUNCATED or the status that made the row unusable.
        reason: empty for OK, otherwise a sentence.
        template: bool [T], True where a token is the chat template's own and nobody's words; None where that was not
            looked up, which counts no token as the template's.
    """

    id: str
    input_ids: Int[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]
    num_untruncated: int
    status: RowStatus
    reason: str = ""
    template: Bool[np.ndarray, " T"] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model."""
        return int(self.input_ids.size)

    @property
    def top_id(self) -> int:
        """Largest token id, -1 without tokens."""
        return int(self.input_ids.max()) if self.input_ids.size else -1

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss: trained positions other than the first, which nothing predicts."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True)
class Column:
    """A column of the raw rows that a method reads; nothing is computed in its stead.

    Args:
        name: the column's name.
        kind: ``number``, ``numbers`` (a list of them), ``word`` (a string), ``words`` (a list of strings) or ``vectors``
            (a list of lists of numbers, all of one length).
        optional: rows may lack it or hold null; ``word`` columns only, which then read as empty.
    """

    name: str
    kind: Literal["number", "numbers", "word", "words", "vectors"] = "number"
    optional: bool = False

    def __post_init__(self) -> None:
        if self.optional and self.kind != "word":
            raise ValueError("only a column of words may have holes")


@dataclass(frozen=True)
class Budget:
    """How much to select; exactly one of the three is given.

    Args:
        rows: number of rows.
        tokens: trained tokens, never exceeded.
        percent: share of the eligible rows in percent; the floor is taken, at least 1.
    """

    rows: int | None = None
    tokens: int | None = None
    percent: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.rows, self.tokens, self.percent) if v is not None]
        if len(given) != 1:
            raise BudgetError("a budget is rows, tokens or a percentage", got=self, expected="exactly one of them")
        if not np.isfinite(given[0]) or given[0] <= 0 or (self.percent is not None and self.percent > 100):
            raise BudgetError(
                "the budget is out of range",
                got=str(self),
                expected="10%, 500 or 20000tok, above 0",
                do="change --budget",
            )

    def __str__(self) -> str:
        if self.rows is not None:
            return str(self.rows)
        return f"{self.tokens}tok" if self.tokens is not None else f"{self.percent:g}%"


@runtime_checkable
class StoredRows(Protocol):
    """Vectors of rows that stay on the disk and are read when they are asked for; never an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...

    def part(self, rows: Int[np.ndarray, " k"]) -> StoredRows:
        """Look at some rows, in the order given, reading none."""
        ...

    def blocks(self, num_rows: int = 4096) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "b D"]]]:
        """Walk all rows in the cheapest order: positions and vectors, good until the next block."""
        ...


@dataclass(frozen=True)
class Noise:
    """Measured numerical bounds: how far a signal moves when a row is measured alone instead of in its batch.

    Args:
        loss: absolute bound on the loss, nats.
        norm: relative bound on the gradient norm.
        cos: absolute bound on a cosine (dots relative to both norms).
        num_rows: how many rows were measured twice.
        embedding: absolute bound on a cosine of two embeddings.
    """

    loss: float = 0.0
    norm: float = 0.0
    cos: float = 0.0
    num_rows: int = 0
    embedding: float = 0.0


@dataclass(frozen=True)
class Direction:
    """What is known of one anchor or target direction.

    Args:
        name: the anchor's name, or ``target``.
        role: ``protect`` (what must be kept) or ``target`` (what must be learned).
        norm: length of the mean gradient.
        num_rows: rows it was averaged over.
        num_tokens: tokens of those rows.
        reliability: mean split-half cosine over 20 random halves, in [-1, 1].
        reliability_sd: its standard deviation over the halves.
    """

    name: str
    role: Literal["protect", "target"]
    norm: float
    num_rows: int
    num_tokens: int
    reliability: float
    reliability_sd: float

    @property
    def reliable(self) -> bool:
        """False below 0.2, where the words conflict and protect must not be used."""
        return self.reliability >= 0.2


@dataclass(frozen=True)
class Problem:
    """Everything a method may look at: the eligible rows in id order and their signals.

    Rows are sorted by id and unique, so ties go to the smaller index and whatever is fitted reads rows in id order.
    Arrays are read-only. Signals that were not measured are None.

    Args:
        ids: N ids, strictly increasing.
        sources: N source labels.
        num_tokens: int64 [N] tokens of the row.
        num_trained: int64 [N] trained tokens of the row.
        num_read: rows read from the pool, eligible or not.
        num_trained_read: trained tokens of all rows that could be tokenized, copies included.
        loss: float64 [N] mean nats per trained token.
        grad_norm: float64 [N] exact norm of the row's gradient, > 0.
        anchor_dot: float64 [N, M] exact dot with each protect anchor's *unit* direction.
        target_dot: float64 [N] exact dot with the target's unit direction.
        sketch: float32 [N, D], <sketch_i, sketch_j> estimates <g_i, g_j>; where it is large, rows that stay on the disk
            (:class:`StoredRows`), which are indexed by arrays of rows and read in blocks.
        emb_grad_norm: float64 [N] norm of the embedding table's gradient.
        head_grad_norm: float64 [N] norm of the LM head's gradient.
        lexical: float64 [N] BM25 score against the target set.
        embedding: float32 [N, d] position-weighted mean of the last hidden states.
        target_embedding: float32 [n_t, d] the same of the target rows, in id order.
        target_ids: their n_t ids, strictly increasing.
        likeness: float64 [N] log p_target / p_pool of the row's tokens, mean nats per token.
        held_out_loss: float64 [N] mean loss, in nats per trained token, under the probes that did not train on the row.
        anchor_loss: float64 [n_a] loss of every anchor row at the starting weights, anchors in their order, rows in id
            order.
        copy_group: N names, equal for rows of equal tokens and mask (the smallest id among them); empty where rows are
            not told apart this way.
        anchors: M protect directions.
        target: the target direction.
        noise: measured numerical bounds.
        gram: float64 [M+1, M+1] dots between the *unit* directions, protect anchors in order, then the target; [M, M]
            without a target.
        direction_sketch: float32 [M+1, D] sketches of the unit directions, in the order of ``gram``.
        prompt_loss: float64 [N] mean nats per prompt token, template tokens left out; 0 for rows without a prompt token.
        num_prompt: int64 [N] prompt tokens that ``prompt_loss`` is a mean of.
        alone_loss: float64 [N] loss of the same trained tokens with everything else removed.
        hidden: float32 [N, L, h] mean hidden states of the row's tokens after the layers of ``hidden_layers``.
        hidden_layers: L numbers of layers, rising; 0 is what enters the first layer, l what leaves the l-th.
        importance: float64 [N] log p_target / p_pool of the row's hashed unigrams and bigrams (DSIR).
        external: columns of the raw rows by name, N entries each: float64 [N], or object [N] of tuples or strings.
        texts: N pairs of prompt and response, as plain text; empty where no method asked.
        checkpoints: the rows' directions at checkpoints of a warm-up, one
            :class:`gradsift.geometry.checkpoints.CheckpointSignals` each; empty where no method asked.
        subtasks: n_t labels of the target's rows in id order; empty where no method asked.
        general: source labels whose rows are general ones: choosing them is replay.
        learner: the navigator in training (:class:`gradsift.policy.schedule.Learner`), for methods that ask for roll-outs.
        proxy: a training of the navigator in rounds (:class:`gradsift.geometry.trajectory.Proxy`), for methods that steer
            its mixture.

    Raises:
        ValueError: rows out of order or arrays of the wrong length (our own mistake).
        NumericsError: a signal holds NaN or infinity.
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    num_tokens: Int[np.ndarray, " N"]
    num_trained: Int[np.ndarray, " N"]
    num_read: int
    num_trained_read: int
    loss: Float[np.ndarray, " N"] | None = None
    grad_norm: Float[np.ndarray, " N"] | None = None
    anchor_dot: Float[np.ndarray, "N M"] | None = None
    target_dot: Float[np.ndarray, " N"] | None = None
    sketch: Float[np.ndarray, "N D"] | StoredRows | None = None
    emb_grad_norm: Float[np.ndarray, " N"] | None = None
    head_grad_norm: Float[np.ndarray, " N"] | None = None
    lexical: Float[np.ndarray, " N"] | None = None
    embedding: Float[np.ndarray, "N d"] | None = None
    target_embedding: Float[np.ndarray, "n_t d"] | None = None
    target_ids: tuple[str, ...] = ()
    likeness: Float[np.ndarray, " N"] | None = None
    held_out_loss: Float[np.ndarray, " N"] | None = None
    anchor_loss: Float[np.ndarray, " n_a"] | None = None
    copy_group: tuple[str, ...] = ()
    prompt_loss: Float[np.ndarray, " N"] | None = None
    num_prompt: Int[np.ndarray, " N"] | None = None
    alone_loss: Float[np.ndarray, " N"] | None = None
    hidden: Float[np.ndarray, "N L h"] | None = None
    hidden_layers: tuple[int, ...] = ()
    importance: Float[np.ndarray, " N"] | None = None
    external: Mapping[str, np.ndarray] = field(default_factory=dict)
    texts: tuple[tuple[str, str], ...] = ()
    anchors: tuple[Direction, ...] = ()
    target: Direction | None = None
    noise: Noise = Noise()
    gram: Float[np.ndarray, "A A"] | None = None
    direction_sketch: Float[np.ndarray, "A D"] | None = None
    checkpoints: tuple[Any, ...] = ()
    subtasks: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    learner: Any = None
    proxy: Any = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        if any(a >= b for a, b in zip(self.ids, self.ids[1:], strict=False)):
            raise ValueError("Problem.ids must be strictly increasing")
        if len(self.sources) != n:
            raise ValueError("Problem.sources must have one label per id")
        if self.copy_group and len(self.copy_group) != n:
            raise ValueError("Problem.copy_group must be empty or have one name per id")
        if self.texts and len(self.texts) != n:
            raise ValueError("Problem.texts must be empty or have one pair per id")
        for name, column in self.external.items():
            if len(column) != n:
                raise ValueError(f"Problem.external[{name!r}] has {len(column)} rows, expected {n}")
            column.flags.writeable = False
        if self.hidden is not None and self.hidden.shape[1] != len(self.hidden_layers):
            raise ValueError(f"Problem.hidden has {self.hidden.shape[1]} layers, expected {self.hidden_layers}")
        for name in ("num_tokens", "num_trained", *SIGNALS):
            array = getattr(self, name)
            if array is None:
                continue
            if len(array) != n:
                raise ValueError(f"Problem.{name} has {len(array)} rows, expected {n}")
            if name != "sketch" and not np.isfinite(array).all():
                bad = int(np.flatnonzero(~np.isfinite(array).reshape(n, -1).all(axis=1))[0])
                raise NumericsError(
                    f"signal {name} is not finite",
                    where=f"row {self.ids[bad]}",
                    got=str(array[bad]),
                    expected="a finite number",
                    do="give such rows the status NONFINITE_GRAD before selecting",
                )
            if isinstance(array, np.ndarray) and array.flags.writeable:
                array.flags.writeable = False
        self._check_target_embedding()
        self._check_anchor_loss()
        self._check_gram()

    @property
    def general_rows(self) -> Bool[np.ndarray, " N"]:
        """Bool [N] rows of general sources."""
        return np.isin(np.array(self.sources, dtype=object), self.general)

    def _check_target_embedding(self) -> None:
        if self.target_embedding is None:
            return
        if len(self.target_ids) != len(self.target_embedding):
            raise ValueError("Problem.target_ids must have one id per row of target_embedding")
        if any(a >= b for a, b in zip(self.target_ids, self.target_ids[1:], strict=False)):
            raise ValueError("Problem.target_ids must be strictly increasing")
        bad = np.flatnonzero(~np.isfinite(self.target_embedding).all(axis=1))
        if bad.size:
            raise NumericsError(
                "the embedding of a target row is not finite",
                where=f"target row {self.target_ids[bad[0]]}",
                expected="finite hidden states",
                do="look at this row with gradsift inspect, and check the model with gradsift doctor",
            )
        self.target_embedding.flags.writeable = False

    def _check_anchor_loss(self) -> None:
        if self.anchor_loss is None:
            return
        bad = np.flatnonzero(~np.isfinite(self.anchor_loss))
        if bad.size:
            raise NumericsError(
                "the loss of an anchor row is not finite",
                where=f"anchor row number {bad[0]}",
                got=str(self.anchor_loss[bad[0]]),
                expected="a finite number",
                do="look at the anchor's rows with gradsift inspect, and check the model with gradsift doctor",
            )
        self.anchor_loss.flags.writeable = False

    def _check_gram(self) -> None:
        if self.gram is None:
            return
        size = len(self.anchors) + (self.target is not None)
        if self.gram.shape != (size, size):
            raise ValueError(f"Problem.gram has shape {self.gram.shape}, expected {(size, size)}")
        if not np.isfinite(self.gram).all():
            bad = int(np.flatnonzero(~np.isfinite(self.gram).all(axis=1))[0])
            names = [d.name for d in self.anchors] + ([self.target.name] if self.target else [])
            raise NumericsError(
                "the Gram matrix of the directions is not finite",
                where=f"gram, row of {names[bad]}",
                expected="finite dots between unit directions",
                do="measure the anchors again",
            )
        self.gram.flags.writeable = False

    @property
    def size(self) -> int:
        """Number of eligible rows, N."""
        return len(self.ids)

    def layer(self, number: int) -> Float[np.ndarray, "N h"]:
        """Give the mean hidden states after one layer.

        Args:
            number: a layer of ``hidden_layers``.

        Returns:
            float32 [N, h], a view.

        Raises:
            ValueError: that layer was not measured (our own mistake).
        """
        assert self.hidden is not None
        return self.hidden[:, self.hidden_layers.index(number)]

    @property
    def anchor_cos(self) -> Float[np.ndarray, "N M"] | None:
        """Cosines with the protect anchors, float64 [N, M] in [-1, 1], or None."""
        if self.anchor_dot is None or self.grad_norm is None:
            return None
        return self.anchor_dot / self.grad_norm[:, None]

    @property
    def target_cos(self) -> Float[np.ndarray, " N"] | None:
        """Cosine with the target direction, float64 [N] in [-1, 1], or None."""
        if self.target_dot is None or self.grad_norm is None:
            return None
        return self.target_dot / self.grad_norm


SIGNALS = (
    "loss",
    "grad_norm",
    "anchor_dot",
    "target_dot",
    "sketch",
    "emb_grad_norm",
    "head_grad_norm",
    "lexical",
    "embedding",
    "likeness",
    "held_out_loss",
    "prompt_loss",
    "num_prompt",
    "alone_loss",
    "hidden",
    "importance",
)


@dataclass(frozen=True)
class Note:
    """A counted remark that stays with the selection and is shown in the report.

    Args:
        code: stable word, such as ``shortage`` or ``weak_anchor``.
        text: one sentence for a person.
        count: how many rows it is about.
        ids: the first few of them.
    """

    code: str
    text: str
    count: int = 0
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """How sharply the last chosen row is separated from the first one left out.

    Args:
        margin: difference of their scores (0 when nothing was left out).
        bound: rows whose scores differ by more than this cannot trade places when the signals are measured again;
            four times the bound on one score, because both rows and the window that is settled by id may move.
        undecided: ids whose place on either side of the cut the measurement does not settle; settled by id.
        known: whether it is known how far errors of the signals move the choice. Where it is not, since a training or a
            pursuit lies between them, every row is undecided, none was settled by id, and the margin says nothing.
    """

    margin: float
    bound: float
    undecided: tuple[str, ...] = ()
    known: bool = True


@dataclass(frozen=True)
class Certificate:
    """Proof of how good a set-level choice is (ogs.md 2.9).

    Args:
        prices: lambda per anchor, gain lost per unit of protection.
        upper_bound: least dual value found; no selection can gain more.
        lp_value: gain of the fractional optimum.
        value: gain of the rows chosen.
        gap: (upper_bound - value) / max(|upper_bound|, largest gain of a row).
        lp_gap: (upper_bound - lp_value) / max(|upper_bound|, largest gain of a row).
        slack: per anchor, sum of dots of the chosen rows plus the allowance; >= 0 when kept.
        allowance: eps per anchor.
        num_fractional: rows that the fractional optimum takes in part, at most anchors + 1.
        iterations: ascent and polish steps.
        fill: how the rounded choice was completed.
    """

    prices: Mapping[str, float]
    upper_bound: float
    lp_value: float
    value: float
    gap: float
    lp_gap: float
    slack: Mapping[str, float]
    allowance: Mapping[str, float]
    num_fractional: int
    iterations: int
    fill: str = ""


@dataclass(frozen=True)
class Selection:
    """What was chosen and why.

    The audit columns are aligned with ``Problem.ids``; rows that were never eligible are added by the pipeline.

    Args:
        ids: k chosen ids in training order, unique.
        weights: float32 [k], finite and >= 0.
        problem_ids: the N ids the audit columns refer to.
        score: float64 [N], higher is chosen first; NaN where the method gives none.
        rank: int32 [N] 1-based place among the candidates by score, -1 for rows that were no candidates.
        reason_code: N codes such as ``kept:score``, ``dropped:budget``, ``dropped:conflict``.
        reason: N sentences.
        cluster: int32 [N] found group, -1 for none.
        method: registered name.
        config: the method's settings.
        budget: what was asked.
        seed: the run's seed.
        num_trained: trained tokens chosen.
        num_skipped: rows skipped because they did not fit the token budget.
        cut: margin, bound and undecided rows.
        certificate: set-level methods only.
        mixture: domain probabilities, mixture methods only.
        notes: counted remarks.
        details: what else the method has to show, as plain JSON values.
    """

    ids: tuple[str, ...]
    weights: Float[np.ndarray, " k"]
    problem_ids: tuple[str, ...]
    score: Float[np.ndarray, " N"]
    rank: Int[np.ndarray, " N"]
    reason_code: tuple[str, ...]
    reason: tuple[str, ...]
    cluster: Int[np.ndarray, " N"]
    method: str
    config: Mapping[str, Any]
    budget: Budget
    seed: int
    num_trained: int
    num_skipped: int = 0
    cut: Cut = Cut(0.0, 0.0)
    certificate: Certificate | None = None
    mixture: Mapping[str, float] | None = None
    notes: tuple[Note, ...] = field(default=())
    details: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        n = len(self.problem_ids)
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("Selection.ids must be unique")
        if not set(self.ids) <= set(self.problem_ids):
            raise ValueError("Selection.ids must come from the problem")
        if len(self.weights) != len(self.ids) or not np.isfinite(self.weights).all() or (self.weights < 0).any():
            raise ValueError("Selection.weights must be finite, >= 0 and one per id")
        for name in ("score", "rank", "reason_code", "reason", "cluster"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"Selection.{name} must have one entry per problem row")
