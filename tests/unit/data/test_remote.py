"""Files behind URLs: copied whole, named by their version, refused with the URL."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from gradsift.data import remote
from gradsift.data.pool import open_source, read_pool
from gradsift.errors import ConfigError, DataError
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
    return sorted(path.name for path in (cache / "remote").iterdir() if path.suffix != ".lock")


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


def test_a_secret_in_a_url_is_refused_wherever_it_is_opened(cache):
    with pytest.raises(ConfigError, match="secret"):
        open_source("http://user:CANARY@127.0.0.1/rows.jsonl")


@pytest.fixture
def served(tmp_path):
    """A folder behind a server that dates its files and gives no entity tags; also the answers to GET."""
    answered = []
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            if self.command == "GET":
                answered.append(self.path)

    handler = functools.partial(Quiet, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}", answered
        server.shutdown()


def test_a_date_that_a_server_gives_is_a_version(cache, served):
    folder, url, answered = served
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    for _ in range(2):
        assert len(open_source(f"{url}/rows.jsonl").rows) == 1
    assert len(answered) == 1
    (folder / "rows.jsonl").write_text('{"text": "b"}\n')
    os.utime(folder / "rows.jsonl", (1e9, 1e9))
    assert open_source(f"{url}/rows.jsonl").rows.line(0) == b'{"text": "b"}'
    assert len(answered) == 2


def test_a_plain_query_is_no_part_of_the_ending(cache, served):
    folder, url, _ = served
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    assert len(open_source(f"{url}/rows.jsonl?download=true").rows) == 1
    assert [name.partition(".")[2] for name in copies(cache)] == ["jsonl"]


def test_a_copy_in_use_is_left_alone(cache, monkeypatch):
    monkeypatch.setattr(remote, "VERSIONS", ())  # as where a store names no version
    url = put("rows.jsonl", [{"text": "a"}])
    first = open_source(url).rows
    again = open_source(url).rows
    assert again.path == first.path
    put("rows.jsonl", [{"text": "b"}, {"text": "c"}])
    changed = open_source(url).rows
    for rows, text in ((first, b"a"), (again, b"a"), (changed, b"b")):
        assert rows.line(0) == b'{"text": "%s"}' % text
        assert len(list(rows.parsed())) == len(rows)


def test_of_several_at_once_one_fetches(cache, monkeypatch):
    url = put("rows.jsonl", [{"text": "a"}])
    fetched = []
    real = remote._fetch

    def slow(*arguments):
        fetched.append(1)
        time.sleep(0.2)
        real(*arguments)

    monkeypatch.setattr(remote, "_fetch", slow)
    with ThreadPoolExecutor(4) as pool:
        assert [len(opened.rows) for opened in pool.map(open_source, [url] * 4)] == [1] * 4
    assert len(fetched) == 1
