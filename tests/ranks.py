"""A few forked processes that meet as ranks of torchrun would, for tests of what they do together."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

from gradsift.launch.lockstep import Lockstep, in_lockstep
from gradsift.launch.seat import Seat


def together(work: Callable[..., Any], *arguments: Any, world: int = 2, seconds: float = 100.0) -> list[Any]:
    """Call ``work(lockstep, *arguments)`` in every rank, and give what each returned or the error that it ended with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(world)]
    ranks = [
        context.Process(target=_rank, args=(number, world, port, pipes[number][1], work, arguments))
        for number in range(world)
    ]
    try:
        for rank in ranks:
            rank.start()
        for _, theirs in pipes:
            theirs.close()
        return [_receive(ours, seconds) for ours, _ in pipes]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _receive(pipe: Any, seconds: float) -> Any:
    assert pipe.poll(seconds), "a rank waits for ever"
    try:
        return pipe.recv()
    except EOFError:
        return None  # it was killed


def _rank(number: int, world: int, port: int, pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE=str(world))
    seat = Seat("torchrun", number, world, number, fsdp=True)
    try:
        with in_lockstep(seat, "cpu", lambda rows, tokens: None) as lockstep:
            pipe.send(work(lockstep, *arguments))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(error)


def share(lockstep: Lockstep, model: Any) -> Any:
    """Deal a model's weights over the ranks, and give it back."""
    from gradsift.gradients.taps import find_layers
    from gradsift.models.shard import shard_model

    lockstep.in_turn(lambda: shard_model(model, find_layers(model), lockstep.mesh))
    return model
