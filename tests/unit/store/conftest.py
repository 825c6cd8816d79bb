from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from store_world import fill, make_ids, memory_folder


@pytest.fixture
def room() -> Iterator[Path]:
    """An empty folder."""
    with memory_folder() as folder:
        yield folder


@pytest.fixture
def filled(room: Path) -> Path:
    """A store of 20 rows in three shards."""
    fill(room / "store", make_ids(20), 8)
    return room / "store"
