"""Files to rows: every kind, ugly lines, whole files that are refused, the hub's cache."""

from __future__ import annotations

import datetime
import decimal
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsift.data.lines import MAX_DEPTH, parse_line, to_line
from gradsift.data.pool import open_source
from gradsift.data.readers import ARCHIVE_MARKS, UTF16_MARKS
from gradsift.errors import DataError

# The machine may be shared: wall time says nothing about a row.
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
json_rows = st.dictionaries(st.text(), json_values, max_size=4)


def values(path: Path) -> list:
    return [parsed.value for parsed in open_source(str(path)).rows.parsed()]


def problems(path: Path) -> list[str]:
    return [parsed.problem for parsed in open_source(str(path)).rows.parsed()]


def lines(path: Path) -> list[bytes]:
    rows = open_source(str(path)).rows
    return [rows.line(i) for i in range(len(rows))]


# One line


@relaxed
@given(json_rows, st.booleans())
def test_parse_line_reads_what_json_reads(row, ascii_only):
    line = json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    parsed = parse_line(line)
    if not ascii_only and any("\ud800" <= c <= "\udfff" for c in json.dumps(row, ensure_ascii=False)):
        assert "UTF-8" in parsed.problem
    else:
        assert parsed.value == json.loads(json.dumps(row))


@relaxed
@given(
    st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789.eE+-\\utrnalsfNI \x00', max_size=40).map(str.encode)
)
def test_parse_line_never_raises(line):
    parsed = parse_line(line)
    assert [parsed.value is not None, bool(parsed.problem), parsed.blank].count(True) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": "a\x00b"}', "NUL"),
        (b'{"text": "a"', "not JSON"),
        (b"{'text': 'a'}", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'{"text": "a\tb"}', "not JSON"),
        (b'\xef\xbb\xbf{"text": "a"}', "not JSON"),
        (b"[1]", "JSON list"),
        (b'"a"', "JSON string"),
        (b"null", "JSON null"),
        (b"5", "JSON number"),
        (b"true", "JSON boolean"),
        (b'{"text": "a", "text": "b"}', "'text' stands twice"),
        (b'{"text": "a", "x": {"k": 1, "k": 1}}', "'k' stands twice"),
        (b'{"n": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested deeper"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested deeper"),
    ],
)
def test_malformed_lines(line, reason):
    assert reason in parse_line(line).problem


def test_depth_is_counted_not_brackets():
    assert parse_line(b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}").value is not None
    assert parse_line(json.dumps({"a": [{}] * 500, "text": "{" * 500}).encode()).value is not None


def test_tolerated_lines():
    assert parse_line(b'{"text": "a"}\r').value == {"text": "a"}
    assert parse_line(b'{"x": NaN, "y": -Infinity}').value is not None
    assert parse_line(b'{"x": "\\ud800"}').value == {"x": "\ud800"}
    assert all(parse_line(blank).blank for blank in (b"", b" \t", b"\r"))


@relaxed
@given(json_rows)
def test_to_line_is_one_line_of_equal_value(row):
    line = to_line(row)
    assert b"\n" not in line
    assert parse_line(line).value == row


# JSON Lines

raw_lines = st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")) | json_rows.map(to_line), max_size=6)


@relaxed
@given(raw_lines, st.booleans(), st.booleans())
def test_jsonl_lines_are_the_bytes_of_the_file(tmp_path_factory, rows, marked, ended):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    if rows and rows[0].startswith((*ARCHIVE_MARKS, *UTF16_MARKS)):
        rows[0] = b""
    body = b"\n".join(rows) + (b"\n" if ended and rows else b"")
    path.write_bytes((b"\xef\xbb\xbf" if marked else b"") + body)
    expected = body.split(b"\n")
    if expected[-1] == b"":
        expected.pop()  # a final newline ends the last row, it does not start one
    if expected and not marked:
        expected[0] = expected[0].removeprefix(b"\xef\xbb\xbf")
    opened = open_source(str(path))
    assert lines(path) == expected
    assert (opened.kind, len(opened.rows)) == ("jsonl", len(expected))
    assert opened.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_jsonl_splits_at_newlines_alone(tmp_path):
    path = tmp_path / "a.ndjson"
    rows = ['{"text": "a\u2028b\u0085c"}'.encode(), b'{"text":"x"}\r', b"", b'{"text":"y"}']
    path.write_bytes(b"\n".join(rows))
    assert lines(path) == rows


# JSON


@relaxed
@given(st.lists(json_rows, max_size=5), st.sampled_from([None, 1, "\t"]), st.booleans())
def test_json_rows_have_equal_values(tmp_path_factory, rows, indent, ascii_only):
    path = tmp_path_factory.mktemp("j") / "a.json"
    try:
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), "utf-8")
    except UnicodeEncodeError:
        path.write_text(json.dumps(rows, indent=indent), "utf-8")
    assert values(path) == rows
    assert all(b"\n" not in line for line in lines(path))


def test_json_keeps_literals_and_drops_blanks_outside_strings(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(
        b'\xef\xbb\xbf [ {"x" : 1e400,\n "y":\t1.50, "s" : "a \\" , b" } ,\r\n {"n": ' + b"9" * 5000 + b"}, 7 ]\n"
    )
    assert lines(path)[0] == b'{"x":1e400,"y":1.50,"s":"a \\" , b"}'
    assert problems(path)[1:] == ["a number has too many digits to be read", "the row is a JSON number, not an object"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"data": []}',
        b'{"text": "a"}\n{"text": "b"}',
        b"[{}",
        b"[{},]",
        b"[{} {}]",
        b"[{}] x",
        b"[,]",
        b'["\xff"]',
        b"[" * 100000,
        b"nul",
    ],
)
def test_json_files_that_are_refused(tmp_path, body):
    path = tmp_path / "a.json"
    path.write_bytes(body)
    with pytest.raises(DataError) as error:
        open_source(str(path))
    assert error.value.do
    assert str(path) in str(error.value)


def test_json_empty_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(" [ ] ")
    assert values(path) == []


# CSV

cell = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8)


@relaxed
@given(st.lists(st.tuples(cell, cell), max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_csv_cells_are_strings_of_equal_value(tmp_path_factory, rows, ending):
    import csv

    path = tmp_path_factory.mktemp("c") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=ending, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "id, 2"), *rows])
    limit = csv.field_size_limit()
    assert values(path) == [{"text": a, "id, 2": b} for a, b in rows]
    assert csv.field_size_limit() == limit


def test_csv_bad_rows_are_rows(tmp_path):
    path = tmp_path / "a.csv"
    big = b"y" * 200_000
    body = [b"text,k", b"a,1", b"b", b"c,1,2", b'"x"y,3', b"\xff,4", b"n\x00,5", b"", big + b",6", b'"m\nn\no"', b"d,8"]
    path.write_bytes(b"\n".join(body) + b"\n")
    found = [(p.value or {}).get("k") or p.problem or p.blank for p in open_source(str(path)).rows.parsed()]
    assert found[0] == "1"
    assert found[1:3] == ["the row has 1 cells, the header 2", "the row has 3 cells, the header 2"]
    assert "cannot be read" in found[3]
    assert found[4:7] == ["the row is not UTF-8", "the row holds a NUL byte", True]
    assert found[7] == "6"
    assert found[8] == "the row has 1 cells, the header 2, and spans lines 10 to 12"
    assert found[9:] == ["8"]
    assert lines(path)[4] == b"\xff,4"
    assert lines(path)[8] == b'"m\nn\no"'


@pytest.mark.parametrize(
    ("rows", "torn"),
    [
        (['"open,0', *(f"r{n},{n}" for n in range(998))], "line 2 to 1000"),  # to the end of the file
        (["a,0", '"open,1', "b,2", '"c",3', "d,4"], "line 3 to 5"),  # to the next quote
        (['"open,0', '"c",1'] * 9, "line 2 to 3, 4 to 5, 6 to 7 and 6 more"),
        (['x","y'] * 50_000, "line 2 to 50001"),
    ],
)
def test_a_quote_that_is_never_closed_is_refused_and_loses_no_row(tmp_path, rows, torn):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["text,k", *rows]) + "\n")
    with pytest.raises(DataError, match="quote") as raised:
        open_source(str(path))
    assert raised.value.where == str(path)
    assert raised.value.got == f"a cell with an open quote from {torn}"
    assert raised.value.do


@pytest.mark.parametrize("body", [b"", b"\n", b"a,a\n1,2\n", b"\xff,b\n1,2\n", b'"a\n'])
def test_csv_headers_that_are_refused(tmp_path, body):
    path = tmp_path / "a.csv"
    path.write_bytes(body)
    with pytest.raises(DataError):
        open_source(str(path))


# Parquet and Arrow

NESTED = pa.table(
    {
        "messages": pa.array(
            [
                [
                    {"role": "user", "content": "q", "tool_calls": None},
                    {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
                ],
                None,
            ]
        ),
        "when": pa.array([1, None], pa.timestamp("ns", "Europe/Paris")),
        "local": pa.array([-1, 0], pa.timestamp("ms")),
        "far": pa.array([2**62, 0], pa.timestamp("s")),
        "day": pa.array([datetime.date(2020, 2, 29), None]),
        "day64": pa.array([86_400_000, None], pa.date64()),
        "time": pa.array([1, 3_600_000_000_001], pa.time64("ns")),
        "span": pa.array([-1500, 2000], pa.duration("ms")),
        "cost": pa.array([decimal.Decimal("12.340"), decimal.Decimal("-0.001")], pa.decimal128(10, 3)),
        "blob": pa.array([b"\x00\xff", b""], pa.binary()),
        "blobs": pa.array([[b"a", None], None], pa.list_(pa.large_binary())),
        "map": pa.array([[("k", b"a")], []], pa.map_(pa.string(), pa.binary())),
        "dict": pa.array(["x", None]).dictionary_encode(),
        "half": pa.array([1.5, None], pa.float16()),
        "view": pa.array(["v", "w"], pa.string_view()),
        "big": pa.array([2**63, 0], pa.uint64()),
        "nan": pa.array([float("nan"), 1.0]),
        "js": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": [1, null]}', '"s"'])),
    }
)
FIRST = {
    "messages": [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
    ],
    "when": "1970-01-01T00:00:00.000000001Z",
    "local": "1969-12-31T23:59:59.999",
    "far": "4611686018427387904 s since 1970-01-01",
    "day": "2020-02-29",
    "day64": "1970-01-02",
    "time": "00:00:00.000000001",
    "span": "-PT1.500S",
    "cost": "12.340",
    "blob": "AP8=",
    "blobs": ["YQ==", None],
    "map": [["k", "YQ=="]],
    "dict": "x",
    "half": 1.5,
    "view": "v",
    "big": 2**63,
    "js": {"a": [1, None]},
}


def test_table_values_follow_the_documented_rules(tmp_path):
    with pa.ipc.new_stream(tmp_path / "a.arrow", NESTED.schema) as writer:
        writer.write_table(NESTED)
    found = values(tmp_path / "a.arrow")
    assert {k: v for k, v in found[0].items() if k != "nan"} == FIRST
    assert found[0]["nan"] != found[0]["nan"]
    second = {"when": None, "time": "01:00:00.000000001", "span": "PT2.000S", "cost": "-0.001", "js": "s", "map": []}
    assert {key: found[1][key] for key in second} == second
    first = json.loads(lines(tmp_path / "a.arrow")[0])
    assert {k: v for k, v in first.items() if k != "nan"} == FIRST


@relaxed
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "text": st.text(st.characters(codec="utf-8")),
                "n": st.none() | st.integers(-(2**63), 2**63 - 1),
                "f": st.none() | st.floats(allow_nan=False),
                "l": st.lists(st.none() | st.booleans(), max_size=2),
            }
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["parquet", "arrow", "feather"]),
)
def test_plain_tables_round_trip(tmp_path_factory, rows, kind):
    path = tmp_path_factory.mktemp("t") / f"a.{kind}"
    schema = pa.schema({"text": pa.string(), "n": pa.int64(), "f": pa.float64(), "l": pa.list_(pa.bool_())})
    table = pa.Table.from_pylist(rows, schema=schema)
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, schema) as writer:
            writer.write_table(table)
    assert values(path) == rows
    assert [parse_line(line).value for line in lines(path)] == rows
    assert open_source(str(path)).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_bad_string_is_one_bad_row(tmp_path):
    bad = pa.array([b"good", b"b\xff", b"also"]).view(pa.string())
    js = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}", "{}", '{"a":1,"a":2}']))
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema({"text": pa.string(), "js": js.type})) as writer:
        writer.write_table(pa.table({"text": bad, "js": js}))
    found = problems(tmp_path / "a.arrow")
    assert found[0] == ""
    assert found[1] == "column 'text': a string is not UTF-8"
    assert "'js': its JSON cannot be read (the key 'a' stands twice" in found[2]
    assert lines(tmp_path / "a.arrow")[1] == b'{"text":"b\\udcff","js":{}}'


def test_parquet_in_a_folder_named_like_a_partition_gains_no_column(tmp_path):
    (tmp_path / "year=2020").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "year=2020" / "a.parquet")
    assert values(tmp_path / "year=2020" / "a.parquet") == [{"text": "a"}]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
@pytest.mark.parametrize("body", [b"", b"PAR1", b"ARROW1\0\0", b'{"text": "a"}\n' * 9])
def test_broken_tables_are_refused(tmp_path, name, body):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError, match="cannot be read"):
        open_source(str(tmp_path / name))


def test_repeated_column_names_are_refused(tmp_path):
    inner = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["k", "k"])
    for table in (pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), pa.table({"s": inner})):
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(DataError, match="same name"):
            open_source(str(tmp_path / "a.arrow"))


def test_save_to_disk_folders(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list([{"text": str(i)} for i in range(5)])
    whole.select([3, 1]).save_to_disk(str(tmp_path / "one"))
    assert values(tmp_path / "one") == [{"text": "3"}, {"text": "1"}]
    assert open_source(str(tmp_path / "one")).kind == "arrow"
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(str(tmp_path / "two"))
    assert len(values(tmp_path / "two" / "train")) == 5
    with pytest.raises(DataError, match="several splits"):
        open_source(str(tmp_path / "two"))


# Whole files that are refused


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.zip", "a.tar", "a.tgz", "a.zst", "a.7z", "A.GZ"])
def test_archives_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match="never unpacked"):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_archives_are_refused_by_their_first_bytes(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}'))
    with pytest.raises(DataError, match="never unpacked"):
        open_source(str(tmp_path / name))
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("../escaped.jsonl", "{}")
    with pytest.raises(DataError, match="never unpacked"):
        open_source(str(tmp_path / name))
    assert sorted(p.name for p in tmp_path.parent.iterdir() if "escaped" in p.name) == []


def test_other_refusals_name_the_remedy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}', "utf-16")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "bare").write_text("a")
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    cases = {
        "a.jsonl": "UTF-16",
        "a.txt": "not known",
        "bare": "not known",
        "dir": "save_to_disk",
        "pipe.jsonl": "regular",
    }
    cases |= {
        "absent.jsonl": "not exist",
        "absent.zip": "not exist",
        "absent.txt": "not exist",
        "x" * 300: "cannot be read",
    }
    for name, text in cases.items():
        with pytest.raises(DataError, match=text) as error:
            open_source(str(tmp_path / name))
        assert error.value.do
    with pytest.raises(DataError, match="not known") as error:
        open_source(str(tmp_path / "a.txt"))
    assert ".jsonl" in error.value.expected
    assert ".parquet" in error.value.expected


# The hub, through the cache that datasets keeps

COMMIT = "1" * 40
SCRIPT = """
import json, sys
from gradsift.data.pool import open_source
from gradsift.errors import DataError
out = []
for source in sys.argv[1:]:
    try:
        opened = open_source(source)
        out.append([opened.kind, opened.revision, opened.sha256, [p.value for p in opened.rows.parsed()]])
    except DataError as error:
        out.append([error.what, str(error.got), error.where, error.do])
print(json.dumps(out))
"""


def cached_dataset(home: Path, work: Path, rows: list[dict]) -> Path:
    """Lay a prepared data set out as datasets does after an online load of org/name at COMMIT."""
    import datasets

    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"train": str(work / "rows.jsonl")}
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(work / "cache"))
    builder.download_and_prepare()
    target = home / "datasets" / "org___name" / "default" / "0.0.0" / COMMIT
    shutil.copytree(builder.cache_dir, target)
    (target / "json-train.arrow").rename(target / "name-train.arrow")
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "name", "builder_name": "name"}
    (target / "dataset_info.json").write_text(json.dumps(info))
    return target / "name-train.arrow"


def test_hub_ids_are_read_from_the_local_cache(tmp_path):
    # Mixed argument types make datasets store the column as arrow.json, which must come out decoded.
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "tool_calls": [{"arguments": {"x": 1}}]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "r"},
                {"role": "assistant", "tool_calls": [{"arguments": {"y": "s"}}]},
            ]
        },
    ]
    arrow = cached_dataset(tmp_path / "home", tmp_path, rows)
    asked = ["org/name", "org/name:train[:1]", f"org/name@{COMMIT}:train", "org/name:test", "org/absent"]
    asked += [f"org/name@{'2' * 40}", "org/name@main", "not a hub id"]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, "-c", SCRIPT, *asked]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    digest = hashlib.sha256(arrow.read_bytes()).hexdigest()
    assert found[0] == ["hub", COMMIT, digest, rows]
    assert found[1] == ["hub", COMMIT, digest, rows[:1]]
    assert found[2] == found[0]
    assert "test" in found[3][1]
    assert "org/absent" in found[4][1]
    assert found[4][2] == "org/absent"
    assert "HF_HUB_OFFLINE" in found[4][3]
    assert "local file" in found[4][3]
    assert [found[5][0], found[5][1]] == ["the cache holds another revision of the data set", COMMIT]
    assert found[6][0] == found[5][0]
    assert found[7][0] == "the file does not exist"
