"""Files behind URLs: copied whole, named by their version, refused with the URL."""

from __future__ import annotations

import json

import fsspec
import pytest

from gradsift.data import remote
from gradsift.data.pool import open_source, read_pool
from gradsift.errors import DataError
from gradsift.recipe import SourceConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    return tmp_path / "cache"


def put(name: str, rows: list[dict]) -> str:
    with fsspec.open(f"memory://{name}", "wb") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return f"memory://{name}"


def copies(cache) -> list[str]:
    return sorted(path.name for path in (cache / "remote").iterdir())


def test_a_url_reads_as_the_file_behind_it(tmp_path, cache):
    rows = [{"text": "a"}, {"text": "b"}, {"text": "a"}]
    url = put("deep/rows.jsonl", rows)
    (tmp_path / "rows.jsonl").write_bytes(fsspec.filesystem("memory").cat("/deep/rows.jsonl"))
    near, far, file = (
        read_pool([SourceConfig(label="x", path=path)])
        for path in (str(tmp_path / "rows.jsonl"), url, f"file://{tmp_path}/rows.jsonl")
    )
    for pool in (far, file):
        assert list(pool.index) == list(near.index)
        assert [pool.raw(i) for i in range(3)] == [near.raw(i) for i in range(3)]
        assert pool.files[0].sha256 == near.files[0].sha256
    assert far.files[0].path == url
    assert far.rows[2].reason == f"exact copy of row 0 of {url}"
    assert len(copies(cache)) == 1  # file:// needs none


def test_a_copy_serves_until_the_file_changes(cache, monkeypatch):
    url = put("rows.jsonl", [{"text": "a"}])
    fetched = []
    real = remote._fetch
    monkeypatch.setattr(remote, "_fetch", lambda *a: fetched.append(1) or real(*a))
    for _ in range(2):
        assert len(open_source(url).rows) == 1
    assert len(fetched) == 1
    put("rows.jsonl", [{"text": "a"}, {"text": "b"}])
    assert len(open_source(url).rows) == 2
    assert len(fetched) == 2
    # A store that names no version is asked every time.
    monkeypatch.setattr(remote, "VERSIONS", ())
    for _ in range(2):
        assert len(open_source(url).rows) == 2
    assert len(fetched) == 4


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("memory://absent.jsonl", "cannot be fetched"),
        ("nonsense://a.jsonl", "cannot be fetched"),
        ("memory://dir", "a folder, not a file"),
        ("zip://a.jsonl::memory://a.zip", "never unpacked"),
        ("memory://rows.txt", "kind of file is not known"),
        ("memory://rows.jsonl.gz", "never unpacked"),
        ("file:///absent/rows.jsonl", "does not exist"),
    ],
)
def test_refusals_name_the_url(cache, url, what):
    put("dir/inner.jsonl", [{"text": "a"}])
    put("rows.txt", [])
    put("rows.jsonl.gz", [])
    with pytest.raises(DataError, match=what) as raised:
        open_source(url)
    assert raised.value.where == url
    assert raised.value.do


def test_a_transfer_that_breaks_leaves_no_copy(cache, monkeypatch):
    url = put("rows.jsonl", [{"text": "a"}] * 9)
    files = fsspec.filesystem("memory")

    def short(path, target, **_):
        with open(target, "wb") as file:
            file.write(files.cat(path)[:-5])

    with monkeypatch.context() as patch:
        patch.setattr(type(files), "get_file", lambda self, path, target, **_: short(path, target))
        with pytest.raises(DataError, match="did not arrive whole"):
            open_source(url)
    assert copies(cache) == []
    assert len(open_source(url).rows) == 9
