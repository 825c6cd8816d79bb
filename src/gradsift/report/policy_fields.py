"""The words of selection/details.json of a run of ``ogs``, typed (ours); ``policy.report.describe_schedule`` writes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from gradsift.report.fields import Listed, Named, Part, damaged

METHOD = "ogs"
"""The method whose details these are."""


class ClusterEntry(Part):
    """A cluster: rows, kind, and the fixed statistics that the policy sees of it, by name."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=True)
    __pydantic_extra__: dict[str, float] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    size: int
    general: bool

    def figure(self, name: str) -> float | None:
        """Look a statistic up.

        Args:
            name: such as ``loss`` or ``cos_target``.

        Returns:
            Its value, or None where it was not written.
        """
        return (self.model_extra or {}).get(name)


class MoveEntry(Part):
    """One decision of the returned list: its cluster and its rows."""

    cluster: int
    rows: int


class TriedEntry(Part):
    """A policy of the contest; ``gain`` and ``rise`` hold one value per real roll-out, none where it was only simulated."""

    policy: str
    simulated_gain: float | None = None
    simulated_rise: Named[float | None] = Field(default_factory=dict)
    gain: Listed[float] = ()
    rise: Named[tuple[float, ...]] = Field(default_factory=dict)
    keeps: bool | None = None


class TrainingEntry(Part):
    """Figures per epoch of the learned policy's training, by source where there are several."""

    gain: tuple[float, ...]
    rise: Named[tuple[float, ...]]
    price: Named[tuple[float, ...]]
    greedy_gain: tuple[float, ...]
    dealt_gain: tuple[float, ...]
    deployed: Literal["greedy", "deal", "sample"]
    greedy_rise: Named[tuple[float, ...]]
    num_decisions: int | None = None
    feasible: bool | None = None
    epoch: int | None = None


class SimulatorEntry(Part):
    """Whether the simulator may stand for the navigator, and for how many steps."""

    accepted: bool
    horizon: int
    sentence: str


class Details(Part):
    """details.json of a run of ``ogs``."""

    policy: str
    feasible: bool
    limits: dict[str, float]
    start: dict[str, float]
    clusters: tuple[ClusterEntry, ...]
    mix: tuple[MoveEntry, ...]
    contest: tuple[TriedEntry, ...]
    training: TrainingEntry | None = None
    simulator: SimulatorEntry
    notes: Listed[str] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The protected sources, in the order of the file."""
        return tuple(self.limits)

    @model_validator(mode="after")
    def _fits(self) -> Details:
        """Refuse figures that do not belong together, so that nothing below has to ask."""
        names = set(self.limits)
        if any(not 0 <= move.cluster < len(self.clusters) for move in self.mix):
            raise ValueError("mix names a cluster that is not there")
        for one in self.contest:
            if set(one.rise) != names or any(len(values) != len(one.gain) for values in one.rise.values()):
                raise ValueError(f"contest: the rises of {one.policy} are not those of its roll-outs")
            if bool(one.gain) != (one.keeps is not None):
                raise ValueError(f"contest: the verdict on {one.policy} needs a roll-out")
        if all(one.policy != self.policy for one in self.contest if one.gain):
            raise ValueError(f"contest: the returned policy {self.policy} has no roll-out")
        if self.training is not None:
            t = self.training
            per_source = (t.rise, t.price, t.greedy_rise)
            series = [t.greedy_gain, t.dealt_gain, *(values for part in per_source for values in part.values())]
            if any(set(part) != names for part in per_source) or any(len(one) != len(t.gain) for one in series):
                raise ValueError("training: there is not one figure per epoch and source")
        return self


def parse_details(values: Any, where: str = "details.json") -> Details:
    """Check the details of a run of ``ogs``.

    Args:
        values: the parsed JSON.
        where: the file's name, for the refusal.

    Returns:
        The details.

    Raises:
        StoreError: a field is missing, has a wrong type, or does not fit the others.
    """
    try:
        return Details.model_validate(values)
    except ValidationError as error:
        raise damaged(where, error) from None
