"""What choosing rows cost beside fine-tuning on them: measured seconds, tokens and operations of every part (ogs.md 3.6).

Nothing is estimated: what a manifest does not hold is "not measured", and a total over such a part is a lower bound and
says so. A published share (such as 0.7%) is never quoted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = "not measured"
# Stages of `gradsift select`, by the part of the bill that they stand on.
STAGES = {
    "collect": ("load", "adapter", "active", "anchors", "target", "collect", "noise"),
    "probes": ("anchor_loss", "probe", "measuring"),
}
# Parts that only a policy has; each is listed, so that a missing figure is seen. A run of `ogs` times three of them
# together, in its stage "select".
POLICY_PARTS = ("cluster", "simulator", "rollouts", "policy", "rescoring")
TOGETHER = ("cluster", "simulator", "policy")
WORDS = {
    "warmup": "training the navigator",
    "collect": "measuring gradients",
    "probes": "training probes",
    "other": "reading, choosing, writing",
    "cluster": "clustering",
    "simulator": "fitting the simulator",
    "rollouts": "navigator roll-outs",
    "proxy": "proxy runs of the navigator",
    "deciding": "clusters, simulator and policy",
    "policy": "training the policy",
    "rescoring": "rescoring online",
    "choosing": "choosing, in all",
    "training": "fine-tuning",
}
HEADINGS = ("part", "seconds", "tokens", "operations", "of fine-tuning, by seconds", "by operations")


@dataclass(frozen=True)
class Part:
    """One line of the bill; None where it was not measured.

    Args:
        name: key of ``WORDS``, or a name of the caller's.
        seconds: wall time, >= 0.
        tokens: tokens sent forward, >= 0 (those of a backward are among them).
        flops: floating-point operations of model passes, >= 0.
    """

    name: str
    seconds: float | None = None
    tokens: int | None = None
    flops: float | None = None

    @property
    def words(self) -> str:
        """What a person reads."""
        return WORDS.get(self.name, self.name)


@dataclass(frozen=True)
class Overhead:
    """The bill.

    Args:
        parts: what choosing took.
        choosing: their sum; a figure is None where no part has it.
        training: fine-tuning, with its penalties and hooks.
        partial: figures of ``choosing`` (names of fields) that lack a part, and are lower bounds.
        notes: what to beware of.
    """

    parts: tuple[Part, ...]
    choosing: Part
    training: Part
    partial: frozenset[str]
    notes: tuple[str, ...]

    def ratio(self, part: Part, figure: str) -> float | None:
        """A part's figure over that of fine-tuning.

        Args:
            part: a line of the bill.
            figure: ``seconds``, ``tokens`` or ``flops``.

        Returns:
            A number >= 0, or None where either is not measured or fine-tuning took nothing.
        """
        above, below = getattr(part, figure), getattr(self.training, figure)
        return above / below if above is not None and below else None


FIGURES = ("seconds", "tokens", "flops")


def overhead(
    select: Mapping[str, Any],
    train: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    policy: bool = False,
) -> Overhead:
    """Make the bill from what runs wrote down.

    Args:
        select: manifest of ``gradsift select``.
        train: manifest of ``gradsift train``.
        costs: further parts by name (of ``POLICY_PARTS`` or any other), each with any of ``seconds``, ``tokens`` (or
            ``forward_tokens``) and ``flops``.
        policy: list every part of a policy, also those without a figure.

    Returns:
        Parts in the order in which they are worked through, their sum and fine-tuning.
    """
    given = dict(costs or {})
    parts = _select_parts(select, given)
    there = {part.name for part in parts} | (set(TOGETHER) if select.get("rollouts") else set())
    wanted = [name for name in POLICY_PARTS if name not in there] if policy else []
    parts += [_part(name, given.get(name, {})) for name in dict.fromkeys([*wanted, *given]) if name not in
              {part.name for part in parts}]  # fmt: skip
    partial = frozenset(f for f in FIGURES if any(getattr(p, f) is None for p in parts))
    sums = {figure: _sum(getattr(p, figure) for p in parts) for figure in FIGURES}
    # Where only parts that use no model have a figure, "at least 0" would say nothing.
    sums = {figure: value if value or figure not in partial else None for figure, value in sums.items()}
    training = _part("training", train.get("cost", {}).get("total", {}))
    return Overhead(tuple(parts), Part("choosing", **sums), training, partial, tuple(_notes(select)))


def _select_parts(manifest: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> list[Part]:
    cost, rolled = manifest.get("cost", {}), manifest.get("rollouts")
    seconds, tokens = dict(cost.get("seconds", {})), cost.get("tokens", {})
    parts = []
    if (warmed := manifest.get("warmup")) and "tokens" in warmed:  # what all calls trained, a stopped one included
        seconds.pop("warmup", None)
        parts.append(Part("warmup", warmed["seconds"], warmed["tokens"], warmed["flops"]))
    for name, stages in STAGES.items():
        spent = [seconds.pop(stage) for stage in stages if stage in seconds]
        if not spent:
            continue  # this run had no such part
        if name == "collect" and manifest.get("spec") is not None and not tokens.get("collect"):
            parts.append(Part(name))  # an earlier call paid for it
            continue
        parts.append(Part(name, _sum(spent), _sum(tokens.get(stage) for stage in stages)))
    if rolled:
        sent = rolled["train_tokens"] + rolled["dev_tokens"]
        parts.append(Part("rollouts", max(seconds.pop("roll", 0.0), rolled["seconds"]), sent, rolled["flops"]))
        known = _sum(given.get(name, {}).get("seconds") for name in TOGETHER) or 0.0
        # What the caller timed apart is not billed twice.
        parts.append(Part("deciding", max(0.0, seconds.pop("select", 0.0) - known), 0))
    if proxied := manifest.get("proxy"):  # every round that was trained, those of a stopped call included
        seconds.pop("proxy", None)
        parts.append(Part("proxy", proxied["seconds"], proxied["tokens"], proxied["flops"]))
    # Reading and choosing send nothing through a model.
    return [*parts, Part("other", _sum(seconds.values()), 0, 0.0)]


def _part(name: str, cost: Mapping[str, Any]) -> Part:
    tokens = cost.get("tokens", cost.get("forward_tokens"))
    return Part(name, cost.get("seconds"), tokens, cost.get("flops"))


def _sum(values: Iterable[Any]) -> Any:
    """Add what is there; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _notes(select: Mapping[str, Any]) -> list[str]:
    tokens = select.get("cost", {}).get("tokens", {}).get("collect") or 0
    if select.get("spec") is None:
        return []
    if not tokens:
        return ["an earlier call measured the pool, so what that took is not in this manifest"]
    usable = select.get("rows", {}).get("tokens", 0)
    if tokens < usable:
        return [f"this call measured {tokens} of {usable} pool tokens; an earlier one, or copies, account for the rest"]
    return []


def overhead_rows(bill: Overhead) -> list[tuple[str, ...]]:
    """Lay the bill out for a terminal.

    Args:
        bill: the figures.

    Returns:
        One tuple of texts per line, under ``HEADINGS``; the sum and fine-tuning last.
    """
    lines = []
    for part in (*bill.parts, bill.choosing, bill.training):
        least = bill.partial if part is bill.choosing else frozenset()
        lines.append(
            (
                part.words,
                _text(part.seconds, "{:.1f}", least="seconds" in least),
                _text(part.tokens, "{:,}", least="tokens" in least),
                _text(part.flops, "{:.3g}", least="flops" in least),
                _text(bill.ratio(part, "seconds"), "{:.1%}", least="seconds" in least),
                _text(bill.ratio(part, "flops"), "{:.1%}", least="flops" in least),
            )
        )
    return lines


def _text(value: float | None, form: str, *, least: bool) -> str:
    return ABSENT if value is None else ("at least " if least else "") + form.format(value)


def overhead_dict(bill: Overhead) -> dict[str, Any]:
    """Give the bill in plain values, for the page and for JSON.

    Args:
        bill: the figures.

    Returns:
        ``headings``, ``lines`` of texts, ``parts`` with numbers (None: not measured) and ratios, ``partial``, ``notes``.
    """
    parts = [
        {
            "name": part.name, "words": part.words, **{f: getattr(part, f) for f in FIGURES},
            "ratio": {f: bill.ratio(part, f) for f in FIGURES},
        }
        for part in (*bill.parts, bill.choosing, bill.training)
    ]  # fmt: skip
    return {"headings": list(HEADINGS), "lines": [list(line) for line in overhead_rows(bill)], "parts": parts,
            "partial": sorted(bill.partial), "notes": list(bill.notes)}  # fmt: skip
