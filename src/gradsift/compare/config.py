"""What a comparison is, declared before any of its results exists: world, arms, grid, seeds, metric and claims (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gradsift.compare.arms import ArmSpec
from gradsift.compare.written import parse_seeds
from gradsift.errors import ConfigError
from gradsift.recipe import Strict, build_section

BEST_CHEAP = "best_cheap"
PLACEBOS = ("permuted_scores", "shuffled_anchors")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+\-]*$"


class WorldConfig(Strict):
    """Where the arms are compared.

    Args:
        name: arithmetic, text, real, or junk (real with rows that do harm).
        settings: fields of the world's settings that differ from their defaults.
        exchangeable: keep only distinct pool rows of this planted kind, so that no kind can be told from another;
            empty keeps the pool.
    """

    name: Literal["arithmetic", "text", "real", "junk"] = "arithmetic"
    settings: dict[str, Any] = Field(default_factory=dict)
    exchangeable: str = ""


class ArmConfig(Strict):
    """An arm; the fields of ``ArmSpec``.

    Args:
        name: unique.
        method: registered method, ``ogs_rounds``, ``domain_looking`` or ``oracle``.
        settings: the method's own.
        replay: share of the training rows from the replay set, in [0, 1).
        train: overrides of the training options.
        total_of: arm whose total cost this arm may spend.
        placebo: ``permuted_scores``, ``shuffled_anchors`` or empty.
        family: what it is compared as.
    """

    name: str = Field(min_length=1, max_length=48, pattern=_NAME)
    method: str = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    replay: float = Field(default=0.0, ge=0, lt=1)
    train: dict[str, Any] = Field(default_factory=dict)
    total_of: str = ""
    placebo: Literal["", "permuted_scores", "shuffled_anchors"] = ""
    family: Literal["cheap", "gradient", "gradsift", "training", "surgery", "bound", "placebo"] = "cheap"

    def spec(self) -> ArmSpec:
        """Return the arm as the cells read it."""
        return ArmSpec(**self.model_dump())


class GridConfig(Strict):
    """How every arm is trained; the fields of ``Grid``.

    Args:
        lrs: learning rates; every arm is trained at each.
        num_steps: optimizer steps.
        batch_size: rows per step.
        budget: rows an arm trains on, replay included.
        schedule: of the learning rate.
        warmup_steps: linear warm-up.
        weight_decay: decoupled.
        max_grad_norm: clipping.
        tokens_per_batch: of the evaluation.
    """

    lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    budget: int = Field(ge=1)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    tokens_per_batch: int = Field(default=8192, ge=1)


class ClaimConfig(Strict):
    """A comparison that is told in words.

    Args:
        arm: whose advantage.
        baseline: over which arm; ``best_cheap`` is the cheap arm of the highest mean hypervolume.
    """

    arm: str
    baseline: str


class PlaceboConfig(Strict):
    """Placebo runs: the seeds in groups, each group one run of the decision rule.

    Args:
        seeds_per_run: paired seeds in a run.
        num_runs: how many runs; seeds_per_run * num_runs seeds must be declared.
        max_gains: runs that may show a significant gain before the check fails.
        min_uniform: the check also fails when the p-values are uniform with a probability below this (Kolmogorov-Smirnov).
    """

    seeds_per_run: int = Field(default=10, ge=2)
    num_runs: int = Field(default=40, ge=1)
    max_gains: int = Field(default=5, ge=0)
    min_uniform: float = Field(default=0.001, ge=0, lt=1)


class CompareConfig(Strict):
    """A comparison.

    Args:
        trial: id that its claims carry.
        world: where.
        arms: who.
        grid: how each is trained; None takes the world's own.
        seeds: paired seeds, in rising order.
        metric: accuracy or loss; must be the world's.
        reference: lower-left corner of the hypervolume; None takes (0, 0) for accuracies and (0, -1) for losses.
        random: name of the arm that draws at random.
        cheap: arms among which the best cheap baseline is found.
        claims: what is told in words, losing arms included.
        num_variants: variants of the claimed methods that were tried on this world before the first cell, any seeds.
        chance: probability that a guess is right, for the chance-adjusted shares of lost and won rows; 0 for none.
        placebo: placebo runs; None for an ordinary comparison.
    """

    trial: str = Field(default="T15", min_length=1)
    world: WorldConfig = WorldConfig()
    arms: tuple[ArmConfig, ...] = Field(min_length=2)
    grid: GridConfig | None = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(parse_seeds)] = Field(min_length=1)
    metric: Literal["accuracy", "loss"]
    reference: tuple[float, float] | None = None
    random: str = "random"
    cheap: tuple[str, ...] = ()
    claims: tuple[ClaimConfig, ...] = ()
    num_variants: int = Field(ge=0)
    chance: float = Field(default=0.0, ge=0, lt=1)
    placebo: PlaceboConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        for arm in self.arms:
            arm.spec()  # an arm that no cell could run is refused here
        names = [arm.name for arm in self.arms]
        if twice := sorted({name for name in names if names.count(name) > 1} | ({BEST_CHEAP} & set(names))):
            raise ValueError(f"arms need names of their own: {', '.join(twice)}")
        named = {"random": [self.random], "cheap": self.cheap, "claims.arm": [c.arm for c in self.claims]}
        named["claims.baseline"] = [c.baseline for c in self.claims if c.baseline != BEST_CHEAP]
        named["total_of"] = [arm.total_of for arm in self.arms if arm.total_of]
        for field, some in named.items():
            if unknown := sorted(set(some) - set(names)):
                raise ValueError(f"{field} names arms that are not there: {', '.join(unknown)}")
        if any(c.baseline == BEST_CHEAP for c in self.claims) and not self.cheap:
            raise ValueError("a claim over best_cheap needs the list of cheap arms")
        chained = [a.name for a in self.arms if a.total_of and (self.arm(a.total_of).total_of or a.total_of == a.name)]
        if chained:
            raise ValueError(f"total_of names an arm that takes another's total itself: {', '.join(chained)}")
        if list(self.seeds) != sorted(set(self.seeds)):
            raise ValueError("seeds must be different and rising")
        runs = self.placebo
        if runs and runs.seeds_per_run * runs.num_runs != len(self.seeds):
            raise ValueError(
                f"{runs.num_runs} placebo runs of {runs.seeds_per_run} seeds need "
                f"{runs.num_runs * runs.seeds_per_run} seeds, {len(self.seeds)} are declared"
            )
        return self

    def arm(self, name: str) -> ArmConfig:
        """Return an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    def dump(self) -> dict[str, Any]:
        """Return the plain values, the way they stand in the manifest."""
        return self.model_dump(mode="json")


def build_config(values: Mapping[str, Any]) -> CompareConfig:
    """Validate the settings of a comparison.

    Args:
        values: nested fields.

    Returns:
        The settings.

    Raises:
        ConfigError: a field is unknown, missing, wrong or contradicts another.
    """
    return build_section(CompareConfig, values, "the comparison")


def arms_to_run(config: CompareConfig, wanted: Iterable[str] | None) -> tuple[ArmConfig, ...]:
    """List arms in an order in which each follows the arm whose total it spends.

    Args:
        config: the comparison.
        wanted: names; None for all. What they depend on comes along.

    Returns:
        Arms, independent ones first.

    Raises:
        ConfigError: a name is unknown.
    """
    names = {arm.name for arm in config.arms}
    chosen = names if wanted is None else set(wanted)
    if unknown := sorted(chosen - names):
        raise ConfigError("there is no such arm", where="--arms", got=", ".join(unknown),
                          expected=", ".join(sorted(names)))  # fmt: skip
    chosen |= {config.arm(name).total_of for name in chosen} - {""}
    return tuple(sorted((arm for arm in config.arms if arm.name in chosen), key=lambda arm: bool(arm.total_of)))
