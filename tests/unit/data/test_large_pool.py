"""Pools that are not held in memory: ids by sorted hashes, rows by offset, tokens in the cache; each beside its slow twin."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.toy import toy_tokenizer

from gradsift.data import line_file, spool, token_cache
from gradsift.data.batches import plan_order, plan_shards
from gradsift.data.export import write_selected
from gradsift.data.ids import IdsBuilder
from gradsift.data.pool import Pool, open_source, read_pool
from gradsift.data.spool import Remarks, Spool
from gradsift.data.token_cache import tokenize_pool
from gradsift.data.token_rows import TokenRows, among, content_of, lengths, pick, places, sorted_by_id
from gradsift.data.tokenize import mask_rule, tokenize_rows
from gradsift.data.tokens import content_hash
from gradsift.errors import DataError
from gradsift.recipe import SourceConfig
from gradsift.types import RowStatus, TokenRow

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Nothing is small: every file goes the road of the large ones."""
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    return tmp_path / "cache"


# Spools


@relaxed
@given(st.lists(st.binary(max_size=9), max_size=20), st.sampled_from([0, 5, 1000]), st.sampled_from([1, 7, 1 << 20]))
def test_a_spool_gives_back_what_it_was_given(disk, monkeypatch, strings, limit, block):
    monkeypatch.setattr(spool, "BLOCK", block)
    written = Spool(limit)
    for one in strings:
        written.append(one)
    got = written.seal()
    assert list(got) == strings
    assert [got[i] for i in range(len(got))] == strings
    assert got.num_bytes == sum(map(len, strings))
    for place in (-1, len(strings)):
        with pytest.raises(IndexError):
            got[place]


def test_a_spool_leaves_no_file_and_remarks_are_sparse(disk):
    written = Spool(0)
    for one in (b"first", b"second"):
        written.append(one)
    remarks = Remarks(np.array([3, 70]), written.seal())
    assert [remarks[i] for i in (0, 3, 4, 70, 71)] == ["", "first", "", "second", ""]
    assert list((disk / "spool").iterdir()) == []


# Ids

lines = st.sampled_from([b"a", b"b", b"c", b"", b"\0"])
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5) | st.text("ab\0", min_size=1, max_size=30)
drawn = st.lists(st.tuples(lines, st.booleans()) | names, max_size=25)


@relaxed
@given(drawn)
def test_ids_equal_those_of_a_dictionary(disk, rows):
    """The slow twin keeps dictionaries of strings, as the pool once did."""
    builder, readable, seen, texts, firsts = IdsBuilder(), [], {}, [], []
    taken: dict[str, int] = {}
    count: dict[str, int] = {}
    for i, row in enumerate(rows):
        if isinstance(row, str):
            if row in taken:
                return  # refused; the test below
            builder.add_given(row)
            texts.append(row)
            firsts.append(-1)
            readable.append(True)
        else:
            builder.add_line(row[0])
            digest = hashlib.blake2b(row[0], digest_size=16).hexdigest()
            count[digest] = count.get(digest, 0) + 1
            texts.append(digest if count[digest] == 1 else f"{digest}-{count[digest]}")
            firsts.append(seen.get((digest, row[1]), -1))
            seen.setdefault((digest, row[1]), i)
            readable.append(row[1])
        taken[texts[-1]] = i
    ids, first, clash = builder.seal(np.array(readable, dtype=bool))
    assert clash is None
    assert list(ids) == texts == [ids.at(i) for i in range(len(ids))]
    assert first.tolist() == firsts
    order = np.empty(len(texts), dtype=int)
    order[ids.rank] = np.arange(len(texts))
    assert [texts[i] for i in order] == sorted(texts)
    assert ids.find(texts).tolist() == list(range(len(texts)))
    strange = ["nobody", "", "0" * 32, "0" * 32 + "-2", *(f"{t}-01" for t in texts), *(f"{t}-99" for t in texts)]
    assert ids.find(strange).tolist() == [taken.get(name, -1) for name in strange]
    assert all(name in ids for name in texts)
    assert 5 not in ids


@relaxed
@given(st.lists(st.sampled_from(["x", "y", "z", "x-2"]), min_size=1, max_size=8))
def test_the_first_id_that_stands_twice_is_named_with_the_one_before_it(disk, rows):
    builder = IdsBuilder()
    for name in rows:
        builder.add_given(name)
    clash = builder.seal(np.ones(len(rows), dtype=bool))[2]
    twice = next((i for i, name in enumerate(rows) if name in rows[:i]), None)
    if twice is None:
        assert clash is None
    else:
        assert clash is not None
        assert (clash.row, clash.other, clash.given) == (twice, rows.index(rows[twice]), True)


def test_a_given_id_may_read_like_a_line_or_like_the_hash_of_another():
    builder = IdsBuilder()
    builder.add_line(b"abc")
    builder.add_given("abc")
    builder.add_given(hashlib.blake2b(b"other", digest_size=16).hexdigest())
    ids, first, clash = builder.seal(np.ones(3, dtype=bool))
    assert clash is None
    assert first.tolist() == [-1, -1, -1]
    assert ids.find(["abc"]).tolist() == [1]


# Rows that stay in their files


def write(path, rows) -> SourceConfig:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return SourceConfig(label=path.stem, path=str(path))


def test_lines_are_read_from_their_file(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, b"{", {"text": "two"}])
    pool = read_pool([source])
    assert isinstance(pool.parts[0], line_file.LineFile)
    assert pool.raw(1) == b'{"text": "two"}'
    assert [row.example and row.example.fields["text"] for row in pool.rows] == ["one", "two", None, "two"]
    assert pool.rows[-1].copy_of == pool.rows[1].id
    assert [row.row for row in pool.rows[1:3]] == [1, 2]
    assert pool.copies == {pool.rows[3].id: pool.rows[1].id}
    assert pool.shapes == {"text"}


@pytest.mark.parametrize("edit", ["longer", "same size"])
def test_a_file_that_changes_after_it_was_read_is_refused(tmp_path, edit):
    source = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    pool = read_pool([source])
    assert pool.raw(0) == b'{"text": "one"}'
    body = (tmp_path / "a.jsonl").read_bytes()
    with (tmp_path / "a.jsonl").open("r+b") as file:
        file.write(body.replace(b"one", b"ONE") + (b"x" if edit == "longer" else b""))
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    for ask in (lambda: pool.raw(0), lambda: pool.rows[1], lambda: list(pool.rows)):
        with pytest.raises(DataError, match="changed while it was read"):
            ask()


def test_a_file_that_another_one_replaces_is_still_the_old_one_or_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "one"}])
    pool = read_pool([source])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match="can no longer be read"):
        pool.raw(0)
    write(tmp_path / "a.jsonl", [{"text": "another"}])
    with pytest.raises(DataError, match="changed"):
        pool.raw(0)


def test_few_files_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(line_file, "_MAX_OPEN", 3)
    monkeypatch.setattr(line_file, "_OPEN", type(line_file._OPEN)())
    pool = read_pool([write(tmp_path / f"{i}.jsonl", [{"text": str(i)}]) for i in range(9)])
    for _ in range(2):
        assert [json.loads(pool.raw(i))["text"] for i in range(9)] == list("012345678")
    assert len(line_file._OPEN) == 3


def test_a_large_parquet_file_is_spooled_and_equal_to_the_small_road(tmp_path, disk, monkeypatch):
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 1, 0]), pa.array(["x", "y"]))
    turns = pa.array([[{"role": "user", "content": str(i)}] for i in range(5)])
    table = pa.table({"messages": turns, "d": words, "t": pa.array(range(5), pa.timestamp("us", "UTC"))})
    table = table.replace_schema_metadata({"k": "v"})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = SourceConfig(label="a", path=str(tmp_path / "a.parquet"))
    large = read_pool([source])
    assert large.parts[0].mapping is not None
    monkeypatch.setattr(spool, "IN_MEMORY", 1 << 24)
    small = read_pool([source])
    assert small.parts[0].mapping is None
    assert large.parts[0].table.equals(small.parts[0].table, check_metadata=True)
    assert list(large.rows) == list(small.rows)
    assert [large.raw(i) for i in (4, 0)] == [small.raw(i) for i in (4, 0)]
    ids = [large.rows[i].id for i in (3, 1)]
    written = [write_selected(pool, ids, tmp_path / name).paths for pool, name in ((large, "l"), (small, "s"))]
    assert [path.read_bytes() for path in written[0]] == [path.read_bytes() for path in written[1]]
    assert list((disk / "spool").iterdir()) == []


def test_json_lists_and_csv_are_spooled_line_by_line(tmp_path, disk, monkeypatch):
    (tmp_path / "a.json").write_text('[{"text": "a b",\n "n": 1.0}, {"text": 5}, {"text": "a b", "n": 1.0}]')
    (tmp_path / "a.csv").write_text('text,n\nx,1\nbad\n"y\nz",2\n')
    sources = [SourceConfig(label=name, path=str(tmp_path / f"a.{name}")) for name in ("json", "csv")]
    large = read_pool(sources)
    assert large.parts[1].num_bytes > spool.IN_MEMORY
    monkeypatch.setattr(spool, "IN_MEMORY", 1 << 24)
    small = read_pool(sources)
    assert list(large.rows) == list(small.rows)
    raw = [large.raw(i) for i in range(6)]
    assert raw == [small.raw(i) for i in range(6)]
    assert raw[4] == b"bad"
    assert raw[5] == b'{"text":"y\\nz","n":"2"}'


# Tokens

TOKENIZER = toy_tokenizer()
text_rows = st.lists(
    st.sampled_from(["", "a", "b b", "one two three four five six seven", "a"]).map(lambda t: {"text": t})
    | st.sampled_from([b"{", b""])
    | st.text("abc ", max_size=12).map(lambda t: {"text": t}),
    min_size=1,
    max_size=12,
)
RULE = mask_rule(TOKENIZER, None, ["text"])


def tokenized(pool: Pool, **changes) -> TokenRows:
    asked = {"max_length": 6, "tokenizer_key": lambda: "toy", **changes}
    return tokenize_pool(pool, TOKENIZER, RULE, **asked)


def facts(row: TokenRow) -> tuple:
    arrays = [None if a is None else a.tolist() for a in (row.input_ids, row.trained, row.template)]
    return (row.id, *arrays, row.num_untruncated, row.status, row.reason, row.num_tokens, row.num_trained, row.top_id,
            content_of(row))  # fmt: skip


@relaxed
@given(text_rows, text_rows, st.booleans(), st.booleans())
def test_tokens_of_the_cache_equal_those_in_memory(disk, tmp_path_factory, first, second, large, find_template):
    folder = tmp_path_factory.mktemp("pool")
    pool = read_pool([write(folder / "a.jsonl", first), write(folder / "b.jsonl", second)])
    spool.IN_MEMORY = 0 if large else 1 << 24  # put back by the fixture
    twin = tokenize_rows(pool.rows, TOKENIZER, RULE, max_length=6, find_template=find_template)
    for _ in range(2):  # made, and found again
        got = tokenized(pool, find_template=find_template)
        assert [facts(row) for row in got] == [facts(row) for row in twin]
        assert [facts(row) for row in got.usable] == [facts(row) for row in twin if row.status.usable]
        assert got.counts == {s: n for s in RowStatus if (n := sum(row.status is s for row in twin))}
        order = [twin[i].id for shard in plan_shards(twin, range(len(twin)), 3) for i in shard]
        assert [got[int(i)].id for i in plan_order(got)] == order
        assert [twin[int(i)].id for i in plan_order(twin)] == order
        assert [row.id for row in sorted_by_id(got)] == [row.id for row in sorted_by_id(twin)]
        assert got.num_tokens.tolist() == [row.num_tokens for row in twin]
        assert got.num_trained.tolist() == [row.num_trained for row in twin]
        for one, other in zip(lengths(got), lengths(list(got)), strict=True):
            assert (one.dtype, one.tolist()) == (other.dtype, other.tolist())
        some = {twin[0].id, twin[-1].id, "nobody"}
        assert [row.id for row in among(got, some)] == [row.id for row in among(twin, some)]
        assert places(pool, got).tolist() == places(pool, list(twin)).tolist() == list(range(len(twin)))
        back = np.arange(len(twin))[::-1]
        assert [row.id for row in pick(got, back)] == [row.id for row in pick(twin, back)]


@pytest.fixture
def stored(disk, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three " * 9}, {"text": ""}])
    pool = read_pool([source])
    return pool, tokenized(pool), disk / "tokens"


def entries(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_stored_row_is_a_row(stored):
    _, got, _ = stored
    row = got[0]
    assert isinstance(row, TokenRow)
    assert not row.input_ids.flags.writeable
    changed = replace(row, status=RowStatus.SCREENED_OUT, reason="because")
    assert type(changed) is TokenRow
    assert changed.reason == "because"
    assert facts(changed)[1:4] == facts(row)[1:4]
    thawed = pickle.loads(pickle.dumps(got[1]))
    assert type(thawed) is TokenRow
    assert facts(thawed) == facts(got[1])
    assert content_of(row) == content_hash(row.input_ids, row.trained)
    assert "2 tokens" not in repr(got[2])
    assert isinstance(got[1:], TokenRows)
    assert len(got[1:]) == 2
    with pytest.raises(IndexError):
        got[3]


def test_statuses_may_be_told_anew_without_touching_the_others(stored):
    _, got, _ = stored
    told = TokenRows(got.table.with_statuses({0: (RowStatus.SCREENED_OUT, "left out")}), got.at)
    assert [row.status for row in told] == [RowStatus.SCREENED_OUT, RowStatus.TRUNCATED, RowStatus.EMPTY]
    assert told[0].reason == "left out"
    assert [row.reason for row in told[1:]] == [row.reason for row in got[1:]]
    assert got[0].status is RowStatus.TRUNCATED
    assert [row.id for row in told.usable] == [got[1].id]


def test_an_entry_is_found_again_by_what_decides_the_tokens(stored, monkeypatch):
    pool, _, folder = stored
    made = []
    real = token_cache.tokenize_rows
    monkeypatch.setattr(token_cache, "tokenize_rows", lambda *a, **k: made.append(1) or real(*a, **k))
    tokenized(pool)
    assert made == []
    for change in ({"max_length": 7}, {"tokenizer_key": lambda: "other"}, {"find_template": True}):
        tokenized(pool, **change)
        assert len(made) == 3, change
        made.clear()
    tokenize_pool(pool, TOKENIZER, replace(RULE, eos_token="</s>"), max_length=6, tokenizer_key=lambda: "toy")
    assert len(made) == 3
    assert len(entries(folder)) == 5


def test_an_appended_file_is_tokenized_alone(stored, tmp_path, monkeypatch):
    pool, before, folder = stored
    made = []
    real = token_cache.tokenize_rows
    monkeypatch.setattr(token_cache, "tokenize_rows", lambda *a, **k: made.append(1) or real(*a, **k))
    more = write(
        tmp_path / "b.jsonl", [{"text": "one two"}, {"text": "four"}]
    )  # the first is a copy of a row of a.jsonl
    grown = read_pool([SourceConfig(label="a", path=pool.files[0].path), more])
    got = tokenized(grown)
    assert len(made) == 2
    assert [facts(row) for row in got[:3]] == [facts(row) for row in before]
    assert [row.status for row in got[3:]] == [RowStatus.DUPLICATE, RowStatus.OK]
    assert len(entries(folder)) == 2


def test_a_copy_that_another_file_makes_of_a_row_changes_the_entry(stored, tmp_path):
    pool, _, folder = stored
    other = write(tmp_path / "b.jsonl", [{"text": "one two"}])
    turned = read_pool([other, SourceConfig(label="a", path=pool.files[0].path)])
    assert tokenized(turned)[1].status is RowStatus.DUPLICATE
    assert len(entries(folder)) == 3


@pytest.mark.parametrize("part", [token_cache.TOKENS, token_cache.COLUMNS, token_cache.SEALED])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_refused_before_a_number_is_used(stored, part, how):
    pool, _, folder = stored
    (name,) = entries(folder)
    path = folder / name / part
    body = bytearray(path.read_bytes())
    if how == "flipped":
        body[len(body) // 2] ^= 4
    path.unlink()
    if how != "gone":
        path.write_bytes(body[:-1] if how == "cut" else body)
    with pytest.raises(DataError, match="damaged") as raised:
        list(map(facts, tokenized(pool)))
    assert str(folder / name) in raised.value.do


def test_every_flipped_bit_of_the_records_is_found(stored):
    pool, _, folder = stored
    (name,) = entries(folder)
    path = folder / name / token_cache.TOKENS
    body = path.read_bytes()
    for at in range(len(body)):
        path.write_bytes(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
        with pytest.raises(DataError, match="damaged"):
            list(map(facts, tokenized(pool)))
    path.write_bytes(body)
    tokenized(pool)


def test_a_stop_on_the_way_leaves_no_entry(disk, tmp_path, monkeypatch):
    pool = read_pool([write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])])

    def stop(rows, *_, **__):
        if rows[0].row == 1:
            raise KeyboardInterrupt
        return tokenize_rows(rows, TOKENIZER, RULE, max_length=6)

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "tokenize_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            tokenized(pool)
    assert entries(disk / "tokens") == []
    assert len(tokenized(pool)) == 2


def test_old_entries_are_removed_when_a_new_one_is_made(stored, tmp_path):
    _, _, folder = stored
    (old,) = entries(folder)
    os.utime(folder / old, (1, 1))
    tokenized(read_pool([write(tmp_path / "c.jsonl", [{"text": "new"}])]))
    assert old not in entries(folder)
    assert len(entries(folder)) == 1


def test_small_pools_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    tokenized(read_pool([write(tmp_path / "a.jsonl", [{"text": "a"}])]))
    assert not (tmp_path / "cache").exists()


def test_open_source_reads_in_blocks_of_any_size(tmp_path, monkeypatch):
    rows = [b'{"text":"' + b"x" * n + b'"}' for n in (0, 5, 40, 3)]
    write(tmp_path / "a.jsonl", rows)
    for block in (2, 16, 1 << 20):
        monkeypatch.setattr(line_file, "BLOCK", block)
        opened = open_source(str(tmp_path / "a.jsonl")).rows
        assert [opened.line(i) for i in range(4)] == rows
        assert [parsed.line for parsed in opened.parsed()] == rows
