"""Figures before and after fine-tuning, one per task, source and metric; gain and forgetting are derived, never stored.

Positive gain is good, positive forgetting is bad, whatever the metric: losses count before - after as gain and
after - before as forgetting, accuracies the other way round. Sources stay apart: an average lets opposing ones cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from gradsift.errors import ConfigError, DataError, NumericsError

if TYPE_CHECKING:
    import pyarrow as pa

Role = Literal["domain", "general"]
Phase = Literal["before", "after"]
Better = Literal["lower", "higher", "neither"]

# Which way is better; names of lm-eval come with their filter ("acc,none"), which is cut off before the look-up.
DIRECTIONS: dict[str, Better] = {
    "loss": "lower",
    "row_loss": "lower",
    "exact": "higher",
    "accuracy": "higher",
    "accuracy_norm": "higher",
    "accuracy_adjusted": "higher",
    "kl_base": "neither",
    "acc": "higher",
    "acc_norm": "higher",
    "acc_bytes": "higher",
    "acc_mutual_info": "higher",
    "exact_match": "higher",
    "em": "higher",
    "f1": "higher",
    "mcc": "higher",
    "bleu": "higher",
    "chrf": "higher",
    "rouge1": "higher",
    "rouge2": "higher",
    "rougeL": "higher",
    "ter": "lower",
    "brier_score": "lower",
    "perplexity": "lower",
    "word_perplexity": "lower",
    "byte_perplexity": "lower",
    "bits_per_byte": "lower",
}


def direction(metric: str) -> Better:
    """Tell which way of a metric is better.

    Args:
        metric: its name; what follows a comma (the filter of lm-eval) does not matter.

    Returns:
        lower, higher, or neither for figures that only describe, such as ``kl_base``.

    Raises:
        ConfigError: the metric is not known, so gain would have no sign.
    """
    known = DIRECTIONS.get(metric.partition(",")[0])
    if known is None:
        raise ConfigError(
            "it is not known whether more or less of this metric is better",
            where="metric",
            got=metric,
            expected=", ".join(sorted(DIRECTIONS)),
            do="use one of these metrics",
        )
    return known


@dataclass(frozen=True)
class EvalRow:
    """One measured figure.

    Args:
        task: name of the set or benchmark.
        role: ``domain`` (what must be learned) or ``general`` (what must be kept).
        metric: ``loss`` (mean nats per trained token, token-weighted), ``row_loss`` (mean over rows), ``exact`` (share
            of rows whose every trained token is the likeliest), ``accuracy``, ``accuracy_norm``, ``accuracy_adjusted``
            (chance-adjusted), ``kl_base`` (nats per trained token), or a metric of lm-eval such as ``acc,none``.
        phase: ``before`` or ``after`` fine-tuning.
        value: finite.
        n: rows or questions behind the value, >= 1.
        seed: seed of the fine-tuning run.
        source: which part of the task; the task's own name when it has only one.

    Raises:
        ConfigError: a role, phase or metric is not known, or n is below 1.
        NumericsError: the value is not finite.
    """

    task: str
    role: Role
    metric: str
    phase: Phase
    value: float
    n: int
    seed: int
    source: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role) or self.phase not in get_args(Phase) or self.n < 1:
            raise ConfigError(
                "a figure needs a role, a phase and at least one row",
                where=f"{self.task}/{self.source}/{self.metric}",
                got=f"role {self.role}, phase {self.phase}, n {self.n}",
                expected="domain or general, before or after, n >= 1",
            )
        direction(self.metric)
        if not math.isfinite(self.value):
            raise NumericsError(
                "a figure is not finite",
                where=f"{self.task}/{self.source}/{self.metric} {self.phase}",
                got=str(self.value),
                expected="a finite number",
                do="lower the learning rate, or look at the rows of this set with gradsift inspect",
            )

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What pairs the two phases: role, task, source, metric, seed."""
        return self.role, self.task, self.source, self.metric, self.seed


@dataclass(frozen=True)
class Change:
    """How far one figure moved.

    Args:
        task: name of the set or benchmark.
        role: domain or general.
        source: which part of the task.
        metric: the metric.
        seed: seed of the run.
        before: value before.
        after: value after.
        value: gain (domain, positive is good) or forgetting (general, positive is bad), in the metric's unit.
        n: rows or questions.
    """

    task: str
    role: Role
    source: str
    metric: str
    seed: int
    before: float
    after: float
    value: float
    n: int


@dataclass(frozen=True)
class EvalTable:
    """All figures of a run, or of several runs.

    Args:
        rows: figures; no two of them share task, role, source, metric, seed and phase.

    Raises:
        DataError: a figure stands twice.
    """

    rows: tuple[EvalRow, ...]

    def __post_init__(self) -> None:
        seen: set[Any] = set()
        for row in self.rows:
            if (row.key, row.phase) in seen:
                raise DataError(
                    "a figure stands twice in the table",
                    where="/".join(str(part) for part in (*row.key, row.phase)),
                    do="give sets of one role different names, and runs different seeds",
                )
            seen.add((row.key, row.phase))

    def __add__(self, other: EvalTable) -> EvalTable:
        return EvalTable((*self.rows, *other.rows))

    def phase(self, phase: Phase) -> tuple[EvalRow, ...]:
        """Figures of one phase, in order.

        Args:
            phase: before or after.

        Returns:
            Its figures.
        """
        return tuple(row for row in self.rows if row.phase == phase)

    def gain(self) -> tuple[Change, ...]:
        """Improvement of every domain figure, per source.

        Returns:
            One change per figure, in the order of the figures before; positive is good.

        Raises:
            DataError: a figure was measured in one phase only, or on other rows.
        """
        return tuple(self._changes("domain", sign=-1.0))

    def forgetting(self) -> tuple[Change, ...]:
        """Damage of every general figure, per source.

        Returns:
            One change per figure, in the order of the figures before; positive is bad.

        Raises:
            DataError: a figure was measured in one phase only, or on other rows.
        """
        return tuple(self._changes("general", sign=1.0))

    def _changes(self, role: Role, *, sign: float) -> Iterable[Change]:
        chosen = [row for row in self.rows if row.role == role and direction(row.metric) != "neither"]
        before = {row.key: row for row in chosen if row.phase == "before"}
        after = {row.key: row for row in chosen if row.phase == "after"}
        alone = sorted(before.keys() ^ after.keys())
        if alone:
            raise _unpaired("/".join(str(part) for part in alone[0]), f"{len(alone)} figures of one phase only")
        for key, first in before.items():
            last = after[key]
            if first.n != last.n:
                raise _unpaired("/".join(str(part) for part in key), f"n = {first.n} before and {last.n} after")
            worse = last.value - first.value if direction(first.metric) == "lower" else first.value - last.value
            # 0.0 - x rather than -x, so that nothing moved reads 0 and not -0.
            value = worse if sign > 0 else 0.0 - worse
            yield Change(first.task, role, first.source, first.metric, first.seed, first.value, last.value, value,
                         first.n)  # fmt: skip

    def to_arrow(self) -> pa.Table:
        """Write the figures as an Arrow table, one column per field.

        Returns:
            The table.
        """
        import pyarrow as pa

        columns = {name: [getattr(row, name) for row in self.rows] for name in SCHEMA}
        return pa.table(columns, schema=pa.schema([(name, pa.type_for_alias(kind)) for name, kind in SCHEMA.items()]))

    @staticmethod
    def from_arrow(table: pa.Table) -> EvalTable:
        """Read figures back.

        Args:
            table: from :meth:`to_arrow`; other columns are refused.

        Returns:
            The same figures.

        Raises:
            DataError: the columns are not those of an EvalTable.
        """
        if set(table.column_names) != set(SCHEMA):
            raise DataError(
                "this is no table of figures",
                where="eval.parquet",
                got=", ".join(table.column_names),
                expected=", ".join(SCHEMA),
                do="run gradsift evaluate again",
            )
        return EvalTable(tuple(EvalRow(**row) for row in table.to_pylist()))

    def to_json(self) -> list[dict[str, Any]]:
        """Write the figures as plain values.

        Returns:
            One mapping per figure.
        """
        return [asdict(row) for row in self.rows]


SCHEMA = {"task": "string", "role": "string", "metric": "string", "phase": "string", "value": "float64", "n": "int64",
          "seed": "int64", "source": "string"}  # fmt: skip
assert tuple(SCHEMA) == tuple(field.name for field in fields(EvalRow))


def write_table(table: EvalTable, path: Path) -> None:
    """Write figures as Parquet.

    Args:
        table: the figures.
        path: the file; replaced when it exists.
    """
    import pyarrow.parquet as pq

    pq.write_table(table.to_arrow(), path)


def read_table(path: Path) -> EvalTable:
    """Read figures from Parquet.

    Args:
        path: ``eval.parquet`` of a finished stage.

    Returns:
        The figures.

    Raises:
        DataError: the file is missing or is something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return EvalTable.from_arrow(pq.read_table(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            "the figures cannot be read", where=str(path), got=str(error)[:200], do="run gradsift evaluate again"
        ) from None


def _unpaired(where: str, got: str) -> DataError:
    return DataError(
        "a figure has no partner to compare with",
        where=where,
        got=got,
        expected="every figure before and after, on the same rows",
        do="measure both phases with the same sets: gradsift evaluate --model BASE --tuned DIR",
    )
