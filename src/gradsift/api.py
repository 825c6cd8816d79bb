"""``gradsift.select``: the command line's words as Python arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsift.types import Selection


def select(
    pool: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    method: str,
    budget: str | int,
    out: str | Path,
    general: Mapping[str, str | Path] | None = None,
    anchors: Mapping[str, str | Path] | None = None,
    target: str | Path | None = None,
    navigator: str | Path = "auto",
    settings: Mapping[str, Any] | None = None,
    seed: int = 42,
    format: str = "auto",
    loss_on: str | None = None,
    dedup: str = "drop",
    recipe: str | Path | None = None,
    report: bool = True,
) -> Selection:
    """Choose the rows of a pool that teach the target and spare the anchors.

    Args:
        pool: a file or hub id, several, or a mapping of source label to file.
        method: registered name.
        budget: ``"10%"``, ``500`` or ``"20000tok"``.
        out: the run folder; the same call resumes a stopped run.
        general: source label -> file of general rows that may be chosen as replay (method ogs).
        anchors: name -> file of rows that stand for what must be kept.
        target: file of rows like those the model must get better at.
        navigator: ``auto``, hub id, local folder or GGUF file.
        settings: settings of the method, or dotted recipe fields.
        seed: seed of every random stream.
        format: shape of the rows.
        loss_on: assistant, completion or all; None takes the shape's default.
        dedup: drop or keep exact copies.
        recipe: YAML file; the arguments win over it.
        report: draw ``report.html`` when the extra ``[report]`` is installed.

    Returns:
        The selection; its files stand in ``out``.
    """
    from gradsift.cli.select import build, labelled
    from gradsift.errors import DependencyError
    from gradsift.pipeline import select as run

    if isinstance(pool, Mapping):
        sources = [{"label": label, "path": str(path)} for label, path in pool.items()]
    else:
        paths = [pool] if isinstance(pool, str | Path) else pool
        sources = [labelled(str(path), "pool") for path in paths]
    flags: list[tuple[str, Any]] = [
        ("pool", sources),
        ("general", [{"label": label, "path": str(path)} for label, path in (general or {}).items()] or None),
        ("anchors", [{"label": name, "path": str(path)} for name, path in (anchors or {}).items()] or None),
        ("target", None if target is None else str(target)),
        ("navigator.model", str(navigator)),
        *(settings or {}).items(),
        ("method.name", method),
        ("budget", str(budget)),
        ("seed", seed),
        ("data.format", format),
        ("data.loss_on", loss_on),
        ("data.dedup", dedup),
    ]
    built = build(Path(recipe) if recipe else None, [], [(k, v) for k, v in flags if v is not None])
    outcome = run(built, Path(out))
    if report:
        from gradsift.report.page import render_report

        try:
            render_report(Path(out))
        except DependencyError:
            report = False  # the extra is not installed; every other file is there
    return outcome.selection
