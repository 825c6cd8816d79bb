"""Stop signals where no micro-batch ends: the command ends in time, with its code and the line that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from gradsift.cli import screen as module
from gradsift.cli.screen import Screen
from gradsift.errors import Interrupted


def stuck(seconds: float = 20.0) -> None:
    """Do something that looks at no signal; end where one is raised into it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_looks_at_nothing_is_stopped_where_it_stands(monkeypatch, number):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    screen = Screen(Console(quiet=True), "gradsift select --out run")
    before = signal.getsignal(number)
    begun = time.monotonic()

    def deaf() -> None:
        with screen.watching_signals():
            os.kill(os.getpid(), number)
            stuck()

    with pytest.raises(Interrupted) as raised:
        deaf()
    assert time.monotonic() - begun < 5
    assert raised.value.exit_code == 128 + number
    assert "resume with: gradsift select --out run" in str(raised.value)
    assert signal.getsignal(number) is before


def test_one_that_looks_in_time_is_not_stopped_twice(monkeypatch):
    """Tidying up may take longer than the patience: nothing is raised into it."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    screen, tidied = Screen(Console(quiet=True), "again"), []

    def careful() -> None:
        with screen.watching_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                screen.advance(1, 1)
            finally:
                stuck(0.6)
                tidied.append(True)

    with pytest.raises(Interrupted):
        careful()
    assert tidied


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_before_anything_is_loaded_the_line_and_the_code_are_there(number):
    script = (
        "import sys, time, types\nimport gradsift.cli as cli\nslow = types.ModuleType('gradsift.cli.app')\n"
        "def run(words):\n  print('up', flush=True)\n  time.sleep(20)\nslow.run = run\n"
        "sys.modules['gradsift.cli.app'] = slow\nsys.argv = ['gradsift', 'select', '--out', 'run']\ncli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=15)
    assert process.returncode == 128 + number
    assert "resume with: gradsift select --out run" in said


def test_a_second_signal_ends_the_process_also_where_native_code_does_not_give_way():
    script = (
        "import os, re, signal, threading, time\nfrom rich.console import Console\nfrom gradsift.cli.screen import Screen\n"
        "def twice():\n  for _ in range(2):\n    time.sleep(0.3)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "with Screen(Console(quiet=True), 'gradsift again').watching_signals():\n"
        "  threading.Thread(target=twice, daemon=True).start()\n"
        "  try:\n    time.sleep(20)\n  finally:\n    time.sleep(20)\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert "resume with: gradsift again" in done.stderr
    assert time.monotonic() - begun < 15


def test_a_stop_is_not_taken_for_a_librarys_error(monkeypatch):
    """Loaders catch whatever a library raises and say what they think of the file; a stop goes through them."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    screen = Screen(Console(quiet=True), "gradsift select --out run")

    def loads() -> None:
        with screen.watching_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                stuck()
            except Exception as error:
                raise AssertionError("taken for an error of the library") from error

    with pytest.raises(Interrupted):
        loads()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_one_asked_to_stop_in_its_last_moments_does_not_end_with_code_0(number):
    """The page is being drawn: no micro-batch follows, and whoever sent the signal reads the code."""
    screen = Screen(Console(quiet=True), "gradsift select --out run")
    with pytest.raises(Interrupted) as raised, screen.watching_signals():
        os.kill(os.getpid(), number)
    assert raised.value.exit_code == 128 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("code", [0, 2])
def test_one_asked_to_stop_while_python_is_taken_down_ends_with_its_code_as_well(number, code):
    script = (
        "import atexit, os, sys, types\nimport gradsift.cli as cli\nquick = types.ModuleType('gradsift.cli.app')\n"
        f"def run(words):\n  atexit.register(lambda: os.kill(os.getpid(), {int(number)}))\n"
        f"  atexit.register(print, 'tidied')\n  return {code}\nquick.run = run\n"
        "sys.modules['gradsift.cli.app'] = quick\nsys.argv = ['gradsift', 'select', '--out', 'run']\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + number
    assert "resume with: gradsift select --out run" in done.stderr
    assert done.stdout == "tidied\n"


@pytest.mark.parametrize("code", [0, 1, 28])
def test_what_is_registered_for_the_end_is_done_and_the_code_kept(code):
    script = (
        "import atexit, sys, types\nimport gradsift.cli as cli\nquick = types.ModuleType('gradsift.cli.app')\n"
        f"def run(words):\n  atexit.register(print, 'tidied')\n  print('unflushed', end='')\n  return {code}\nquick.run = run\n"
        "sys.modules['gradsift.cli.app'] = quick\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "unflushedtidied\n")
