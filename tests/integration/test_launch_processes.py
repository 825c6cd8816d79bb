"""One pass by several processes: torchrun, Slurm's variables, kills; the store and the choice are those of one process."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from tests.launched import check_equal, check_redone, finish, measured, script, start, torchrun, wait_for, words
from tests.rows import world

NUM_UNITS = 60

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    world(folder, 300)
    return folder


@pytest.fixture(scope="module")
def whole(files: Path, navigator: Path) -> Path:
    """What one process makes of it."""
    out = files / "whole"
    finish(start(script(*words(files, navigator, out)), files / "log-whole"))
    check_redone(files / "log-whole", NUM_UNITS, 0)
    return out


def tally(out: Path) -> dict:
    state = json.loads((out / "launch" / "run.json").read_text())
    assert state["end"] == "done"
    return state["tally"]


@pytest.fixture(scope="module")
def together(files: Path, navigator: Path) -> tuple[Path, Path, str]:
    """Run folder, log and words of two ranks under torchrun."""
    out, log = files / "together", files / "log-together"
    return out, log, finish(start(torchrun(2, *words(files, navigator, out)), log, slow=0.05))


def test_two_ranks_of_torchrun(together, whole):
    out, log, text = together
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 0)
    assert len({pid for pid, _ in measured(log)}) == 2, "both ranks must have measured, or the test shows nothing"
    found = tally(out)
    assert found["num_here"] + found["num_adopted"] == found["num_units"] == NUM_UNITS
    assert f"rank 1 of 2: measured {found['num_adopted']} units" in text


@pytest.mark.slow
def test_the_same_command_again_measures_nothing(together, files, whole, navigator):
    out, log, _ = together
    assert "rank 1 of 2: measured 0 units" in finish(start(torchrun(2, *words(files, navigator, out)), log))
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 0)


@pytest.mark.slow
def test_a_planted_defect_is_seen(files, whole, navigator, tmp_path):
    """Without claims the store is right all the same, since the writer takes each row once, but work is done twice."""
    out, log = tmp_path / "run", tmp_path / "log"
    finish(start(torchrun(2, *words(files, navigator, out)), log, slow=0.05, DEFECT="everyone has every unit"))
    check_equal(out, whole)
    with pytest.raises(AssertionError):
        check_redone(log, NUM_UNITS, 0)


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_and_the_next_run_by_one_process(files, whole, navigator, tmp_path):
    """torchrun ends the other rank too; the next run finds what was staged, whatever starts it."""
    out, log = tmp_path / "run", tmp_path / "log"
    command = words(files, navigator, out)
    process = start(torchrun(2, *command), log, slow=0.15)

    def victim() -> int | None:
        notes = [json.loads(path.read_text()) for path in out.glob("launch/*/beats/1-*.json")]
        return next((n["pid"] for n in notes if sum(pid == n["pid"] for pid, _ in measured(log)) >= 3), None)

    os.kill(wait_for(victim, process=process), signal.SIGKILL)
    finish(process, None)
    assert 0 < len({key for _, key in measured(log)}) < NUM_UNITS
    finish(start(script(*command, "--launcher", "inline"), log))
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 2, at_least=1)


def array(index: int, count: int) -> dict[str, str]:
    values = {"ID": index, "MIN": 1, "MAX": count, "STEP": 1, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.slow
def test_an_index_of_a_slurm_array_killed_and_its_unit_taken_over(files, whole, navigator, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = script(*words(files, navigator, out, "--launcher", "slurm-array"))
    tasks = [start(command, log, slow=0.1, **array(index, 2)) for index in (1, 2)]
    wait_for(lambda: sum(pid == tasks[1].pid for pid, _ in measured(log)) >= 3, process=tasks[1])
    tasks[1].kill()
    finish(tasks[1], -signal.SIGKILL)
    text = finish(tasks[0])
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 1)
    found = tally(out)
    assert found["num_freed"] <= 1
    if found["num_freed"]:  # the kill may also have come between two units
        assert "measured again, since the process that had them was gone: rank 1" in " ".join(text.split())


@pytest.mark.slow
def test_rank_0_killed_the_others_say_so_and_what_they_staged_is_kept(files, whole, navigator, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = words(files, navigator, out)
    ranks = [start(script(*command), log, slow=0.1, SLURM_PROCID=str(n), SLURM_NTASKS="2") for n in (0, 1)]
    wait_for(lambda: sum(pid == ranks[1].pid for pid, _ in measured(log)) >= 3, process=ranks[1])
    ranks[0].kill()
    finish(ranks[0], -signal.SIGKILL)
    text = finish(ranks[1], 1)
    assert "rank 0 is gone" in text
    assert "run the same command again" in text
    before = {key for _, key in measured(log)}
    assert len(before) < NUM_UNITS
    text = finish(start(script(*command), log))
    assert "rows that workers of an earlier run had measured" in text
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 1)


@pytest.mark.slow
def test_a_rank_with_other_rows_is_refused(files, navigator, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    other = tmp_path / "other"
    other.mkdir()
    world(other, 299)
    first = start(script(*words(files, navigator, out)), log, slow=0.1, RANK="0", WORLD_SIZE="2")
    second = start(script(*words(other, navigator, out)), log, RANK="1", WORLD_SIZE="2")
    assert "this process does not measure what rank 0 measures" in finish(second, 2)
    finish(first)
    check_redone(log, NUM_UNITS, 0)


@pytest.mark.slow
def test_the_passes_at_every_checkpoint_are_shared_and_rank_0_alone_trains(files, navigator, tmp_path):
    """less measures at two checkpoints of a training: two passes, the last one with what the selection reads."""
    out, alone, log = tmp_path / "run", tmp_path / "alone", tmp_path / "log"
    method = ("--method", "less", "--set", "collect.rows_per_shard=25")
    finish(start(script(*words(files, navigator, alone, *method)), tmp_path / "log-alone"))
    finish(start(torchrun(2, *words(files, navigator, out, *method)), log, slow=0.1))
    check_equal(out, alone)
    check_equal(out, alone, "signals-epoch-2")
    assert len({pid for pid, _ in measured(log)}) == 2
    state = json.loads((out / "launch" / "run.json").read_text())
    assert state["passes"] == ["signals-epoch-2", "signals"]
    assert len(measured(log)) == state["tally"]["num_units"] == 2 * 12
    assert len(list((out / "warmup").iterdir())) == len(list((alone / "warmup").iterdir()))


@pytest.mark.slow
def test_sigterm_ends_a_worker_at_once_and_rank_0_goes_on(files, whole, navigator, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = script(*words(files, navigator, out))
    ranks = [start(command, log, slow=0.15, SLURM_PROCID=str(n), SLURM_NTASKS="2") for n in (0, 1)]
    wait_for(lambda: sum(pid == ranks[1].pid for pid, _ in measured(log)) >= 2, process=ranks[1])
    begun = time.monotonic()
    ranks[1].terminate()
    assert "stopped by signal 15" in finish(ranks[1], 128 + signal.SIGTERM)
    assert time.monotonic() - begun < 10
    finish(ranks[0])
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 1)
