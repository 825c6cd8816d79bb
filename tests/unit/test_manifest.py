from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import DiskFullError, StoreError
from gradsift.manifest import (
    canonical_json,
    git_sha,
    hash_parts,
    seal,
    sha256_bytes,
    sha256_file,
    unseal,
    versions,
    write_bytes_atomic,
    write_json_atomic,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
@settings(max_examples=40)
def test_canonical_json_reads_back(value):
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), json_values, max_size=4))
@settings(max_examples=40)
def test_canonical_json_forgets_the_order_of_keys(value):
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


@pytest.mark.parametrize("bad", [{1: "a"}, {"a": {None: 1}}, {"a": [{True: 1}]}, {"a": object()}])
def test_canonical_json_refuses_what_json_would_change(bad):
    with pytest.raises(TypeError):
        canonical_json(bad)


def test_canonical_json_refuses_nan():
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


@given(st.dictionaries(st.text().filter(lambda k: k != "seal"), json_values, max_size=4), st.data())
@settings(max_examples=60)
def test_a_seal_breaks_at_any_flipped_bit_or_cut(value, data):
    good = seal(value)
    assert unseal(good) == json.loads(canonical_json(value))
    at = data.draw(st.integers(0, len(good) * 8 - 1))
    flipped = bytearray(good)
    flipped[at // 8] ^= 1 << at % 8
    assert unseal(bytes(flipped)) is None
    assert unseal(good[: at // 8]) is None


@given(st.lists(st.binary(max_size=4), max_size=5), st.lists(st.binary(max_size=4), max_size=5))
def test_hash_parts_tells_framings_apart(a, b):
    assert (hash_parts(a) == hash_parts(b)) == (a == b)


def test_sha256_matches_hashlib(tmp_path):
    data = os.urandom(3 * (1 << 20) + 17)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
    with pytest.raises(StoreError, match="absent"):
        sha256_file(tmp_path / "absent")


def test_json_is_published_whole_with_private_mode(tmp_path):
    write_json_atomic(tmp_path / "m.json", {"b": 1, "a": [1, 2]})
    write_json_atomic(tmp_path / "m.json", {"b": 2})
    assert json.loads((tmp_path / "m.json").read_text()) == {"b": 2}
    assert (tmp_path / "m.json").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EIO, StoreError)]
)
def test_a_failing_disk_leaves_the_old_file_and_no_leftovers(tmp_path, monkeypatch, call, code, kind):
    path = tmp_path / "kept.json"
    write_bytes_atomic(path, b"old")
    calls = []

    def fail(*args):
        calls.append(args)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError) as caught:
            write_bytes_atomic(path, b"a new value")
    assert type(caught.value) is kind
    assert len(calls) == 1, "a failed call must not be tried again"
    assert "kept.json" in caught.value.where
    assert "11 bytes" in caught.value.expected
    assert caught.value.exit_code == (28 if kind is DiskFullError else 1)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    whole = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: whole(handle, bytes(data[:3])))
    write_bytes_atomic(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_versions_name_the_packages_without_importing_them():
    code = (
        "import sys; from gradsift.manifest import versions; v = versions(); print(sorted(v), 'torch' in sys.modules);"
        "assert all(v.values())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['gradsift', 'numpy', 'python', 'torch', 'transformers'] False"
    assert versions()["numpy"][0].isdigit()


def test_git_sha(tmp_path: Path):
    assert git_sha(tmp_path / "absent") is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_sha(tmp_path) is None, "no commit yet"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert len(git_sha(tmp_path)) == 40


def test_outside_a_work_tree_the_commit_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADSIFT_COMMIT", "ab" * 20)
    assert git_sha(tmp_path) == "ab" * 20
    monkeypatch.setenv("GRADSIFT_COMMIT", "main")
    assert git_sha(tmp_path) is None
