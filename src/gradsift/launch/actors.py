"""Ray core actors as workers: Ray places and replaces processes; units, claims and results go through files.

Only plain settings travel to an actor and only counts travel back, so the object store stays empty. Ray's own restarts
are not used: a dead actor is replaced by a new one with a number of its own, and its unit is given out again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradsift.errors import DependencyError, LaunchError
from gradsift.launch.board import Board
from gradsift.launch.seat import Seat

END_SECONDS = 5.0
Serve = Callable[[Mapping[str, Any], Path, Mapping[str, Any], str, str], dict[str, int]]


class Actors:
    """The actors of a run.

    Args:
        seat: of the driver; ``world`` is the number of actors.
        serve: what an actor does, a function of a module: (recipe, out, seat, run, folder to work in) -> counts.
        recipe: the run's settings as plain values.
        out: the run folder, which every machine of the cluster must see under this path.
        gpu: whether an actor needs a GPU of its own.

    Raises:
        DependencyError: Ray is not installed.
    """

    def __init__(self, seat: Seat, serve: Serve, recipe: Mapping[str, Any], out: Path, *, gpu: bool) -> None:
        try:
            import ray
        except ImportError:
            raise DependencyError(
                "--launcher ray needs Ray", where="--launcher ray", got="not installed",
                do="pip install 'gradsift[ray]', or use torchrun",
            ) from None  # fmt: skip
        self._ray: Any = ray
        self._seat, self._serve, self._recipe, self._out, self._gpu = seat, serve, dict(recipe), out.resolve(), gpu
        self._running: dict[Any, tuple[int, Any]] = {}
        self._board: Board | None = None
        self._started = 0
        self._since = time.monotonic()
        self._ours = False
        self._progress = self._fruitless = 0
        self.num_replaced = 0

    def begin(self, board: Board) -> None:
        """Connect to Ray, or start it on this machine, and start the actors.

        Args:
            board: the run's meeting place.
        """
        self._board = board
        if not self._ray.is_initialized():
            self._ours = True
            self._connect()
        self._since = time.monotonic()
        for _ in range(self._seat.world):
            self._start()

    def tend(self, progress: int) -> None:
        """Replace actors that died.

        Args:
            progress: of the run; deaths are counted anew when it has grown.

        Raises:
            LaunchError: an actor failed with an error, which another one would meet too; too many died; none began.
        """
        self._refuse_none()
        if progress > self._progress:
            self._progress, self._fruitless = progress, 0
        refs = list(self._running)
        done = self._ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
        for ref in done:
            rank, _ = self._running.pop(ref)
            try:
                self._ray.get(ref)
            except self._ray.exceptions.RayActorError:
                self.num_replaced += 1
                self._fruitless += 1
                if self._fruitless > 3 * self._seat.world:
                    raise LaunchError(
                        "Ray actors die again and again", where=f"actor {rank}",
                        got=f"{self._fruitless} deaths and not one unit measured",
                        do="look into Ray's logs, most often memory ran out; what was committed is kept",
                    ) from None  # fmt: skip
                self._start()
            except self._ray.exceptions.RayTaskError as error:
                raise LaunchError(
                    "a Ray actor failed", where=f"actor {rank}", got=_last_words(str(error)),
                    do="mend what it says, or run the same command with --launcher inline; what was committed is kept",
                ) from None  # fmt: skip

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cluster = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": self._seat.world, "include_dashboard": False}
        before = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(log_to_driver=False, logging_level="ERROR", **cluster)
        except (OSError, RuntimeError, ValueError) as error:
            raise LaunchError(
                "Ray does not start", where=os.environ.get("RAY_ADDRESS") or "a Ray of this machine",
                got=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
                do="check RAY_ADDRESS and ray status, or use torchrun; what was committed is kept",
            ) from error  # fmt: skip
        _set_sigterm(before)

    def _refuse_none(self) -> None:
        """Refuse to wait for ever for actors that Ray has no room for."""
        assert self._board is not None
        if time.monotonic() - self._since < self._seat.join_seconds:
            return
        if all(path.name.startswith("0-") for path in self._board.beats.iterdir()):
            raise LaunchError(
                "no Ray actor has begun", where="--launcher ray", got=f"nothing for {self._seat.join_seconds:.0f} s",
                expected=f"room for actors of 1 CPU{' and 1 GPU' if self._gpu else ''}",
                do="look at ray status; give fewer --workers, or --wait SECONDS where the cluster is busy",
            )  # fmt: skip

    def end(self) -> None:
        """Let the actors go home, end those that do not, and leave Ray as it was found."""
        refs = list(self._running)
        if refs:
            self._ray.wait(refs, num_returns=len(refs), timeout=END_SECONDS)
        for _, actor in self._running.values():
            self._ray.kill(actor)
        self._running.clear()
        if self._ours:
            before = signal.getsignal(signal.SIGTERM)
            self._ray.shutdown()
            _set_sigterm(before)
            self._ours = False

    def _start(self) -> None:
        assert self._board is not None
        self._started += 1
        serve = self._serve

        class Measuring:
            """One worker process."""

            def run(self, *arguments: Any) -> dict[str, int]:
                return serve(*arguments)

        seat = {**asdict(self._seat), "rank": self._started, "world": self._started + 1}
        actor = self._ray.remote(num_cpus=1, num_gpus=int(self._gpu), max_restarts=0)(Measuring).remote()
        ref = actor.run.remote(self._recipe, self._out, seat, self._board.run, str(Path.cwd()))
        self._running[ref] = (self._started, actor)


def _set_sigterm(handler: Any) -> None:
    """Set it again: Ray puts its own in place as it starts and none as it ends, below Python; ours ends a run in good order."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _last_words(traceback: str) -> str:
    """Keep of a traceback where it happened and what it said: our errors have several lines, others one."""
    lines = traceback.strip().splitlines()
    places = [at for at, line in enumerate(lines) if line.lstrip().startswith("File ")]
    return "\n".join(line.strip() for line in lines[places[-1] if places else -1 :])
