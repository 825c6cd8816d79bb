"""The pool: ids, copies, statuses, counts."""

from __future__ import annotations

import hashlib
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsift.data.lines import to_line
from gradsift.data.pool import Pool, read_pool, require_usable
from gradsift.errors import DataError
from gradsift.recipe import SourceConfig
from gradsift.types import RowStatus

# The machine may be shared: wall time says nothing about a row.
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
extra = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)
call = st.fixed_dictionaries(
    {
        "function": st.fixed_dictionaries(
            {"name": st.text(), "arguments": st.text() | st.dictionaries(st.text(), st.integers())}
        )
    }
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.text()},
    optional={"tool_calls": st.lists(call, max_size=2)},
)
shaped = st.one_of(
    st.fixed_dictionaries({"text": st.text()}, optional={"meta": extra}),
    st.fixed_dictionaries({"prompt": st.text(), "completion": st.text()}, optional={"x": extra}),
    st.fixed_dictionaries({"messages": st.lists(message, max_size=3)}, optional={"tools": extra, "x": extra}),
    st.dictionaries(st.sampled_from(["text", "messages", "prompt", "id "]), extra),
)
literal = st.sampled_from(
    [
        b'{"text":"a","x":1e400}',
        b'{"text":"a", "x": 1.0}',
        b'{"text":"\\ud800"}',
        b'{"x":123456789012345678901234567890,"text":"b"}',
        b'{"text":"c"}\r',
        b'  {"text":"c"}',
        b"",
        b" ",
        b"{",
        b"\xff",
        b"[]",
        b'{"text":""}',
        b'{"text":"a","text":"b"}',
    ]
)
raw_line = (
    literal
    | st.binary(max_size=12).map(lambda b: b.replace(b"\n", b""))
    | st.tuples(shaped, st.booleans()).map(lambda t: dumps(*t))
)


def dumps(row: dict, ascii_only: bool) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=ascii_only).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(row).encode("ascii")


def pool_of(folder, *files: list, **kwargs) -> Pool:
    sources = []
    for i, rows in enumerate(files):
        path = folder / f"f{i}.jsonl"
        body = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in body))
        sources.append(SourceConfig(label=f"s{i}", path=str(path)))
    return read_pool(sources, **kwargs)


def digest(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=16).hexdigest()


@relaxed
@given(st.lists(raw_line, max_size=8), st.integers(0, 8), st.randoms(), st.sampled_from(["drop", "keep"]))
def test_bytes_ids_and_counts(tmp_path_factory, rows, cut, rnd: random.Random, dedup):
    folder = tmp_path_factory.mktemp("p")
    files = [[b'{"text":"first"}', *rows[:cut]], [b'{"text":"second"}', *rows[cut:]]]
    pool = pool_of(folder, *files, dedup=dedup)
    everything = files[0] + files[1]
    assert [pool.raw(i) for i in range(len(pool.rows))] == everything
    assert sum(pool.counts.values()) == len(everything) == sum(file.num_rows for file in pool.files)
    assert len(pool.index) == len(everything)
    for row, line in zip(pool.rows, everything, strict=True):
        # The slow twin of identity: count equal lines before this one.
        before = everything[: pool.index[row.id]].count(line)
        assert row.id == digest(line) + (f"-{before + 1}" if before else "")
        assert row.copy_of == (digest(line) if before else None)
        assert (row.status is RowStatus.DUPLICATE) == (before > 0 and dedup == "drop")
        assert (row.example is not None) >= (row.status is RowStatus.OK)
        assert (row.reason == "") == (row.status is RowStatus.OK)
        assert row.example is None or row.example.id == row.id
        row.reason.encode("utf-8")
    shuffled = list(rows)
    rnd.shuffle(shuffled)
    other = tmp_path_factory.mktemp("q")  # rows stay in their files
    again = pool_of(other, [files[0][0], *shuffled[:cut]], [files[1][0], *shuffled[cut:]], dedup=dedup)
    facts = [sorted((r.id, r.status, p.raw(i)) for i, r in enumerate(p.rows)) for p in (pool, again)]
    assert facts[0] == facts[1]


@relaxed
@given(st.lists(st.integers(0, 3), max_size=12))
def test_keep_gives_copies_the_status_and_columns_of_the_first(tmp_path_factory, picks):
    kinds = [b'{"text":"a"}', b"{", b'{"text":""}', b'{"prompt":"p","completion":"c"}']
    pool = pool_of(tmp_path_factory.mktemp("p"), [kinds[i] for i in picks], dedup="keep")
    for row in pool.rows:
        first = pool.rows[pool.index[row.copy_of or row.id]]
        assert first.status is row.status
        assert (first.example and first.example.fields) == (row.example and row.example.fields)


def test_statuses_by_hand(tmp_path):
    pool = pool_of(
        tmp_path,
        [{"text": "a"}, {"text": "a"}, b"", {"messages": [U, A], "id": 7}, {"text": 5}, {"text": 5}],
        [{"text": "a"}, {"id": "x", "text": " "}],
    )
    assert [row.status.value for row in pool.rows] == [
        "OK",
        "DUPLICATE",
        "EMPTY",
        "OK",
        "MALFORMED",
        "DUPLICATE",
        "DUPLICATE",
        "EMPTY",
    ]
    assert [(row.source, row.row) for row in pool.rows] == [("s0", i) for i in range(6)] + [("s1", 0), ("s1", 1)]
    assert pool.rows[6].reason == f"exact copy of row 0 of {pool.files[0].path}"
    assert pool.rows[6].example.fields == {"text": "a"}
    assert pool.rows[5].example is None
    assert [pool.rows[i].id for i in (3, 7)] == ["7", "x"]
    assert pool.files[0].shapes == {"messages": 1, "text": 4}
    assert pool.files[1].shapes == {"text": 2}
    assert pool.counts == {"OK": 2, "DUPLICATE": 3, "EMPTY": 2, "MALFORMED": 1}


@pytest.mark.parametrize("given_id", [1.5, True, [1], {"a": 1}, "", "\ud800"])
def test_odd_ids_are_malformed(tmp_path, given_id):
    row = pool_of(tmp_path, [{"id": given_id, "text": "a"}]).rows[0]
    assert row.status is RowStatus.MALFORMED
    assert row.reason.startswith("id ")
    assert row.id == digest(json.dumps({"id": given_id, "text": "a"}).encode())


@pytest.mark.parametrize("given_id", [0, -5, 2**70, "../../etc/passwd", "\x1b[31m", " ", "a\nb\x00", "é" * 500])
def test_weird_ids_are_kept(tmp_path, given_id):
    assert pool_of(tmp_path, [{"id": given_id, "text": "a"}]).rows[0].id == str(given_id)


def test_a_null_id_is_no_id(tmp_path):
    rows = pool_of(tmp_path, [{"id": None, "text": "a"}, {"id": None, "text": "b"}]).rows
    assert [len(row.id) for row in rows] == [32, 32]


@pytest.mark.parametrize(
    "files",
    [
        [[{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]],
        [[{"id": "a", "text": "x"}], [{"id": "a", "text": "x"}]],  # an exact copy repeats the id too
        [[{"id": 1, "text": "x"}], [{"id": "1", "text": ""}]],
        [[{"id": 1, "text": "x"}], [{"id": 1, "wrong": "y"}]],
    ],
)
@pytest.mark.parametrize("dedup", ["drop", "keep"])
def test_repeated_given_ids_are_refused_naming_both_places(tmp_path, files, dedup):
    with pytest.raises(DataError, match="given twice") as error:
        pool_of(tmp_path, *files, dedup=dedup)
    last = len(files) - 1
    assert error.value.where.startswith(
        f"row 0 of {tmp_path / 'f0.jsonl'} and row {1 - last} of {tmp_path / f'f{last}.jsonl'}"
    )


def test_given_ids_that_equal_generated_ones_are_refused(tmp_path):
    line = b'{"text":"x"}'
    for taken, rows in ((digest(line), [line]), (f"{digest(line)}-2", [line, line])):
        for body in ([{"id": taken, "text": "y"}, *rows], [*rows, {"id": taken, "text": "y"}]):
            with pytest.raises(DataError, match="equals a generated one"):
                pool_of(tmp_path, body)


def test_one_rule_of_identity_for_all_kinds(tmp_path):
    rows = [{"text": "a", "n": "1"}, {"text": "bé", "n": "2"}]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(map(to_line, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False), "utf-8")
    (tmp_path / "a.csv").write_text("text,n\na,1\nbé,2\n", "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    names = ["a.jsonl", "a.json", "a.csv", "a.parquet"]
    pool = read_pool([SourceConfig(label="x", path=str(tmp_path / name)) for name in names])
    assert [file.kind for file in pool.files] == ["jsonl", "json", "csv", "parquet"]
    assert [row.status.value for row in pool.rows] == ["OK"] * 2 + ["DUPLICATE"] * 6
    assert {pool.raw(i) for i in (0, 2, 4, 6)} == {to_line(rows[0])}
    assert [row.id.partition("-")[2] for row in pool.rows] == ["", "", "2", "2", "3", "3", "4", "4"]


def test_an_unreadable_csv_row_is_no_original_of_a_good_row(tmp_path):
    # The one cell of the bad row reads like a good JSON line.
    (tmp_path / "a.csv").write_text('text,k\n{"text":1}\n')
    (tmp_path / "b.jsonl").write_text('{"text":1}\n')
    pool = read_pool([SourceConfig(label="x", path=str(tmp_path / name)) for name in ("a.csv", "b.jsonl")])
    assert [row.copy_of for row in pool.rows] == [None, None]
    assert "cells" in pool.rows[0].reason
    assert pool.rows[1].reason == "text is a number, not a string"
    assert pool.rows[1].id == pool.rows[0].id + "-2"


def test_tables_with_given_ids_are_not_written_out_to_be_read(tmp_path, monkeypatch):
    from gradsift.data import tables

    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "a.parquet")
    calls = []
    real = tables.TableRows.line
    monkeypatch.setattr(tables.TableRows, "line", lambda self, row: calls.append(row) or real(self, row))
    pool = read_pool([SourceConfig(label="x", path=str(tmp_path / "a.parquet"))])
    assert calls == []
    assert [pool.raw(1), calls] == [b'{"id":2,"text":"b"}', [1]]


def test_format_is_forced_on_every_row(tmp_path):
    pool = pool_of(
        tmp_path, [{"text": "a", "prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}], fmt="text"
    )
    assert [row.status.value for row in pool.rows] == ["OK", "MALFORMED"]
    assert "'text' is missing" in pool.rows[1].reason


def test_require_usable(tmp_path):
    require_usable(pool_of(tmp_path, [{"text": "a"}, b"{"]))
    with pytest.raises(DataError, match="no row of the pool") as error:
        require_usable(pool_of(tmp_path, [b"{", b"{", b""]))
    assert "1 MALFORMED, 1 DUPLICATE, 1 EMPTY" in error.value.got
    with pytest.raises(DataError, match="0 rows"):
        require_usable(pool_of(tmp_path, []))


def test_raw_refuses_positions_outside(tmp_path):
    pool = pool_of(tmp_path, [{"text": "a"}], [], [{"text": "b"}])
    assert pool.raw(1) == b'{"text": "b"}'
    for position in (-1, 2):
        with pytest.raises(IndexError):
            pool.raw(position)


UGLY = {
    "blank line": (b"", "EMPTY"),
    "spaces": (b"   ", "EMPTY"),
    "empty object": (b"{}", "MALFORMED"),
    "empty text": (b'{"text":""}', "EMPTY"),
    "blank text": (b'{"text":" \\n\\t"}', "EMPTY"),
    "no messages": (b'{"messages":[]}', "EMPTY"),
    "blank completion": (b'{"prompt":"p","completion":" "}', "EMPTY"),
    "blank turns": (b'{"messages":[{"role":"user","content":""}]}', "EMPTY"),
    "user alone": (b'{"messages":[{"role":"user","content":"q"}]}', "OK"),
    "one character": (b'{"text":"a"}', "OK"),
    "1 MB line": (b'{"text":"' + b"a b " * 250_000 + b'"}', "OK"),
    "NUL byte": (b'{"text":"a\x00"}', "MALFORMED"),
    "escaped NUL": (b'{"text":"a\\u0000"}', "OK"),
    "lone surrogate escape": (b'{"text":"\\ud800"}', "OK"),
    "lone surrogate bytes": (b'{"text":"\xed\xa0\x80"}', "MALFORMED"),
    "invalid UTF-8": (b'{"text":"\xff"}', "MALFORMED"),
    "right to left": ('{"text":"\u202e\u05d0\u05d1"}'.encode(), "OK"),
    "text is a number": (b'{"text":5}', "MALFORMED"),
    "content is a number": (b'{"messages":[{"role":"user","content":5}]}', "MALFORMED"),
    "messages is a string": (b'{"messages":"[]"}', "MALFORMED"),
    "not an object": (b'["text"]', "MALFORMED"),
    "not JSON": (b"text", "MALFORMED"),
    "cut off": (b'{"text":"a', "MALFORMED"),
    "two objects": (b'{"text":"a"}{"text":"b"}', "MALFORMED"),
    "deep nesting": (b'{"text":"a","x":' + b"[" * 3000 + b"]" * 3000 + b"}", "MALFORMED"),
    "repeated keys": (b'{"text":"a","text":"b"}', "MALFORMED"),
    "missing completion": (b'{"prompt":"p"}', "MALFORMED"),
    "missing role": (b'{"messages":[{"content":"q"}]}', "MALFORMED"),
    "huge number": (b'{"text":"a","x":' + b"9" * 10_000 + b"}", "MALFORMED"),
    "NaN in an extra column": (b'{"text":"a","x":NaN}', "OK"),
    "overflowing float": (b'{"text":"a","x":1e999}', "OK"),
    "carriage return": (b'{"text":"r"}\r', "OK"),
    "id of a wrong type": (b'{"id":[],"text":"a"}', "MALFORMED"),
    "terminal escape": (b'{"text":"\\u001b[2J"}', "OK"),
    "image part": (b'{"messages":[{"role":"user","content":[{"type":"image"}]}]}', "MALFORMED"),
    "null text": (b'{"text":null}', "MALFORMED"),
}


def test_ugly_rows_each_get_one_status(tmp_path):
    pool = pool_of(tmp_path, [line for line, _ in UGLY.values()])
    found = dict(zip(UGLY, (row.status.value for row in pool.rows), strict=True))
    assert found == {name: status for name, (_, status) in UGLY.items()}
    assert sum(pool.counts.values()) == len(UGLY)
