"""Ranks that hold one model together: each measures its own rows, and all call the model at the same time (ours).

Before a rank calls the model it says so, and so does a rank that has nothing to measure, which then calls it with two
tokens of padding and drops what comes out. So a rank may measure, commit or wait as it likes, and still all take part in
gathering the weights of every layer. What is said travels over a process group of its own on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gradsift.errors import LaunchError
from gradsift.gradients.calls import backward_to, bind
from gradsift.launch.seat import Seat

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from gradsift.models.shard import Sharded

IDLE, OVER, TURN, FORWARD, BACKWARD = range(5)  # BACKWARD + n: a backward that ends where layer n begins
LONGEST = timedelta(days=7)  # a rank may commit or wait for long; those that die close their connections
SHORT_SECONDS, LONG_SECONDS = 1e-4, 5e-3  # pauses between two looks for the others


@dataclass
class Counts:
    """What a rank did, for the manifest.

    Args:
        local_bytes: weights that it holds at any time.
        num_steps: calls of the model for rows of its own.
        num_padded: calls with padding for the sake of the others; their results are dropped.
    """

    local_bytes: int = 0
    num_steps: int = 0
    num_padded: int = 0


class Lockstep:
    """The ranks of a run that call one model together; made by :func:`in_lockstep`.

    Args:
        seat: this process among the others.
        group: of all ranks, on the CPU.
        mesh: of all ranks, on the device where the weights are.
        tick: called while waiting; raises to stop.
    """

    def __init__(self, seat: Seat, group: Any, mesh: DeviceMesh, tick: Callable[[int, int], None]) -> None:
        self.seat, self.mesh, self.counts = seat, mesh, Counts()
        self.all_counts: tuple[Counts, ...] = ()
        self.sharded: Sharded | None = None
        self.over = False
        self._group, self._tick, self._padding = group, tick, False

    @property
    def device(self) -> str:
        """Where the weights are."""
        import torch

        return "cpu" if self.mesh.device_type == "cpu" else f"cuda:{torch.cuda.current_device()}"

    def in_turn(self, load: Callable[[], Sharded]) -> None:
        """Load the model, one rank of a machine after the other, so that it is whole in its main memory once at a time.

        Args:
            load: gives this rank's part of the model.
        """
        for turn in range(max(self._gather([self.seat.local_rank]))[0] + 1):
            if turn == self.seat.local_rank:
                self.sharded = load()
                self.counts.local_bytes = self.sharded.local_bytes
                bind(self.sharded.model, self._around)
            self._say(TURN)

    def follow(self) -> bool:
        """Take part in what other ranks do, with nothing to measure here.

        Returns:
            True where a rank measured; False where nobody has anything to measure, or rank 0 has all signals.

        Raises:
            LaunchError: a rank is gone.
        """
        if self.over or self.sharded is None:
            return False
        code = self._say(IDLE)
        if code == OVER:
            self._count()
        elif code != IDLE:
            self._pad(code)
        return code not in (IDLE, OVER)

    def end(self) -> None:
        """Let the other ranks go: rank 0 has all signals and calls the model no more."""
        if self.sharded is not None and not self.over:
            self._say(OVER)
            self._count()

    def summary(self) -> dict[str, Any]:
        """Tell the manifest what every rank held and did; after :meth:`end`."""
        if self.sharded is None:
            return {}
        return {
            "whole_bytes": self.sharded.whole_bytes,
            "local_bytes": [one.local_bytes for one in self.all_counts],
            "num_steps": [one.num_steps for one in self.all_counts],
            "num_padded": [one.num_padded for one in self.all_counts],
        }

    def _count(self) -> None:
        self.over = True
        mine = [self.counts.local_bytes, self.counts.num_steps, self.counts.num_padded]
        self.all_counts = tuple(Counts(*line) for line in self._gather(mine))

    @contextmanager
    def _around(self, first: int | None) -> Iterator[None]:
        """What the engine enters for one micro-batch of this rank's rows."""
        if self.over:
            raise AssertionError("the other ranks have gone home, and their part of the model with them")
        self._say(FORWARD if first is None else BACKWARD + first)
        self.counts.num_steps += 1
        with self._called(first):
            yield

    @contextmanager
    def _called(self, first: int | None) -> Iterator[None]:
        from gradsift.models.shard import give_back

        assert self.sharded is not None
        if first is None:
            yield
            give_back(self.sharded.model)  # a backward would have done it
            return
        with backward_to(self.sharded.layers[first]):
            yield

    def _pad(self, code: int) -> None:
        """Call the model as the others do, with padding."""
        import torch

        assert self.sharded is not None
        self.counts.num_padded += 1
        first = None if code == FORWARD else code - BACKWARD
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        with self._called(first), torch.set_grad_enabled(first is not None):
            logits = self.sharded.model(input_ids=ids, use_cache=False).logits
            if first is not None:
                torch.autograd.backward(logits, torch.zeros_like(logits))

    def _say(self, code: int) -> int:
        """Say what this rank does next, and hear what all do."""
        said = [one for (one,) in self._gather([code])]
        busy = sorted(set(said) - {IDLE})
        if len(busy) > 1:
            raise LaunchError(
                "the ranks do not call the model for the same purpose", where=f"rank {self.seat.rank}",
                got=f"{said}, by rank", do="give all ranks the same command, files and versions",
            )  # fmt: skip
        return busy[0] if busy else IDLE

    def _gather(self, values: list[int]) -> list[list[int]]:
        import torch
        from torch import distributed

        mine = torch.tensor(values, dtype=torch.int64)
        out = torch.empty(self.seat.world * len(values), dtype=torch.int64)
        try:
            work = distributed.all_gather_single(out, mine, group=self._group, async_op=True)
            assert work is not None
            pause = SHORT_SECONDS
            while not work.is_completed():  # not wait(), which no signal would interrupt
                self._tick(0, 0)
                time.sleep(pause)
                pause = min(LONG_SECONDS, pause * 2)
            work.wait()
        except RuntimeError as error:
            raise _gone(self.seat, error) from error
        return out.view(self.seat.world, -1).tolist()


@contextmanager
def in_lockstep(seat: Seat, device: str, tick: Callable[[int, int], None]) -> Iterator[Lockstep]:
    """Meet the other ranks of torchrun.

    Args:
        seat: this process among the others.
        device: cpu, or cuda:N of this rank.
        tick: called while waiting; raises to stop.

    Yields:
        The ranks, none of which has a model yet.

    Raises:
        LaunchError: they cannot be reached, or one of them is gone.
    """
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    cuda = device != "cpu"
    if cuda:
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=LONGEST)
        group = distributed.new_group(backend="gloo", timeout=LONGEST)
        mesh = init_device_mesh("cuda" if cuda else "cpu", (seat.world,))
    except (RuntimeError, ValueError) as error:
        raise _gone(seat, error) from error
    try:
        yield Lockstep(seat, group, mesh, tick)
    except RuntimeError as error:
        if _is_lost(error):
            raise _gone(seat, error) from error
        raise
    finally:
        # The end of the connections is what tells the others, so it may not wait for a collective that they left.
        if not cuda or not _failing():
            distributed.destroy_process_group()


def _failing() -> bool:
    import sys

    return sys.exc_info()[0] is not None


def _is_lost(error: BaseException) -> bool:
    text = str(error)
    return any(word in text for word in ("gloo", "Gloo", "NCCL", "Connection", "connection"))


def _gone(seat: Seat, error: BaseException) -> LaunchError:
    return LaunchError(
        "another rank is gone, and the model with it",
        where=f"rank {seat.rank} of {seat.world}, --fsdp",
        got=" ".join(str(error).split())[:200],
        expected="all ranks until the end of the pass",
        do="run the same command again; what was committed or staged is kept",
    )
