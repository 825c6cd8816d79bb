"""Which process this is, by the variables of those who start processes."""

from __future__ import annotations

import pytest

from gradsift.errors import ConfigError
from gradsift.launch.seat import Seat, find_seat

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_STEP": "2",
}


@pytest.mark.parametrize(
    ("launcher", "environment", "expected"),
    [
        ("auto", {}, Seat()),
        ("auto", TORCHRUN, Seat("torchrun", 3, 8, 1)),
        ("torchrun", TORCHRUN, Seat("torchrun", 3, 8, 1)),
        ("auto", SRUN, Seat("torchrun", 5, 6, 2)),
        ("auto", {**SRUN, **TORCHRUN}, Seat("torchrun", 3, 8, 1)),
        ("inline", TORCHRUN, Seat()),
        ("auto", {"RANK": "0", "WORLD_SIZE": "1"}, Seat()),
        ("auto", {"RANK": "0"}, Seat()),
        ("auto", ARRAY, Seat()),
        ("slurm-array", ARRAY, Seat("slurm-array", 2, 4, 0)),
        ("slurm-array", {k: v for k, v in ARRAY.items() if "STEP" not in k}, Seat("slurm-array", 4, 7, 0)),
    ],
)
def test_seats(launcher, environment, expected):
    assert find_seat(launcher, None, environment) == expected


def test_an_array_over_other_things_is_not_taken_for_ranks():
    """An array of eight seeds is eight runs; only --launcher slurm-array makes one of it."""
    assert find_seat("auto", None, ARRAY).launcher == "inline"


def test_ray_counts_actors():
    assert find_seat("ray", 5, TORCHRUN) == Seat("ray", 0, 5)
    assert find_seat("ray", None, {}) == Seat("ray", 0, 1)
    assert find_seat("auto", None, TORCHRUN, join_seconds=7).join_seconds == 7


@pytest.mark.parametrize(
    ("launcher", "workers", "environment", "word"),
    [
        ("dask", None, {}, "no such launcher"),
        ("auto", 2, {}, "--workers counts Ray actors"),
        ("ray", 0, {}, "--workers counts Ray actors"),
        ("torchrun", None, {}, "not started by torchrun"),
        ("slurm-array", None, TORCHRUN, "no task of a Slurm array"),
        ("slurm-array", None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "4"}, "do not fit"),
        ("auto", None, {"RANK": "2", "WORLD_SIZE": "2"}, "does not fit the number of ranks"),
        ("auto", None, {"RANK": "-1", "WORLD_SIZE": "2"}, "does not fit the number of ranks"),
        ("auto", None, {"RANK": "one", "WORLD_SIZE": "2"}, "no whole number"),
    ],
)
def test_refusals(launcher, workers, environment, word):
    with pytest.raises(ConfigError, match=word):
        find_seat(launcher, workers, environment)


@pytest.mark.parametrize(
    ("wanted", "local", "gpus", "expected"),
    [
        ("auto", 3, 2, "cuda:1"),
        ("cuda", 0, 4, "cuda:0"),
        ("auto", 1, 0, "auto"),
        ("cpu", 1, 2, "cpu"),
        ("cuda:3", 1, 4, "cuda:3"),
    ],
)
def test_every_rank_of_a_machine_gets_a_gpu(wanted, local, gpus, expected):
    assert Seat("torchrun", local, 8, local).device(wanted, gpus) == expected
