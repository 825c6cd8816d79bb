"""The state of a training on the disk: what was written or what was there before, never something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradsift.pipeline.kept_state import load_state, save_state

ONE = {"weights": np.arange(40.0), "part/step": np.array(3), "empty": np.zeros((0, 2), dtype=np.int32)}
TWO = {**ONE, "weights": np.arange(40.0) + 1}


def equal(got, want) -> bool:
    return got is not None and got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want)


def test_the_last_save_is_read_and_nothing_is_nothing(tmp_path: Path):
    assert load_state(tmp_path / "none.npz") == (None, "")
    for arrays in (ONE, TWO):
        save_state(tmp_path / "deep" / "state.npz", arrays)
        got, remark = load_state(tmp_path / "deep" / "state.npz")
        assert equal(got, arrays)
        assert remark == ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("kept") / "state.npz"
    save_state(path, ONE)
    save_state(path, TWO)
    return path, path.read_bytes()


@example(2559, 0, False)  # the bit of a member's flags that says it is encrypted
@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans())
@settings(max_examples=150, deadline=None)
def test_damage_anywhere_gives_the_save_before(saved, place, bit, cut):
    path, whole = saved
    data = bytearray(whole)
    place %= len(data)
    if cut:
        data = data[:place]
    else:
        data[place] ^= 1 << bit
    path.write_bytes(bytes(data))
    got, remark = load_state(path)
    if equal(got, TWO):  # a bit of the archive that carries nothing, such as a time of a member
        assert not cut
    else:
        assert equal(got, ONE)
        assert "state.npz is damaged" in remark


def test_a_kill_between_the_two_names_loses_one_save_and_both_damaged_start_over(tmp_path: Path):
    path = tmp_path / "state.npz"
    save_state(path, ONE)
    save_state(path, TWO)
    path.unlink()
    got, remark = load_state(path)
    assert equal(got, ONE)
    assert remark == ""
    path.write_bytes(b"")
    (tmp_path / "state.before.npz").write_bytes(b"PK")
    assert load_state(path)[0] is None


def test_states_without_a_seal_are_read(tmp_path: Path):
    np.savez(tmp_path / "state.npz", **ONE)
    assert equal(load_state(tmp_path / "state.npz")[0], ONE)
