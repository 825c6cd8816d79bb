"""lm-eval in this process on a local folder: the same figures as our own multiple choice, nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.toy import toy_llama, toy_lora, toy_tokenizer

from gradsift.errors import ConfigError, DependencyError
from gradsift.evaluate.benchmarks import require_lm_eval, run_benchmarks
from gradsift.evaluate.choice import answer_choices, encode_choices, read_choices
from gradsift.evaluate.config import BenchTask, LmEvalConfig
from gradsift.evaluate.phases import Benchmarks, How, Sets, measure_pair

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="not run: lm-eval is not installed (extra [eval])"
)

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: {higher}
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    options = [["one", "two"], ["a", "bb", "ccc"], ["x y", "x z", "w"], ["up", "down", "left", "right"]]
    rows = [
        {"question": f"What is {n}?", "choices": options[n % 4], "answer": n % len(options[n % 4])} for n in range(11)
    ]
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "toy.yaml").write_text(TASK.format(name="toy", higher="true"))
    (place / "odd.yaml").write_text(TASK.format(name="odd", higher="false"))
    return place


@needs_lm_eval
def test_lm_eval_agrees_with_our_own_choice_and_leaves_nothing_behind(folder, capfd):
    model, tokenizer = toy_llama(5), toy_tokenizer()
    model.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), Path.cwd()  # noqa: NPY002
    level = logging.getLogger("lm_eval").level
    got = run_benchmarks(model, tokenizer, ["toy"], folder, seed=0)
    assert (random.getstate(), np.random.get_state()[1].tolist(), Path.cwd()) == (before[0], before[1], before[3])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert model.training
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level
    own = answer_choices(
        model,
        encode_choices(read_choices(str(folder / "questions.jsonl"), "toy"), tokenizer, style="plain", max_length=200),
        pad_id=3,
        tokens_per_batch=256,
    )
    scores = {s.metric: s for s in got.scores}
    assert scores["acc,none"].value == pytest.approx(own.accuracy)
    assert scores["acc_norm,none"].value == pytest.approx(own.accuracy_norm)
    assert scores["acc,none"].standard_error == pytest.approx(own.standard_error, rel=1e-6)
    assert {s.n for s in got.scores} == {11}
    assert got.notes == ()


@needs_lm_eval
def test_a_metric_of_unknown_direction_is_counted_and_a_limit_holds(folder):
    got = run_benchmarks(toy_llama(5), toy_tokenizer(), ["odd"], folder, seed=0, limit=4)
    assert [s.metric for s in got.scores] == ["acc_norm,none"]
    assert [(note.code, note.count) for note in got.notes] == [("unknown_metric", 1)]
    assert got.scores[0].n == 4


@needs_lm_eval
def test_both_phases_of_a_peft_model(folder):
    config = LmEvalConfig(tasks=(BenchTask(name="toy", role="domain"),), folder=str(folder))
    model, tokenizer = toy_lora(5), toy_tokenizer()
    done = measure_pair(model, model, Sets(benchmarks=Benchmarks(config, tokenizer)), How(pad_id=3))
    base = run_benchmarks(toy_llama(5), tokenizer, ["toy"], folder, seed=0)
    before = {row.metric: row.value for row in done.table.phase("before")}
    assert before == {s.metric: s.value for s in base.scores}
    assert {row.role for row in done.table.rows} == {"domain"}
    assert len(done.table.gain()) == 2


@needs_lm_eval
def test_refusals(folder, tmp_path):
    model, tokenizer = toy_llama(5), toy_tokenizer()
    with pytest.raises(ConfigError, match="no such task") as error:
        run_benchmarks(model, tokenizer, ["nosuch"], folder, seed=0)
    assert "odd, toy" in error.value.expected
    with pytest.raises(ConfigError, match="no such folder"):
        run_benchmarks(model, tokenizer, ["toy"], tmp_path / "none", seed=0)
    (folder / "questions.jsonl").unlink()
    with pytest.raises(ConfigError, match="could not run"):
        run_benchmarks(model, tokenizer, ["toy"], folder, seed=0)


def test_without_lm_eval_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(DependencyError, match=r"pip install 'gradsift\[eval\]'"):
        require_lm_eval()
