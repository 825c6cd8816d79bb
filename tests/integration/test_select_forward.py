"""tlm, ifd, daar, dsir, thtb and memory_level from files to a chosen file; signals that are kept, refused or shared."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from tests.rows import chat, some_rows, world, write_jsonl

from gradsift import select
from gradsift.errors import ConfigError, DataError, SpecError
from gradsift.pipeline import memory
from gradsift.pipeline.estimate import estimate
from gradsift.pipeline.progress import Silent
from gradsift.recipe import build_recipe

SMALL = {"collect.rows_per_shard": 5, "collect.sketch_dim": 251}
DAAR = {"num_domains": 2, "layer": 1, "probe_share": 1.0, "rows_per_domain": 5, "min_accuracy": 0.0, "steps": 30}


def run(files, out, navigator, method, settings=None, budget="6", target=None, pool=None):
    return select(
        {"pool": pool or files["pool"]},
        method=method,
        budget=budget,
        out=out,
        target=target,
        navigator=navigator,
        settings={**SMALL, **{f"method.settings.{k}": v for k, v in (settings or {}).items()}},
        report=False,
    )


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


@torch.no_grad()
def slow_losses(files, navigator, max_length=2048):
    """Prompt, answer and answer-alone losses by the definition: question bytes, answer bytes, one by one in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gradsift.data.pool import read_pool
    from gradsift.data.tokenize import mask_rule, tokenize_rows
    from gradsift.recipe import SourceConfig

    model = AutoModelForCausalLM.from_pretrained(navigator, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(navigator)
    rows = read_pool((SourceConfig(label="x", path=str(files["pool"])),)).rows
    out = {}
    for row, tokens in zip(
        rows,
        tokenize_rows(rows, tokenizer, mask_rule(tokenizer, None, {"messages"}), max_length=max_length),
        strict=True,
    ):
        ids, question = torch.from_numpy(tokens.input_ids).long(), row.example.fields["messages"][0]["content"]
        start = len(tokenizer("<|im_start|>user\n")["input_ids"])
        places = range(start, start + len(question.encode()))
        assert tokenizer.decode(ids[list(places)]) == question
        log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        answer = np.flatnonzero(tokens.trained)
        begin = model.config.bos_token_id
        alone = torch.tensor([begin, *ids[answer].tolist()])
        alone_p = model(input_ids=alone[None]).logits[0].log_softmax(-1)
        out[row.id] = (
            -np.mean([float(log_p[t - 1, ids[t]]) for t in places]),
            -np.mean([float(log_p[t - 1, ids[t]]) for t in answer]),
            -np.mean([float(alone_p[t - 1, alone[t]]) for t in range(1, len(alone))]),
        )
    return out


def test_tlm_is_the_slow_twins_choice(tmp_path, navigator):
    files = world(tmp_path)
    got = run(files, tmp_path / "run", navigator, "tlm")
    loss = {name: values[0] for name, values in slow_losses(files, navigator).items()}
    order = sorted(loss, key=lambda name: -loss[name])
    top = sorted(loss.values())[int(np.ceil(0.99 * (len(loss) - 1)))]
    assert set(got.ids) == set(order[:6])
    want = np.exp([min(loss[name], top) for name in got.ids])
    assert got.weights == pytest.approx(want / want.mean(), rel=1e-3)
    assert manifest(tmp_path / "run")["spec"]["signals"] == ["loss", "prompt_loss"]


def test_ifd_is_the_slow_twins_choice_and_runs_no_backward(tmp_path, navigator, monkeypatch):
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: pytest.fail("a backward was run"))
    files = world(tmp_path)
    got = run(files, tmp_path / "run", navigator, "ifd", {"limit": 5.0})
    ratio = {name: values[1] / values[2] for name, values in slow_losses(files, navigator).items()}
    assert got.ids == tuple(sorted(ratio, key=lambda name: -ratio[name])[:6])
    place = {name: k for k, name in enumerate(got.problem_ids)}
    assert got.score[[place[n] for n in ratio]] == pytest.approx(list(ratio.values()), rel=1e-4)


def test_daar_reads_two_taps(tmp_path, navigator):
    files = world(tmp_path)
    got = run(files, tmp_path / "run", navigator, "daar", DAAR)
    assert len(got.ids) == 6
    assert manifest(tmp_path / "run")["spec"]["signals"] == ["hidden_0", "hidden_1", "loss"]
    details = json.loads((tmp_path / "run" / "selection" / "details.json").read_text())
    assert set(details["probe_rows"]) <= set(got.problem_ids)


def test_what_daar_cannot_have_is_refused_before_a_model_loads(tmp_path, navigator, monkeypatch):
    monkeypatch.setattr("gradsift.pipeline.measure.load_navigator", lambda *a, **k: pytest.fail("a model was loaded"))
    files = world(tmp_path)
    with pytest.raises(ConfigError, match="no such layer"):
        run(files, tmp_path / "deep", navigator, "daar", {**DAAR, "layer": 7})
    with pytest.raises(DataError, match="daar needs more rows") as refusal:
        run(files, tmp_path / "small", navigator, "daar", {"layer": 1})
    assert refusal.value.expected == "at least 200"
    with pytest.raises(ConfigError, match="two labels") as refused:
        run(files, tmp_path / "one", navigator, "daar", {**DAAR, "domains": "sources"})
    assert refused.value.do.endswith("domains=clusters")
    with pytest.raises(ConfigError, match="level 0"):
        run(files, tmp_path / "none", navigator, "memory_level", {"level": 0})
    assert not any((tmp_path / name).exists() for name in ("deep", "small", "one", "none"))


def test_a_store_without_the_signal_is_refused_and_one_with_more_serves_other_methods(tmp_path, navigator):
    files = world(tmp_path)
    run(files, tmp_path / "loss", navigator, "loss")
    with pytest.raises(SpecError, match="signals"):
        run(files, tmp_path / "loss", navigator, "tlm")
    first = run(files, tmp_path / "tlm", navigator, "tlm")
    again = run(files, tmp_path / "tlm", navigator, "loss")  # goes on with the same signals, prompts included
    assert set(again.problem_ids) == set(first.problem_ids)
    assert manifest(tmp_path / "tlm")["cost"]["tokens"].get("collect", 0) == 0
    more = write_jsonl(tmp_path / "more.jsonl", [*some_rows(24, 0), *some_rows(4, 9)])
    run(files, tmp_path / "tlm", navigator, "loss", pool=more)  # new rows, measured by a method that reads no prompts
    fresh = run(files, tmp_path / "fresh", navigator, "tlm", pool=more)
    assert run(files, tmp_path / "tlm", navigator, "tlm", pool=more).score == pytest.approx(fresh.score, abs=1e-5)


def test_dsir_reads_words_and_loads_no_model(tmp_path, navigator, monkeypatch):
    monkeypatch.setattr("gradsift.pipeline.measure.load_navigator", lambda *a, **k: pytest.fail("a model was loaded"))
    rows = [chat(f"question {k}", "court judge law" if k % 4 == 0 else "cell gene enzyme") for k in range(24)]
    files = {"pool": write_jsonl(tmp_path / "pool.jsonl", rows)}
    target = write_jsonl(tmp_path / "t.jsonl", [chat("which", "law of the court"), chat("who", "the judge")])
    got = run(files, tmp_path / "run", navigator, "dsir", {"draw": "top"}, target=target)
    lines = [json.loads(line) for line in (tmp_path / "run" / "selection" / "selected.jsonl").read_text().splitlines()]
    assert len(got.ids) == 6
    assert all("court" in json.dumps(line) for line in lines)
    with pytest.raises(ConfigError, match="target"):
        run(files, tmp_path / "none", navigator, "dsir")


def scored(count=40):
    rng = np.random.default_rng(3)
    rows = []
    for k in range(count):
        hard = k % 10 == 0
        answer = "because " * (20 if hard else int(rng.integers(1, 4))) + str(k)
        rows.append(
            chat(
                f"please explain {rng.choice(['law', 'cells', 'goals'])} {rng.choice(['now', 'then'])} number {k}",
                answer,
                id=f"{'hard' if hard else 'easy'}{k:02d}",
                reward=float(rng.normal() + 3 * hard),
                bloom=int(rng.integers(15, 22) if hard else rng.integers(1, 9)),
                disciplines=["law", "biology", "sport"] if hard else ["law"],
                discipline_vectors=[[1, 0, 0], [0, 1, 0], [0, 0, 1]] if hard else [[1, 0, 0]],
            )
        )
    return rows


def test_thtb_finds_the_hard_rows_and_needs_no_model(tmp_path, navigator, monkeypatch):
    monkeypatch.setattr("gradsift.pipeline.measure.load_navigator", lambda *a, **k: pytest.fail("a model was loaded"))
    files = {"pool": write_jsonl(tmp_path / "pool.jsonl", scored())}
    got = run(files, tmp_path / "run", navigator, "thtb", budget="4")
    assert sum(name.startswith("hard") for name in got.ids) >= 3
    codes = {code for code in got.reason_code if code.startswith("dropped")}
    assert codes == {"dropped:quality", "dropped:intrinsic", "dropped:budget"}


@pytest.mark.parametrize(
    ("method", "column", "bad"),
    [
        ("thtb", "reward", "high"),
        ("thtb", "bloom", None),
        ("thtb", "disciplines", "law"),
        ("thtb", "discipline_vectors", [["a"]]),
        ("memory_level", "recall_counts", "many"),
    ],
)
def test_a_column_that_is_missing_or_no_number_is_refused_by_name_before_a_model_loads(
    method, column, bad, tmp_path, navigator, monkeypatch
):
    monkeypatch.setattr("gradsift.pipeline.measure.load_navigator", lambda *a, **k: pytest.fail("a model was loaded"))
    rows = [{**row, "recall_counts": [5] * 21} for row in scored(8)]
    for changed in ({**rows[3], column: bad}, {k: v for k, v in rows[3].items() if k != column}):
        files = {"pool": write_jsonl(tmp_path / "pool.jsonl", [*rows[:3], changed, *rows[4:]])}
        with pytest.raises(DataError, match=f"column {column}") as refusal:
            run(files, tmp_path / "run", navigator, method)
        assert "easy03" in refusal.value.where
        assert not (tmp_path / "run").exists()


def test_memory_level_draws_facts_of_its_level(tmp_path, navigator):
    rows = [
        {"id": f"f{k:02d}", "prompt": f"the capital of land {k} is ", "completion": "Rome", "recall_counts": [2 * (k % 6)] * 21,
         "relation": f"rel{k % 2}"}
        for k in range(36)
    ]  # fmt: skip
    rows.append({**rows[2], "id": "trivial", "prompt": "is Rome the capital? "})
    files = {"pool": write_jsonl(tmp_path / "pool.jsonl", rows)}
    got = run(files, tmp_path / "run", navigator, "memory_level", {"relation": "relation"}, budget="4")
    assert all(int(name[1:]) % 6 in (2,) for name in got.ids)  # 4 of 10: level 2
    assert {n.code for n in got.notes} >= {"trivial", "levels"}
    assert got.reason_code[got.problem_ids.index("trivial")] == "dropped:trivial"


def test_inputs_of_a_finished_run_are_untouched(tmp_path, navigator):
    rows = scored()
    files = {"pool": write_jsonl(tmp_path / "pool.jsonl", copy.deepcopy(rows))}
    before = files["pool"].read_bytes()
    run(files, tmp_path / "run", navigator, "thtb", budget="4")
    assert files["pool"].read_bytes() == before


def test_memory_counts_the_prompts_logits_for_a_method_and_for_a_folder_that_hold_them(
    tmp_path, navigator, monkeypatch
):
    files, plans = world(tmp_path), {}
    for method in ("loss", "tlm"):
        recipe = {"pool": [{"label": "pool", "path": str(files["pool"])}], "method": {"name": method}, "budget": "6",
                  "navigator": {"model": str(navigator)}}  # fmt: skip
        plans[method] = estimate(build_recipe(recipe), Silent()).memory
    assert plans["tlm"].logits > 1.2 * plans["loss"].logits
    asked = []
    monkeypatch.setattr(memory, "fitting_budget", lambda *_, prompts, **__: asked.append(prompts) or 256)
    for method, out in (("loss", "loss"), ("tlm", "tlm"), ("loss", "tlm")):
        select({"pool": files["pool"]}, method=method, budget="6", out=tmp_path / out, navigator=navigator, report=False,
               settings={**SMALL, "collect.tokens_per_batch": "auto"})  # fmt: skip
    assert asked == [False, True, True]
