"""Rows back out: bytes, values, schemas, and what happens when the disk is full."""

from __future__ import annotations

import datetime
import decimal
import errno
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsift.data.export import write_selected
from gradsift.data.lines import to_line
from gradsift.data.pool import Pool, read_pool
from gradsift.errors import DiskFullError
from gradsift.recipe import SourceConfig

# The machine may be shared: wall time says nothing about a row.
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

extra = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)
rows_in = st.lists(
    st.dictionaries(st.text(max_size=3).filter(lambda k: k not in ("id", "text")), extra, max_size=3),
    min_size=1,
    max_size=5,
)


def read(*paths) -> Pool:
    return read_pool([SourceConfig(label=f"s{i}", path=str(path)) for i, path in enumerate(paths)], dedup="keep")


@relaxed
@given(rows_in, st.randoms(), st.booleans(), st.sampled_from([b"", b"\r", b"  "]))
def test_jsonl_rows_come_out_byte_for_byte(tmp_path_factory, rows, rnd, ascii_only, tail):
    folder = tmp_path_factory.mktemp("e")
    lines = [json.dumps({"text": "t", **row}, ensure_ascii=True).encode() + tail for row in rows]
    if not ascii_only:
        lines = [to_line(json.loads(line)) + tail for line in lines]
    lines += [b'{"text":"x", "a":1e400,"b": 1.0, "c":-0}', b'{"x":"\\ud83d","text":"y"}']
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    pool = read(folder / "a.jsonl")
    order = list(range(len(lines)))
    rnd.shuffle(order)
    order = order[: max(1, len(order) - 1)]
    done = write_selected(pool, [pool.rows[i].id for i in order], folder / "out")
    assert done.paths == (folder / "out" / "selected.jsonl",)
    assert done.notes == ()
    assert done.paths[0].read_bytes() == b"".join(lines[i] + b"\n" for i in order)


def test_files_of_mixed_kinds_come_out_as_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text" : "a", "tool_calls": [{"x": 1}]}\r\n')
    (tmp_path / "b.json").write_text('[\n {"text": "b", "x": 1e400}\n]')
    (tmp_path / "c.csv").write_text('text,n\n"c\nd",1\n')
    pq.write_table(pa.table({"text": ["e"], "t": pa.array([0], pa.timestamp("us", "UTC"))}), tmp_path / "d.parquet")
    pool = read(*(tmp_path / name for name in ("a.jsonl", "b.json", "c.csv", "d.parquet")))
    out = tmp_path / "out"
    out.mkdir()
    (out / "selected.parquet").write_bytes(b"an earlier selection")
    done = write_selected(pool, [row.id for row in pool.rows[::-1]], out)
    assert done.paths[0].read_bytes().split(b"\n") == [
        b'{"text":"e","t":"1970-01-01T00:00:00.000000Z"}',
        b'{"text":"c\\nd","n":"1"}',
        b'{"text":"b","x":1e400}',
        b'{"text" : "a", "tool_calls": [{"x": 1}]}\r',
        b"",
    ]
    assert sorted(p.name for p in out.iterdir()) == ["selected.jsonl"]


cell_types = {
    "when": (pa.timestamp("us", "UTC"), st.none() | st.datetimes(timezones=st.just(datetime.UTC))),
    "blob": (pa.binary(), st.none() | st.binary(max_size=5)),
    "cost": (pa.decimal128(12, 2), st.none() | st.decimals(-(10**9), 10**9, places=2)),
    "day": (pa.date32(), st.none() | st.dates()),
    "n": (pa.int32(), st.none() | st.integers(-(2**31), 2**31 - 1)),
    "f": (pa.float32(), st.none() | st.floats(width=32, allow_nan=False)),
    "messages": (
        pa.list_(
            pa.struct(
                {
                    "role": pa.string(),
                    "content": pa.string(),
                    "tool_calls": pa.list_(pa.struct({"name": pa.string(), "at": pa.timestamp("ns")})),
                }
            )
        ),
        st.just(
            [
                {"role": "user", "content": "q", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "at": None}]},
            ]
        ),
    ),
}
table_rows = st.lists(
    st.fixed_dictionaries({name: values for name, (_, values) in cell_types.items()}), min_size=1, max_size=5
)


@relaxed
@given(table_rows, st.randoms(), st.sampled_from(["parquet", "arrow"]), st.booleans())
def test_tables_come_out_with_equal_schema_and_values(tmp_path_factory, rows, rnd, kind, two_files):
    folder = tmp_path_factory.mktemp("e")
    schema = pa.schema({name: cell for name, (cell, _) in cell_types.items()}, metadata={"k": "v"})
    whole = pa.Table.from_pylist(rows, schema=schema)
    paths = []
    for i, table in enumerate([whole.slice(0, 2), whole.slice(2)] if two_files else [whole]):
        paths.append(folder / f"{i}.{kind}")
        if kind == "parquet":
            pq.write_table(table, paths[-1])
        else:
            with pa.ipc.new_file(paths[-1], schema) as writer:
                writer.write_table(table)
    pool = read(*paths)
    order = list(range(len(rows)))
    rnd.shuffle(order)
    order = order[: max(1, len(order) - 1)]
    done = write_selected(pool, [pool.rows[i].id for i in order], folder / "out")
    assert [p.name for p in done.paths] == ["selected.jsonl", "selected.parquet"]
    assert done.notes == ()
    back = pq.ParquetFile(done.paths[1]).read()
    assert back.schema.equals(schema, check_metadata=False)
    assert back.schema.metadata[b"k"] == b"v"
    assert back.to_pylist() == [whole.to_pylist()[i] for i in order]
    lines = done.paths[0].read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["n"] for line in lines] == [rows[i]["n"] for i in order]
    assert [json.loads(line)["cost"] for line in lines] == [
        None if rows[i]["cost"] is None else str(decimal.Decimal(rows[i]["cost"]).quantize(decimal.Decimal("0.01")))
        for i in order
    ]


def test_schemas_are_unified_with_nulls(tmp_path):
    first = pa.table({"messages": [[{"role": "user", "content": "a"}]], "n": pa.array([1], pa.int32())})
    second = pa.table(
        {"messages": [[{"role": "user", "content": "b", "name": "z"}]], "k": ["k"], "n": pa.array([None], pa.null())}
    )
    pq.write_table(first.replace_schema_metadata({"huggingface": "stale"}), tmp_path / "a.parquet")
    pq.write_table(second, tmp_path / "b.parquet")
    pool = read(tmp_path / "a.parquet", tmp_path / "b.parquet")
    done = write_selected(pool, [pool.rows[1].id, pool.rows[0].id], tmp_path)
    assert done.notes == ()
    back = pq.ParquetFile(done.paths[1]).read()
    assert back.to_pylist() == [
        {"messages": [{"role": "user", "content": "b", "name": "z"}], "n": None, "k": "k"},
        {"messages": [{"role": "user", "content": "a", "name": None}], "n": 1, "k": None},
    ]
    assert back.schema.field("n").type == pa.int32()
    assert back.schema.metadata is None


def test_schemas_that_cannot_be_unified_are_a_note(tmp_path):
    big = 2**53 + 1  # no float64 holds it
    cases = [(pa.array(["x"]), pa.array([1])), (pa.array([big]), pa.array([0.5])), (pa.array(["x"]), pa.array([b"y"]))]
    for left, right in cases:
        pq.write_table(pa.table({"text": ["a"], "v": left}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"text": ["b"], "v": right}), tmp_path / "b.parquet")
        pool = read(tmp_path / "a.parquet", tmp_path / "b.parquet")
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "selected.parquet").write_bytes(b"old")
        done = write_selected(pool, [row.id for row in pool.rows], tmp_path / "out")
        assert [p.name for p in done.paths] == ["selected.jsonl"]
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["selected.jsonl"]
        assert [note.code for note in done.notes] == ["no_parquet"]
        assert len(done.paths[0].read_bytes().splitlines()) == 2


def test_types_that_parquet_lacks_are_a_note(tmp_path):
    table = pa.table(
        {
            "text": ["a"],
            "s": pa.array([1], pa.timestamp("s")),
            "j": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[1]"])),
        }
    )
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    pool = read(tmp_path / "a.arrow")
    done = write_selected(pool, [pool.rows[0].id], tmp_path / "out")
    assert [note.code for note in done.notes] == ["parquet_types"]
    assert "s: timestamp[s] is stored as timestamp[ms]" in done.notes[0].text
    assert done.notes[0].count == 1
    back = pq.ParquetFile(done.paths[1]).read()
    assert back.schema.field("j").type == pa.json_()
    assert json.loads(done.paths[0].read_bytes()) == {"text": "a", "s": "1970-01-01T00:00:01", "j": [1]}


def test_wrong_ids_are_our_mistake(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id":"a","text":"x"}\n{"id":"b"}\n')
    pool = read(tmp_path / "a.jsonl")
    for ids, text in ((["a", "a"], "twice"), (["z"], "unknown"), (["b"], "MALFORMED")):
        with pytest.raises(ValueError, match=text):
            write_selected(pool, ids, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_selection_is_written(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    done = write_selected(read(tmp_path / "a.parquet"), [], tmp_path)
    assert done.paths[0].read_bytes() == b""
    back = pq.ParquetFile(done.paths[1]).read()
    assert (back.num_rows, back.column_names) == (0, ["text", "n"])


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"x"}\n')
    pool = read(tmp_path / "a.jsonl")
    done = write_selected(pool, [pool.rows[0].id], tmp_path / "out")
    before = done.paths[0].read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        write_selected(pool, [], tmp_path / "out")
    assert done.paths[0].read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["selected.jsonl"]
