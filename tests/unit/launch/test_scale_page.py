"""The page on scale: its commands have options that exist, and start what they are said to start."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer.main

from gradsift.cli.app import app
from gradsift.launch.seat import LAUNCHERS, find_seat

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "scale.md").read_text("utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "gradsift select" in line]
    return [shlex.split(line) for line in lines]


def test_every_option_of_the_commands_exists():
    select = typer.main.get_command(app).commands["select"]
    known = {name for parameter in select.params for name in parameter.opts}
    found = commands()
    assert [words[0] for words in found] == ["srun", "gradsift", "torchrun"]
    for words in found:
        given = {word for word in words[words.index("gradsift") :] if word.startswith("--")}
        assert given <= known, given - known
        assert {"--pool", "--out", "--method", "--budget"} <= given


def test_the_array_recipe_gives_every_index_its_rank():
    words = commands()[1]
    launcher = words[words.index("--launcher") + 1]
    low, high = map(int, re.search(r"--array=(\d+)-(\d+)", PAGE).groups())
    ranks = []
    for index in range(low, high + 1):
        values = {"ID": index, "MIN": low, "MAX": high, "STEP": 1}
        seat = find_seat(launcher, None, {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()})
        ranks.append((seat.rank, seat.world, seat.commits))
    assert ranks == [(n, high - low + 1, n == 0) for n in range(high - low + 1)]


def test_every_launcher_is_in_the_table():
    for name in set(LAUNCHERS) - {"auto"}:
        assert f"| `{name}` |" in PAGE
    assert "This was not run under Slurm." in PAGE
