"""A pool whose rows mostly cannot be read is stopped before anything is measured; a few cost themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gradsift.errors import DataError
from gradsift.pipeline.prepare import Source, _refuse_mostly_broken
from gradsift.types import RowStatus, TokenRow


def source(num_ok: int, num_bad: int, status: RowStatus = RowStatus.MALFORMED) -> Source:
    ids, mask = np.arange(4, dtype=np.int32), np.ones(4, dtype=bool)
    none, no = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
    rows = [TokenRow(f"ok-{n}", ids, mask, 4, RowStatus.OK) for n in range(num_ok)]
    rows += [TokenRow(f"bad-{n}", none, no, 0, status, "it is not JSON") for n in range(num_bad)]
    pool = SimpleNamespace(files=[SimpleNamespace(path=str(Path("pool.jsonl")))])
    return Source("pool", "pool", pool, tuple(rows))  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [RowStatus.MALFORMED, RowStatus.TOKENIZE_ERROR])
def test_too_many_unreadable_rows_are_a_refusal_that_shows_the_first(status):
    with pytest.raises(DataError, match="11 of 21 rows; first, row bad-0: ") as raised:
        _refuse_mostly_broken(source(10, 11, status), 0.5)
    assert "it is not JSON" in str(raised.value)
    assert "collect.unreadable_share" in str(raised.value)


@pytest.mark.parametrize(
    ("pool", "share"),
    [(source(10, 10), 0.5), (source(1, 18), 0.5), (source(1, 60), 1.0), (source(10, 30, RowStatus.EMPTY), 0.5)],
    ids=["at the share", "too few rows to tell", "allowed", "empty rows are no defect of reading"],
)
def test_what_is_not_refused(pool, share):
    _refuse_mostly_broken(pool, share)
