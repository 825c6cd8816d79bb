"""Which of several processes this one is, read from the variables that torchrun, accelerate and Slurm set (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gradsift.errors import ConfigError

LAUNCHERS = ("auto", "inline", "torchrun", "slurm-array", "ray")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP")


@dataclass(frozen=True)
class Seat:
    """This process among those of a run.

    Args:
        launcher: inline (one process), torchrun (ranks started by someone else), slurm-array or ray.
        rank: 0 commits and writes the results, others only measure.
        world: number of ranks; with ray, number of actors.
        local_rank: number of the rank on its machine, which picks its GPU.
        join_seconds: how long a worker waits for rank 0 to begin.
        gone_seconds: without a sign of life for so long, a process counts as gone.
        fsdp: whether the ranks hold one navigator together.
    """

    launcher: str = "inline"
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    join_seconds: float = 300.0
    gone_seconds: float = 60.0
    fsdp: bool = False

    @property
    def commits(self) -> bool:
        """Whether this process commits shards and writes results."""
        return self.rank == 0

    def device(self, wanted: str, num_gpus: int) -> str:
        """Give every rank of a machine its own GPU, round robin.

        Args:
            wanted: the recipe's device: auto, cpu, cuda or cuda:N.
            num_gpus: CUDA devices that this process sees.

        Returns:
            ``cuda:k`` for auto and cuda where there are GPUs, else what was wanted.
        """
        if wanted not in ("auto", "cuda") or not num_gpus:
            return wanted
        return f"cuda:{self.local_rank % num_gpus}"


def find_seat(
    launcher: str,
    workers: int | None,
    environment: Mapping[str, str],
    *,
    join_seconds: float = 300.0,
    fsdp: bool = False,
) -> Seat:
    """Tell which process this is.

    Args:
        launcher: what the user asked for; ``auto`` looks for the variables of torchrun, accelerate or Slurm's ``srun``.
        workers: number of Ray actors; elsewhere the processes are counted by whoever starts them.
        environment: ``os.environ``.
        join_seconds: how long a worker waits for rank 0 to begin.
        fsdp: the ranks are to hold one navigator together.

    Returns:
        The seat; ``inline`` where there is one process.

    Raises:
        ConfigError: an unknown launcher, workers without Ray, variables that do not fit each other, or one navigator for
            ranks that cannot meet.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError("no such launcher", where="--launcher", got=launcher, expected=" | ".join(LAUNCHERS))
    seat = _find(launcher, workers, environment, join_seconds)
    if not fsdp:
        return seat
    missing = [name for name in _MEETING if not environment.get(name)]
    if seat.launcher != "torchrun" or missing:
        raise ConfigError(
            "the ranks that hold one navigator together must meet", where="--fsdp and --launcher",
            got=f"{seat.launcher}{' without ' + ' and '.join(missing) if seat.launcher == 'torchrun' else ''}",
            expected="two or more ranks of torchrun or accelerate",
            do="torchrun --nproc-per-node N -m gradsift select ... --fsdp, or leave --fsdp out",
        )  # fmt: skip
    return replace(seat, fsdp=True)


def _find(launcher: str, workers: int | None, environment: Mapping[str, str], join_seconds: float) -> Seat:
    if workers is not None and (launcher != "ray" or workers < 1):
        raise ConfigError(
            "--workers counts Ray actors", where="--workers", got=f"{workers} with --launcher {launcher}",
            expected="a number of at least 1 with --launcher ray",
            do="use --launcher ray, or start the processes with torchrun --nproc-per-node N -m gradsift select ...",
        )  # fmt: skip
    if launcher == "ray":
        return Seat("ray", world=workers or 1, join_seconds=join_seconds)
    if launcher == "slurm-array":
        return _array(environment, join_seconds)
    found = {} if launcher == "inline" else _ranks(environment)
    if found:
        return _checked("torchrun", found, join_seconds)
    if launcher == "torchrun":
        raise ConfigError(
            "this process was not started by torchrun", where="RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS",
            got="not set", do="torchrun --nproc-per-node N -m gradsift select ..., or srun -n N gradsift select ...",
        )  # fmt: skip
    return Seat()


def _ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The rank's variables by torchrun's names; torchrun's own win over Slurm's, under which torchrun may run."""
    for names in (_TORCHRUN, _SLURM):
        rank, world, local = (environment.get(name) for name in names)
        if rank is not None and world is not None:
            return {names[0]: rank, names[1]: world, names[2]: local or "0"}
    return {}


def _array(environment: Mapping[str, str], join_seconds: float) -> Seat:
    missing = [name for name in _ARRAY[:3] if name not in environment]
    if missing:
        raise ConfigError(
            "this process is no task of a Slurm array", where=", ".join(missing), got="not set",
            do="submit with sbatch --array=0-7 and call gradsift select ... --launcher slurm-array in the script",
        )  # fmt: skip
    index, low, high, step = (_number(name, environment.get(name, "1")) for name in _ARRAY)
    if step < 1 or (index - low) % step:
        raise ConfigError("the array's indices do not fit each other", where=", ".join(_ARRAY),
                          got=f"{index} of {low}-{high}:{step}", do="submit with sbatch --array=0-7")  # fmt: skip
    found = {_ARRAY[0]: str((index - low) // step), "SLURM_ARRAY_TASK_MAX": str((high - low) // step + 1), "": "0"}
    return _checked("slurm-array", found, join_seconds)


def _checked(launcher: str, found: Mapping[str, str], join_seconds: float) -> Seat:
    names = list(found)
    rank, world, local = (_number(name, found[name]) for name in names)
    if not 0 <= rank < world:
        raise ConfigError(
            "the rank does not fit the number of ranks", where=f"{names[0]} and {names[1]}", got=f"{rank} of {world}",
            expected="0 <= rank < number of ranks", do="start all ranks by one torchrun or srun",
        )  # fmt: skip
    if world == 1:
        return Seat()
    return Seat(launcher, rank, world, local, join_seconds)


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError("a rank's variable is no whole number", where=name, got=text, expected="0, 1, 2, ...",
                          do="start with torchrun or srun, or give --launcher inline") from None  # fmt: skip
