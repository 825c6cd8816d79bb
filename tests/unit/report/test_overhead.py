"""The bill of choosing beside fine-tuning: sums, ratios, what is not measured."""

from __future__ import annotations

import json

import pytest

from gradsift.report.overhead import ABSENT, HEADINGS, POLICY_PARTS, overhead, overhead_dict, overhead_rows

SELECT = {
    "spec": {"parameters": "lora"},
    "rows": {"tokens": 900},
    "cost": {
        "seconds": {"read": 1.0, "tokenize": 2.0, "load": 3.0, "anchors": 10.0, "collect": 20.0, "noise": 1.0,
                    "select": 0.5, "write": 0.5},
        "tokens": {"anchors": 400, "collect": 900, "noise": 50},
    },
}  # fmt: skip
TRAIN = {"cost": {
    "train": {"flops": 6e9, "forward_tokens": 1000, "backward_tokens": 1000, "seconds": 70.0},
    "hook agem": {"flops": 2e9, "forward_tokens": 300, "backward_tokens": 300, "seconds": 6.0},
    "total": {"flops": 8e9, "forward_tokens": 1300, "backward_tokens": 1300, "seconds": 76.0},
}}  # fmt: skip
COSTS = {"cluster": {"seconds": 0.25, "tokens": 0, "flops": 0.0},
         "rollouts": {"seconds": 19.0, "forward_tokens": 650, "flops": 4e9}}  # fmt: skip


def test_every_second_of_the_manifest_stands_on_one_line() -> None:
    bill = overhead(SELECT, TRAIN)
    assert [(p.name, p.seconds, p.tokens, p.flops) for p in bill.parts] == [
        ("collect", 34.0, 1350, None), ("other", 4.0, 0, 0.0),
    ]  # fmt: skip
    assert bill.choosing.seconds == sum(SELECT["cost"]["seconds"].values())
    assert bill.choosing.tokens == 1350
    assert bill.choosing.flops is None  # that reading takes no operations says nothing of the pass
    assert bill.training.flops == 8e9
    assert bill.ratio(bill.choosing, "seconds") == 0.5
    assert bill.notes == ()


def test_parts_of_a_policy_are_listed_and_what_is_absent_says_so() -> None:
    bill = overhead(SELECT, TRAIN, COSTS, policy=True)
    assert [p.name for p in bill.parts] == ["collect", "other", *POLICY_PARTS]
    assert bill.choosing.seconds == 38.0 + 19.25
    assert bill.partial == {"seconds", "tokens", "flops"}
    lines = {line[0]: dict(zip(HEADINGS, line, strict=True)) for line in overhead_rows(bill)}
    assert lines["navigator roll-outs"]["seconds"] == "19.0"
    assert lines["navigator roll-outs"]["of fine-tuning, by seconds"] == "25.0%"
    assert lines["navigator roll-outs"]["by operations"] == "50.0%"
    assert set(list(lines["training the policy"].values())[1:]) == {ABSENT}
    assert lines["choosing, in all"]["seconds"] == "at least 57.2"
    assert lines["fine-tuning"]["seconds"] == "76.0"


def test_a_full_bill_is_no_lower_bound() -> None:
    costs = {name: {"seconds": 1.0, "tokens": 10, "flops": 1e9} for name in POLICY_PARTS}
    bill = overhead(SELECT, TRAIN, costs, policy=True)
    assert bill.partial == {"flops"}  # the pass does not count its operations
    assert bill.choosing.seconds == 43.0


def test_a_run_that_measured_before_is_not_billed_as_free() -> None:
    again = {**SELECT, "cost": {"seconds": {"read": 1.0, "collect": 0.01}, "tokens": {"noise": 5}}}
    bill = overhead(again, TRAIN)
    assert bill.parts[0].seconds is None
    assert "seconds" in bill.partial
    assert "earlier call" in bill.notes[0]
    some = {**SELECT, "cost": {"seconds": {"collect": 5.0}, "tokens": {"collect": 300}}}
    assert "300 of 900" in overhead(some, TRAIN).notes[0]


def test_a_text_method_has_no_pass() -> None:
    bill = overhead({"spec": None, "cost": {"seconds": {"read": 1.0, "select": 1.0}, "tokens": {}}}, TRAIN)
    assert [p.name for p in bill.parts] == ["other"]
    assert bill.partial == frozenset()
    assert bill.notes == ()


def test_nothing_is_divided_by_a_training_that_was_not_measured() -> None:
    for train in ({}, {"cost": {"total": {"seconds": 0.0, "forward_tokens": 0, "flops": 0.0}}}):
        bill = overhead(SELECT, train)
        assert bill.ratio(bill.choosing, "seconds") is None
        assert overhead_rows(bill)[-2][4] == ABSENT


def test_the_dict_is_json_and_says_the_same() -> None:
    bill = overhead(SELECT, TRAIN, {**COSTS, "transfer audit": {"seconds": 3.0}}, policy=True)
    plain = json.loads(json.dumps(overhead_dict(bill), allow_nan=False))
    assert [p["words"] for p in plain["parts"]] == [line[0] for line in plain["lines"]]
    assert plain["parts"][-3]["words"] == "transfer audit"
    assert plain["parts"][-1]["ratio"]["seconds"] == pytest.approx(1.0)
    assert plain["headings"] == list(HEADINGS)


def test_a_run_with_rollouts_bills_them_and_what_it_timed_together_once() -> None:
    rolled = {"flops": 5e9, "train_tokens": 100, "dev_tokens": 900, "seconds": 29.0, "num_rollouts": 4}
    cost = {"seconds": {**SELECT["cost"]["seconds"], "roll": 30.0, "select": 8.0},
            "tokens": {**SELECT["cost"]["tokens"], "roll": 1000}}  # fmt: skip
    manifest = {**SELECT, "rollouts": rolled, "cost": cost}
    for costs, deciding in ((None, 8.0), ({"policy": {"seconds": 3.0, "tokens": 0}}, 5.0)):
        bill = overhead(manifest, TRAIN, costs, policy=True)
        found = {p.name: p for p in bill.parts}
        assert (found["rollouts"].seconds, found["rollouts"].tokens, found["rollouts"].flops) == (30.0, 1000, 5e9)
        assert found["deciding"].seconds == deciding
        assert "cluster" not in found  # it is in the line above, and not missing
        assert found["rescoring"].seconds is None
        assert bill.choosing.seconds == pytest.approx(sum(cost["seconds"].values()))
