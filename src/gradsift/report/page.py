"""The report: one HTML file made of a finished run folder, without script and without the network (ours)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gradsift.manifest import write_bytes_atomic
from gradsift.report import figures, policy_charts, policy_view, policy_words, view, words
from gradsift.report.fields import Manifest, Shown
from gradsift.report.mixture import mixture_lines
from gradsift.report.run import Run, read_run
from gradsift.report.svg import require_charts

CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SHOWN_IDS = 200


@dataclass(frozen=True)
class Card:
    """An example on the page.

    Args:
        row: the example.
        pieces: its text, clipped; empty when texts are hidden.
        num_chars: characters of the whole text.
        num_trained_chars: characters of it that carry loss.
    """

    row: Shown
    pieces: tuple[words.Piece, ...]
    num_chars: int
    num_trained_chars: int


def render_report(run: Path, *, redact: bool = False) -> Path:
    """Write report.html of a finished run; a function of the folder's content alone.

    Args:
        run: folder with manifest.json, selection/audit.parquet and, optionally, selection/examples.json.
        redact: hide the texts of examples. Ids, labels, paths and numbers stay.

    Returns:
        The path of report.html, replaced at once.

    Raises:
        DependencyError: the extra ``[report]`` is absent.
        ConfigError: the folder holds no finished run.
        StoreError: a file of the run is damaged, or the disk refuses the write.
    """
    require_charts()
    html = render_html(read_run(run), redact=redact)
    target = run / "report.html"
    write_bytes_atomic(target, html.encode("utf-8"))
    return target


def render_html(run: Run, *, redact: bool = False) -> str:
    """Write the page as text.

    Args:
        run: a finished run.
        redact: hide the texts of examples.

    Returns:
        HTML, the same for the same run.
    """
    examples = None if run.examples is None else [_card(row, redact) for row in run.examples]
    template = _environment().get_template("report.html.jinja")
    return template.render(
        csp=CSP,
        run=run,
        m=run.manifest,
        audit=run.audit,
        fig=_figures(run),
        view=view,
        words=words,
        kept=None if examples is None else [card for card in examples if card.row.selected],
        dropped=None if examples is None else [card for card in examples if not card.row.selected],
        redact=redact,
        shown_ids=SHOWN_IDS,
        reads=_reading(run.manifest),
        policy=_policy(run),
        mixture=mixture_lines(run.manifest, view.sources(run.audit)),
    )


def _figures(run: Run) -> dict[str, Any]:
    return {
        "sources": figures.source_shares(run.audit),
        "distributions": figures.distributions(run.audit),
        "cosines": figures.cosines(run),
        "plane": figures.target_against_anchors(run),
        "scores": figures.scores(run),
        "batches": figures.batches(run.manifest),
        "sets": figures.sets(run.manifest),
        "seconds": figures.stage_seconds(run.manifest),
    }


def _policy(run: Run) -> dict[str, Any] | None:
    """What the section on the policy shows; None where no policy chose."""
    found = run.details
    if found is None:
        return None
    on = run.manifest.selection.config.get("on", "simulator")
    return {
        "sentences": (policy_words.simulator_words(found), *policy_words.other_notes(found)),
        "learning": policy_words.training_words(found, on),
        "headline": policy_words.headline(found),
        "colors": policy_charts.colors(found),
        "contest": policy_charts.contest(found),
        "training": policy_charts.training(found),
        "mix": policy_charts.mix(found),
        "limits": policy_view.limits_grid(found),
        "tried": policy_view.contest_grids(found, wide=True),
        "clusters": policy_view.clusters_grids(found, wide=True),
    }  # fmt: skip


def _reading(manifest: Manifest) -> dict[str, float | None]:
    """Sums that the page shows: seconds of all stages, tokens fed to the navigator, share of tokens kept."""
    seconds = [value for value in manifest.cost.seconds.values() if value is not None]
    tokens = [value for value in manifest.cost.tokens.values() if value is not None]
    return {
        "seconds": sum(seconds) if seconds else None,
        "tokens": sum(tokens) if tokens else None,
        "rows_share": words.share(manifest.selection.num_rows, manifest.rows.read),
        "tokens_share": words.share(manifest.selection.num_trained, manifest.rows.trained_tokens),
    }


def _card(row: Shown, redact: bool) -> Card:
    segments = list(row.segments)
    return Card(
        row,
        () if redact else words.clip(segments),
        sum(len(text) for text, _ in segments),
        sum(len(text) for text, trained in segments if trained),
    )


def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("gradsift.report", "templates"),
        autoescape=True,  # jinja2 leaves it off by default
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    named = (
        words.count,
        words.number,
        words.signed,
        words.percent,
        words.duration,
        words.size,
        words.one_line,
        words.plural,
        words.moment,
    )
    env.filters |= {function.__name__: function for function in named}
    env.filters |= {"plain": _plain, "picture": Markup, "sentence": words.sentence}
    return env


def _finalize(value: Any) -> Any:
    """Make invisible characters visible in every value that the template prints; escaping comes after."""
    if value is None:
        return words.UNKNOWN
    return words.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _plain(value: Any) -> str:
    """Write a setting for people: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
