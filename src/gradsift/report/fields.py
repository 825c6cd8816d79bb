"""The words of manifest.json and examples.json, typed (ours).

Every section of the manifest but inputs, rows, selection and cost may be absent: what was not measured is None and the
page says so. Unknown keys are ignored, so that a page can be made of a run that a later version wrote.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gradsift.errors import StoreError

FORMAT = 1
WEAK, NO_DIRECTION = 0.5, 0.2
T = TypeVar("T")
# A section that is null in the manifest is an empty one here: "not measured" is decided by what it holds.
Listed = Annotated[tuple[T, ...], BeforeValidator(lambda value: () if value is None else value)]
Named = Annotated[dict[str, T], BeforeValidator(lambda value: {} if value is None else value)]


class Part(BaseModel):
    """Base of the manifest's sections."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=True)


class Input(Part):
    """One file that was read: its role (pool, anchor, target), label, path, kind, hash and rows."""

    role: str
    label: str
    path: str
    kind: str | None = None
    sha256: str | None = None
    num_rows: int | None = None


class Navigator(Part):
    """The model that measured."""

    name: str
    source: str | None = None
    source_sha256: str | None = None
    model_sha256: str | None = None
    tokenizer_sha256: str | None = None
    architecture: str | None = None
    parameters: str | tuple[str, ...] | None = None
    num_parameters: int | None = None
    coverage: float | None = None
    uncovered: Listed[str] = ()
    dtype: str | None = None
    device: str | None = None


class SourceRows(Part):
    """Rows and trained tokens of one pool source."""

    read: int
    usable: int
    trained_tokens: int | None = None


class Rows(Part):
    """What was read from the pool; ``status`` must add up to ``read``."""

    read: int
    status: dict[str, int]
    usable: int
    tokens: int | None = None
    trained_tokens: int | None = None
    sources: Named[SourceRows] = Field(default_factory=dict)


class DirectionEntry(Part):
    """An anchor or the target, and how far its direction can be trusted."""

    name: str
    role: Literal["protect", "target"]
    norm: float | None = None
    num_rows: int | None = None
    num_tokens: int | None = None
    reliability: float | None = None
    reliability_sd: float | None = None

    @property
    def reliable(self) -> bool:
        """Whether the words conflict and protect may be used."""
        return self.reliability is not None and self.reliability >= NO_DIRECTION

    @property
    def word(self) -> str:
        """What may be said of the direction."""
        if self.reliability is None:
            return "reliability not measured"
        if self.reliability < NO_DIRECTION:
            return "no reliable direction"
        return "weak direction" if self.reliability < WEAK else "reliable"


class DirectionCos(Part):
    """Cosines between the directions."""

    names: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]


class NoiseEntry(Part):
    """Measured numerical bounds."""

    loss: float | None = None
    norm: float | None = None
    cos: float | None = None
    num_rows: int = 0


class SketchEntry(Part):
    """Length of the sketch and its noise relative to what it estimates."""

    dim: int
    noise_ratio: Named[float | None] = Field(default_factory=dict)


class CutEntry(Part):
    """How sharply the choice ends."""

    margin: float | None = None
    bound: float | None = None
    num_undecided: int | None = None
    undecided: Listed[str] = ()
    known: bool = True

    @property
    def count(self) -> int:
        """Rows whose side is not settled; older runs name them all."""
        return len(self.undecided) if self.num_undecided is None else self.num_undecided


class CertificateEntry(Part):
    """Proof of a set-level choice."""

    prices: Named[float | None]
    upper_bound: float | None = None
    lp_value: float | None = None
    value: float | None = None
    gap: float | None = None
    lp_gap: float | None = None
    slack: Named[float | None] = Field(default_factory=dict)
    allowance: Named[float | None] = Field(default_factory=dict)
    num_fractional: int | None = None
    iterations: int | None = None
    fill: str | None = ""


class NoteEntry(Part):
    """A counted remark."""

    code: str
    text: str
    count: int = 0
    ids: Listed[str] = ()


class SelectionEntry(Part):
    """What was chosen."""

    method: str
    config: Named[Any] = Field(default_factory=dict)
    budget: str
    seed: int
    num_rows: int
    num_trained: int
    num_skipped: int = 0
    cut: CutEntry | None = None
    certificate: CertificateEntry | None = None
    mixture: Named[float] = Field(default_factory=dict)
    notes: Listed[NoteEntry] = ()


class BatchEntry(Part):
    """Cosine of the summed gradient of random batches with an anchor."""

    anchor: str
    batch_size: int
    num_batches: int | None = None
    p05: float | None = None
    p50: float | None = None
    p95: float | None = None
    predicted: float | None = None


class SetEntry(Part):
    """Cosine of the summed gradient of the chosen set, and of the whole eligible pool, with an anchor."""

    anchor: str
    selected: float | None = None
    pool: float | None = None


class Cost(Part):
    """What the run took."""

    seconds: Named[float | None] = Field(default_factory=dict)
    tokens: Named[int | None] = Field(default_factory=dict)
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    num_threads: int | None = None


class Manifest(Part):
    """manifest.json of a finished selection."""

    format: int
    created: str | None = None
    command: str | None = None
    versions: Named[str | None] = Field(default_factory=dict)
    git_sha: str | None = None
    inputs: tuple[Input, ...]
    navigator: Navigator | None = None
    spec: Named[Any] = Field(default_factory=dict)
    spec_key: str | None = None
    rows: Rows
    directions: Listed[DirectionEntry] = ()
    direction_cos: DirectionCos | None = None
    noise: NoiseEntry | None = None
    sketch: SketchEntry | None = None
    selection: SelectionEntry
    batch_check: Listed[BatchEntry] = ()
    set_conflict: Listed[SetEntry] = ()
    cost: Cost

    def direction(self, name: str) -> DirectionEntry | None:
        """Find a direction by its name.

        Args:
            name: the anchor's name, or ``target``.

        Returns:
            The direction, or None.
        """
        return next((d for d in self.directions if d.name == name), None)


class Shown(Part):
    """One example shown in full view."""

    id: str
    source: str
    selected: bool
    status: str = "OK"
    score: float | None = None
    rank: int | None = None
    reason: str | None = None
    loss: float | None = None
    cos: Named[float | None] = Field(default_factory=dict)
    segments: Listed[tuple[str, bool]] = ()


def parse_manifest(values: Any, where: str = "manifest.json") -> Manifest:
    """Check a manifest.

    Args:
        values: the parsed JSON.
        where: the file's name, for the refusal.

    Returns:
        The manifest.

    Raises:
        StoreError: a required field is missing, a field has a wrong type, or the format is unknown.
    """
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise damaged(where, error) from None
    if manifest.format != FORMAT:
        raise StoreError(
            "this run was written in another format",
            where=where,
            got=manifest.format,
            expected=str(FORMAT),
            do="make the report with the version of gradsift that made the run",
        )
    return manifest


def damaged(where: str, error: ValidationError) -> StoreError:
    """Turn a failed check into a refusal.

    Args:
        where: the file's name.
        error: what pydantic found.

    Returns:
        The refusal, with the first three problems.
    """
    problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
    return StoreError(
        "a file of the run does not have the expected fields", where=where, got=problems, do="run select again"
    )
