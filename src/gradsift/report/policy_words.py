"""What a run of ``ogs`` says of its policy in sentences, for ``gradsift policy show`` and the page (ours)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradsift.report.policy_fields import Details, TriedEntry
from gradsift.report.words import one_line, plural

LEARNED = "ppo_lagrangian"
ABSENT = "-"


def nats(value: float | None) -> str:
    """Write a change of a loss, in ASCII.

    Args:
        value: in nats per trained token; None and NaN are absent.

    Returns:
        ``+0.0123``; with a power of ten below 0.0005.
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:+.1e}" if 0 < abs(value) < 5e-4 else f"{value:+.4f}"


def mean_of(values: Sequence[float]) -> str:
    """Write the mean of some roll-outs and their spread.

    Args:
        values: changes in nats, one per roll-out.

    Returns:
        The mean, with the standard deviation from two on.
    """
    if not values:
        return ABSENT
    mean = nats(float(np.mean(values)))
    return mean if len(values) < 2 else f"{mean} \u00b1 {nats(float(np.std(values, ddof=1))).removeprefix('+')}"


def tried_of(details: Details) -> TriedEntry:
    """Find the returned policy in the contest.

    Args:
        details: of the run.

    Returns:
        Its entry, which has real roll-outs.
    """
    return next(one for one in details.contest if one.policy == details.policy and one.gain)


def worst_of(one: TriedEntry, details: Details) -> tuple[str, float]:
    """Tell which limit a policy comes nearest to, or breaks most.

    Args:
        one: a policy with real roll-outs.
        details: of the run, with at least one source.

    Returns:
        The source, and by which share of its limit the mean rise is above it (below 0: within).
    """
    over = {s: _excess(float(np.mean(one.rise[s])), details.limits[s]) for s in details.sources}
    return max(over.items(), key=lambda item: item[1])


def _excess(rise: float, limit: float) -> float:
    if limit == 0:  # a loss that starts at 0 allows no rise, and a share of nothing is not a number
        return 0.0 if rise == 0 else math.copysign(math.inf, rise)
    return (rise - limit) / abs(limit)


def headline(details: Details) -> str:
    """Say which policy was returned and whether it keeps the limits.

    Args:
        details: of the run.

    Returns:
        One sentence, without a full stop.
    """
    who = f"the list of {one_line(details.policy)}{' (the learned policy)' if details.policy == LEARNED else ''} was returned"
    if not details.sources:
        return f"{who}; nothing was protected"
    entry = tried_of(details)
    n = plural(len(entry.gain), "real roll-out")
    name, over = worst_of(entry, details)
    if not details.feasible:
        return f"{who}, but no policy kept every limit: on its {n} it broke that of {one_line(name)} by {_share(over)}, the least of all"
    if over > 0:
        return f"{who}: on its {n} it keeps every limit within one standard error; the mean rise of {one_line(name)} is {_share(over)} above its limit"
    return f"{who}: on its {n} it keeps every limit"


def _share(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "more than any share"


def simulator_words(details: Details) -> str:
    """Give the verdict on the simulator, with what it took where that was noted.

    Args:
        details: of the run.

    Returns:
        The sentence.
    """
    sentence = details.simulator.sentence
    return next((note for note in details.notes if note.startswith(sentence)), sentence)


def other_notes(details: Details) -> tuple[str, ...]:
    """Give the notes beside the verdict on the simulator.

    Args:
        details: of the run.

    Returns:
        Sentences.
    """
    return tuple(note for note in details.notes if not note.startswith(details.simulator.sentence))


def verdict_on(one: TriedEntry, details: Details) -> str:
    """Say in a few words how a policy stands to the limits.

    Args:
        one: a policy of the contest.
        details: of the run.

    Returns:
        Such as ``keeps all`` or ``math 34% over``.
    """
    if one.keeps is None:
        return "simulated only"
    words = "keeps all"
    if details.sources:
        name, over = worst_of(one, details)
        if not one.keeps:
            words = f"{one_line(name, 16)} {_share(over)} over"
        elif over > 0:
            words = f"within noise ({one_line(name, 16)} {_share(over)} over)"
    return f"returned; {words}" if one is tried_of(details) else words


def training_words(details: Details, on: str = "simulator") -> str:
    """Say how the learned policy was trained, or why there is none.

    Args:
        details: of the run.
        on: the method's setting ``on``.

    Returns:
        A sentence, without a full stop.
    """
    if details.training is not None:
        t = details.training
        words = f"the policy was trained for {plural(len(t.gain), 'epoch')}"
        if t.num_decisions is not None:
            words += f" ({plural(t.num_decisions, 'decision')})"
        if t.feasible is None:
            return words
        return f"{words}; there, the one that was kept {'keeps' if t.feasible else 'breaks'} the limits"
    if not details.simulator.accepted and on == "simulator":
        return "no policy was learned: the simulator that it would have learned in is not trusted"
    return "no policy was learned: its training found nothing that keeps the limits"


def mix_words(details: Details) -> str:
    """Sum the returned list up.

    Args:
        details: of the run.

    Returns:
        A sentence, without a full stop.
    """
    rows = sum(move.rows for move in details.mix)
    general = sum(move.rows for move in details.mix if details.clusters[move.cluster].general)
    used = len({move.cluster for move in details.mix})
    words = f"{plural(len(details.mix), 'decision')} over {used} of {plural(len(details.clusters), 'cluster')}"
    if not any(cluster.general for cluster in details.clusters):
        return f"{words}; no general rows were given"
    return f"{words}; {general} of {plural(rows, 'row')} from general clusters"
