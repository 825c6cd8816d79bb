"""Columns of raw rows: read as they stand, refused by name where they do not hold what is needed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gradsift.data.columns import read_columns
from gradsift.data.pool import read_pool
from gradsift.errors import DataError
from gradsift.recipe import SourceConfig
from gradsift.types import Column

GOOD = {
    "number": (3, [1, 2.5]),
    "numbers": ([1, 2], [[1.5], []]),
    "word": ("law", ["", "bio"]),
    "words": (["a", "b"], [[], ["x"]]),
    "vectors": ([[1, 0], [0, 1]], [[], [[0.5]]]),
}
BAD = {
    "number": ["3", None, True, float("inf"), [1], 10**400],
    "numbers": [3, ["a"], [True], None, [float("nan")]],
    "word": [3, None, ["a"]],
    "words": ["a", [1], None],
    "vectors": [[1, 2], [[1], [1, 2]], [["a"]], None],
}


def pool_of(folder, values, **extra):
    path = folder / "pool.jsonl"
    rows = [{"id": f"r{k}", "text": f"row {k}", "score": v, **extra} for k, v in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pool((SourceConfig(label="p", path=str(path)),))


@pytest.mark.parametrize("kind", GOOD)
def test_what_stands_there_is_read_in_the_order_asked(kind, tmp_path):
    first, rest = GOOD[kind]
    pool = pool_of(tmp_path, [first, *rest])
    got = read_columns(pool, ["r2", "r0"], [Column("score", kind)])["score"]
    assert len(got) == 2
    if kind == "number":
        assert got.tolist() == [2.5, 3.0]
        assert got.dtype == np.float64
    else:
        assert json.loads(json.dumps(got.tolist())) == [rest[1], first]


@pytest.mark.parametrize(("kind", "bad"), [(kind, bad) for kind, some in BAD.items() for bad in some])
def test_what_is_missing_or_something_else_is_refused_by_name(kind, bad, tmp_path):
    pool = pool_of(tmp_path, [GOOD[kind][0], bad, bad])
    with pytest.raises(DataError, match="column score") as refusal:
        read_columns(pool, ["r0", "r1", "r2"], [Column("score", kind)])
    assert "2 of 3 rows, such as r1, r2" in refusal.value.where
    with pytest.raises(DataError, match="column other is missing"):
        read_columns(pool, ["r0"], [Column("other", kind)])


def test_a_column_with_holes_reads_empty_there_but_must_be_there(tmp_path):
    pool = pool_of(tmp_path, ["law", None])
    assert read_columns(pool, ["r0", "r1"], [Column("score", "word", optional=True)])["score"].tolist() == ["law", ""]
    with pytest.raises(DataError, match="column none is missing"):
        read_columns(pool, ["r0", "r1"], [Column("none", "word", optional=True)])
    with pytest.raises(ValueError, match="holes"):
        Column("score", "number", optional=True)


def test_nothing_is_read_where_nothing_is_asked(tmp_path):
    assert read_columns(pool_of(tmp_path, [1]), ["r0"], []) == {}
