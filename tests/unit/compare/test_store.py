"""The folder: manifest first, cells whole or not at all, claims that outlive nobody."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest
from tests.fabricated import ROLES, cell, config, filed

from gradsift.compare.claiming import claim, holder
from gradsift.compare.store import (
    cell_key,
    declare,
    declared_config,
    file_cell,
    file_failure,
    forget_failures,
    read_cell,
    read_failure,
    read_manifest,
)
from gradsift.errors import ConfigError, StoreError
from gradsift.manifest import canonical_json, sha256_bytes
from gradsift.store.lock import me


def test_the_manifest_comes_first_and_holds_everything(tmp_path):
    folder = tmp_path / "a" / "b"
    found = declare(folder, config(), "gradsift compare --out b")
    got = read_manifest(folder)
    assert got["command"] == "gradsift compare --out b"
    assert got["config"]["world"]["settings"]["hidden"] == 16
    assert len(got["config_sha256"]) == 64
    assert {"date", "commit", "hardware", "versions"} <= set(got)
    assert declared_config(folder) == found == config()
    assert not list(folder.glob("cells/*"))


def test_changed_settings_are_refused_by_name(tmp_path):
    declare(tmp_path, config(), "first")
    for change, words in [
        ({"num_variants": 4}, "num_variants: declared 3, now 4"),
        ({"seeds": "0-11"}, "seeds: declared 0-9, now 0-11"),
        ({"grid": {**config().dump()["grid"], "budget": 13}}, "grid.budget: declared 12, now 13"),
    ]:
        with pytest.raises(ConfigError) as caught:
            declare(tmp_path, config(**change), "second")
        assert words in str(caught.value)
    assert read_manifest(tmp_path)["command"] == "first"
    assert declare(tmp_path, config(seeds="2-4"), "third").seeds == tuple(range(10))


def test_cells_without_a_manifest_are_refused(tmp_path):
    file_cell(tmp_path, "k-0", cell("ours", 0, [(0.5, 0.5)]), ROLES)
    with pytest.raises(StoreError, match="without manifest"):
        declare(tmp_path, config(), "late")


def test_a_cell_comes_back_the_same(tmp_path):
    one = cell("ours", 3, [(0.5, 0.25), (0.1, 1 / 3)], notes=("a\nnote",))
    broken = dataclasses.replace(one.points[0], extra={"x": math.inf, "y": -math.inf}, lr=0.1)
    one = dataclasses.replace(one, points=(*one.points, broken))
    assert read_cell(tmp_path, "k-3") is None
    file_failure(tmp_path, "k-3", "first it failed")
    file_cell(tmp_path, "k-3", one, ROLES)
    got = read_cell(tmp_path, "k-3")
    assert got is not None
    assert got.cell == one
    assert got.roles == ROLES
    assert read_failure(tmp_path, "k-3") is None
    nan = dataclasses.replace(broken, extra={"x": math.nan})
    file_cell(tmp_path, "k-4", dataclasses.replace(one, points=(nan,)), ROLES)
    back = read_cell(tmp_path, "k-4")
    assert back is not None
    assert math.isnan(back.cell.points[0].extra["x"])


def test_every_flipped_byte_is_noticed(tmp_path):
    file_cell(tmp_path, "k-0", cell("ours", 0, [(0.5, 0.5)]), ROLES)
    path = tmp_path / "cells" / "k-0.json"
    good = path.read_bytes()
    for place in range(0, len(good), 37):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(StoreError, match="damaged"):
            read_cell(tmp_path, "k-0")


def test_keys_tell_cells_apart_by_what_defines_them():
    plain = config()
    keys = {cell_key(plain, arm.name, seed) for arm in plain.arms for seed in plain.seeds}
    assert len(keys) == 40
    other = config(grid={**plain.dump()["grid"], "num_steps": 3})
    assert cell_key(other, "ours", 0) not in keys
    assert cell_key(config(num_variants=9, seeds="0-3"), "ours", 0) in keys
    arms = [{"name": "t", "method": "random", "total_of": "ours"}, *plain.dump()["arms"]]
    changed = [{**arm, "replay": 0.5} if arm["name"] == "ours" else arm for arm in arms]
    assert cell_key(config(arms=arms), "t", 0) != cell_key(config(arms=changed), "t", 0)


@pytest.mark.parametrize("name", ["real", "junk"])
def test_a_world_whose_rules_have_changed_has_other_keys(name):
    for domain, same in (("medical", True), ("financial", False)):
        found = config(metric="loss", world={"name": name, "settings": {"domain": domain}})
        parts = {"arm": found.arm("ours"), "world": found.world, "grid": found.grid}
        plain = {part: value.model_dump(mode="json") if value else None for part, value in parts.items()}
        old = f"{sha256_bytes(canonical_json(plain).encode('ascii'))[:16]}-0"
        assert (cell_key(found, "ours", 0) == old) == same


def test_one_claim_at_a_time(tmp_path):
    with claim(tmp_path, "k-0") as first:
        assert first
        assert holder(tmp_path, "k-0").pid == os.getpid()
        with claim(tmp_path, "k-0") as second, claim(tmp_path, "k-1") as other:
            assert (second, other) == (False, True)
        assert holder(tmp_path, "k-0") is not None, "a refused claim must not take the holder's away"
    assert holder(tmp_path, "k-0") is None
    with claim(tmp_path, "k-0") as again:
        assert again
        file_cell(tmp_path, "k-0", filed(cell("ours", 0, [(0.5, 0.5)])).cell, ROLES)
    with claim(tmp_path, "k-0") as done:
        assert not done


def test_a_claim_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path, "k-0"):
        raise ZeroDivisionError
    assert holder(tmp_path, "k-0") is None


def _write_lock(folder, note, age=0.0):
    (folder / "locks").mkdir(exist_ok=True)
    lock = folder / "locks" / "k-0.lock"
    lock.write_text(note if isinstance(note, str) else json.dumps(dataclasses.asdict(note)))
    os.utime(lock, (time.time() - age,) * 2)


def test_dead_claims_are_recovered_and_living_ones_are_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = me()
    elsewhere = dataclasses.replace(mine, boot="another kernel", host="another-" + socket.gethostname())
    for note, age, ours in [
        (dataclasses.replace(mine, pid=gone.pid), 0, True),  # it ended
        (dataclasses.replace(mine, process_start=1), 0, True),  # its number was given to another process
        (mine, 9999, False),  # it lives, however late its heartbeat
        (elsewhere, 5, False),  # another machine, heard of lately
        (elsewhere, 9999, True),  # another machine, silent
        ("", 0, False),  # being written
        ("", 9999, True),  # killed while it was written
    ]:
        _write_lock(tmp_path, note, age)
        with claim(tmp_path, "k-0") as got:
            assert got is ours, (note, age)
        (tmp_path / "locks" / "k-0.lock").unlink(missing_ok=True)


def test_failures_are_kept_until_the_next_run(tmp_path):
    assert read_failure(tmp_path, "k-0") is None
    file_failure(tmp_path, "k-0", "no replay rows")
    assert read_failure(tmp_path, "k-0") == "no replay rows"
    assert forget_failures(tmp_path) == 1
    assert read_failure(tmp_path, "k-0") is None
