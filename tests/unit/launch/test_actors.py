"""Ray actors without Ray's machinery: a stand-in module places, loses and fails them as it is told."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gradsift.errors import DependencyError, LaunchError
from gradsift.launch.actors import Actors, _last_words
from gradsift.launch.board import Board
from gradsift.launch.seat import Seat


class ActorDied(Exception):
    pass


class TaskFailed(Exception):
    pass


class FakeRay:
    """As much of Ray as the launcher uses; ``ends`` maps an actor's number to what became of it."""

    exceptions = SimpleNamespace(RayActorError=ActorDied, RayTaskError=TaskFailed)

    def __init__(self) -> None:
        self.ends: dict[int, Exception | None] = {}
        self.asked: list[dict] = []
        self.killed = self.shut = 0
        self.arguments: list[tuple] = []

    def is_initialized(self) -> bool:
        return True

    def remote(self, **options):
        self.asked.append(options)
        number = len(self.asked)

        def run(*arguments) -> int:
            self.arguments.append(arguments)
            return number

        return lambda cls: SimpleNamespace(remote=lambda: SimpleNamespace(run=SimpleNamespace(remote=run)))

    def wait(self, refs, num_returns, timeout):
        return [ref for ref in refs if ref in self.ends], [ref for ref in refs if ref not in self.ends]

    def get(self, ref):
        if self.ends[ref] is not None:
            raise self.ends[ref]
        return {}

    def kill(self, actor) -> None:
        self.killed += 1

    def shutdown(self) -> None:
        self.shut += 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def actors(folder: Path, world: int = 2, **seat) -> Actors:
    crew = Actors(Seat("ray", world=world, **seat), lambda *_: {}, {"seed": 1}, folder, gpu=True)
    board = Board(folder / "launch", "0" * 16)
    board.beats.mkdir(parents=True)
    crew.begin(board)
    return crew


def test_a_dead_actor_is_replaced_by_one_with_a_number_of_its_own(ray, tmp_path):
    crew = actors(tmp_path)
    ray.ends[1] = ActorDied()
    crew.tend(0)
    crew.tend(0)
    assert ray.asked == [{"num_cpus": 1, "num_gpus": 1, "max_restarts": 0}] * 3
    assert [arguments[2]["rank"] for arguments in ray.arguments] == [1, 2, 3]
    assert crew.num_replaced == 1
    ray.ends[3] = None  # it has gone home
    crew.tend(0)
    assert len(ray.asked) == 3
    crew.end()
    assert ray.killed == 1
    assert ray.shut == 0, "a Ray that was there before stays"


def test_only_plain_settings_travel(ray, tmp_path):
    actors(tmp_path, 1)
    recipe, out, seat, run, folder = ray.arguments[0]
    assert (recipe, out, run, folder) == ({"seed": 1}, tmp_path, "0" * 16, str(Path.cwd()))
    assert Seat(**seat) == Seat("ray", 1, 2)


def test_deaths_without_end_stop_the_run(ray, tmp_path):
    crew = actors(tmp_path, 1)
    for number in (1, 2, 3):
        ray.ends[number] = ActorDied()
        crew.tend(0)
    ray.ends[4] = ActorDied()
    with pytest.raises(LaunchError, match="die again and again"):
        crew.tend(0)


def test_an_error_in_an_actor_is_told_and_not_tried_again(ray, tmp_path):
    crew = actors(tmp_path, 1)
    ray.ends[1] = TaskFailed('Traceback:\n  File "a.py", line 1, in f\n  File "b.py", line 9, in g\nKeyError: x')
    with pytest.raises(LaunchError, match=r'File "b.py", line 9, in g\nKeyError: x'):
        crew.tend(0)
    assert len(ray.asked) == 1
    assert _last_words("no traceback\nat all") == "at all"


def test_no_room_for_any_actor_is_told_in_time(ray, tmp_path):
    crew = actors(tmp_path, 1, join_seconds=0.0)
    (tmp_path / "launch" / ("0" * 16) / "beats" / "0-77-aa.json").write_text("{}")
    with pytest.raises(LaunchError, match="no Ray actor has begun"):
        crew.tend(0)
    (tmp_path / "launch" / ("0" * 16) / "beats" / "1-78-bb.json").write_text("{}")
    crew.tend(0)


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"pip install 'gradsift\[ray\]'"):
        Actors(Seat("ray"), lambda *_: {}, {}, tmp_path, gpu=False)


def test_a_ray_that_does_not_start_is_a_refusal(ray, tmp_path, monkeypatch):
    def init(**options) -> None:
        assert options["num_cpus"] == 2
        raise ConnectionError("nobody there\nand a long tail")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(LaunchError, match="Ray does not start") as raised:
        actors(tmp_path)
    assert raised.value.got == "nobody there"


def test_a_ray_of_our_own_is_shut_down_and_our_signal_handler_stays(ray, tmp_path, monkeypatch):
    def init(**options) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def shutdown() -> None:
        ray.shut += 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    monkeypatch.setattr(ray, "init", init, raising=False)
    monkeypatch.setattr(ray, "shutdown", shutdown)
    before = signal.getsignal(signal.SIGTERM)
    crew = actors(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    crew.end()
    assert signal.getsignal(signal.SIGTERM) is before
    assert ray.shut == 1
    crew.end()
    assert ray.shut == 1
