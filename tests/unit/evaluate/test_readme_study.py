"""README's table of the study on SmolLM2, and the figures below it, say what the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "docs/results"
DOMAINS = ("medical", "legal", "financial")
NAMES = {
    "domain-looking + 25% replay": "domain_looking+replay25",
    "ogs_dual + 25% replay": "ogs_dual+replay25",
    "random at the total cost of ogs_rounds": "random_total",
}


def section() -> str:
    """README's paragraphs on SmolLM2."""
    return (ROOT / "README.md").read_text("utf-8").partition("On SmolLM2-135M (a real model")[2].partition("\n## ")[0]


def found(folder: str):
    return json.loads((RESULTS / folder / "results.json").read_text("utf-8"))


def gap(one) -> str:
    return f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def shown() -> dict[str, list[str]]:
    """Rows of the table."""
    lines = [line for line in section().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] for line in lines]
    return {NAMES.get(name, name): rest for name, *rest in rows if name != "arm"}


def test_the_table_of_the_study_is_that_of_its_results():
    want: dict[str, list[str]] = {}
    for k, domain in enumerate(DOMAINS):
        study = found(f"deep-{domain}")
        beside = {one["arm"]: gap(one["interval"]) for one in study["against_random"]}
        for arm in study["arms"]:
            assert len(arm["seeds"]) == 10
            row = want.setdefault(arm["name"], ["", "", "", ""])
            row[k] = beside.get(arm["name"], f"{arm['mean']:.3f}")
            row[3] += f"{', ' if row[3] else ''}{arm['spent']['relative']:.2f}"
    assert shown() == want


def test_every_claim_over_random_and_the_best_cheap_arm_is_refused_as_the_rule_words_it():
    told = [one for domain in DOMAINS for one in found(f"deep-{domain}")["claims"]]
    assert {one["supported"] for one in told if one["baseline"] != "random_total"} == {False}
    assert "**No advantage over random or the best cheap arm was measured**" in section()
    pairs = [one for domain in DOMAINS for one in found(f"deep-{domain}")["against_random"]]
    assert not any(one["interval"]["low"] > 0 for one in pairs), "nor was one for any cheap arm"


def test_what_an_oracle_wins_is_told():
    text = " ".join(section().split())
    for domain in DOMAINS:
        (claim,) = found(f"oracle-{domain}")["claims"]
        assert (claim["arm"], claim["baseline"], claim["supported"]) == ("oracle", "random", False)
        assert f"{domain} {gap(claim['interval'])}" in text
        assert claim["interval"]["n"] == 10
    (pilot,) = found("junk-pilot-most")["claims"]
    assert f"an oracle {pilot['interval']['mean']:.2f} above random on its two pilot seeds" in text
    assert pilot["interval"]["n"] == 2


def test_what_the_area_hides_is_told():
    (legal,) = (arm for arm in found("deep-legal")["arms"] if arm["name"] == "ogs_dual")
    (plain,) = (arm for arm in found("deep-legal")["arms"] if arm["name"] == "random")
    assert f"mean gain {legal['points'][0]['x']:.2f}, random's {plain['points'][0]['x']:+.2f}" in section()
    losses = []
    for path in (RESULTS / "deep-legal/cells").glob("*.json"):
        cell = json.loads(path.read_text("utf-8"))["cell"]
        if cell["arm"] == "ogs_dual":
            policy = cell["points"][0]["metrics"]["privacy_policy"]
            losses.append(policy["loss_after"] - policy["loss_before"])
    worst = sorted(losses)[-3:]
    assert (round(worst[0]), round(worst[2], 1)) == (1, 4.3)
    assert sorted(losses)[-4] < 0.1
    assert "three of ten seeds `ogs_dual` made held-out law worse by 1 to 4.3 nats" in " ".join(section().split())


def test_the_figures_of_the_other_methods():
    text = " ".join(section().split()).partition("The other methods")[2]
    family = {one["arm"]: one["interval"] for one in found("deep-family")["against_random"]}
    for arm in ("rds", "ifd", "dsir", "grads", "tlm"):
        assert f"`{arm}` {family[arm]['mean']:+.3f}" in text
        assert family[arm]["low"] < 0 < family[arm]["high"]
    assert f"`grads` with density sampling {gap(family['grads+sample'])}" in text
    assert f"`less` {gap(family['less'])} on nine seeds" in text
    (ogs,) = (one["interval"] for one in found("deep-ogs")["against_random"] if one["arm"] == "ogs")
    assert (family["less"]["n"], ogs["n"]) == (9, 5)
    assert f"(`docs/results/deep-ogs`): {gap(ogs)}" in text


def test_the_figures_of_the_methods_that_were_left():
    text = " ".join(section().split()).partition("And on processor cores")[2]
    rest = {one["arm"]: one["interval"] for one in found("deep-family-rest")["against_random"]}
    cost = {arm["name"]: f"{arm['spent']['relative']:.1f}" for arm in found("deep-family-rest")["arms"]}
    assert {one["n"] for one in rest.values()} == {10}
    for arm, interval in rest.items():
        assert f"`{arm}` {gap(interval)}" in text
        assert (interval["high"] < 0) == (arm in ("dids", "doge", "doremi"))
        assert interval["low"] < 0
    assert cost["grad_match"] == cost["grad_match_partitioned"]
    assert f"at {cost['grad_match']} times the cost" in text
    assert f"at {cost['dids']}, {cost['doge']} and {cost['doremi']} times its cost" in text
    right = {arm["name"]: f"{arm['shares']['clean']:.0%}" for arm in found("deep-family-rest")["arms"]}
    told = "right medical rows {dids}, {doge} and {doremi} of the chosen ones, random's {random}.".format(**right)
    assert told in text


def test_how_far_the_end_token_moved_the_start_is_told():
    starts: dict[str, dict[int, np.ndarray]] = {}
    for folder in ("deep-medical", "deep-family"):
        for path in (RESULTS / folder / "cells").glob("*.json"):
            cell = json.loads(path.read_text("utf-8"))["cell"]
            if cell["arm"] == "random":
                sets = cell["points"][0]["metrics"]
                starts.setdefault(folder, {})[cell["seed"]] = np.array([sets[k]["loss_before"] for k in sorted(sets)])
    one, other = (np.stack([some[seed] for seed in range(10)]) for some in starts.values())
    assert f"{np.sqrt(np.mean((one - other) ** 2)):.2f}" == "0.05"
    assert "starting losses by 0.05 nats (root mean square)" in " ".join(section().split())


def test_a_processor_core_and_the_gpu_agree_as_is_told():
    (path,) = (RESULTS / "deep-legal-cpu/cells").glob("*.json")
    one, other = (json.loads(p.read_text("utf-8"))["cell"] for p in (path, RESULTS / "deep-legal/cells" / path.name))
    assert (one["arm"], one["seed"]) == (other["arm"], other["seed"]) == ("random", 0)
    pairs = zip(*(cell["points"][0]["metrics"].values() for cell in (one, other)), strict=True)
    apart = max(abs(a[key] - b[key]) for a, b in pairs for key in ("loss_before", "loss_after", "kl"))
    assert f"{apart:.0e}" == "4e-05"
    assert "agree to 4e-5 nats after the lesson and 30 steps (`docs/results/deep-legal-cpu`)" in " ".join(
        section().split()
    )


def test_on_how_many_seeds_random_at_the_same_cost_gains_nothing():
    (arm,) = (one for one in found("deep-medical")["arms"] if one["name"] == "random_total")
    assert sum(volume == 0 for volume in arm["volumes"]) == 8
    assert "on eight of ten seeds that arm gains nothing on held-out rows" in " ".join(section().split())
