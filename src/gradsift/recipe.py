"""The recipe: one strict model per stage, nested; YAML in and out; dotted overrides.

Order of precedence, later wins: defaults, recipe file, ``--set``, flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from gradsift.errors import ConfigError
from gradsift.types import Budget, LossOn

MAX_RECIPE_BYTES = 1 << 20
UPPER = r"^([0-9]+(\.[0-9]+)?%|[1-9][0-9]*)$"
Format = Literal["auto", "messages", "prompt_completion", "text", "alpaca", "sharegpt"]
Numeral = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""Text that may be a whole number, which YAML and Python write without quotes."""


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
# What stands before the host; a colon that no port follows begins a password, even one with a slash in it.
_USER_INFO = re.compile(r"[^/?#]*@|[^:/?#]*:(?!\d*(?:[/?#]|$)).*@", re.DOTALL)
NAMES_NO_PASSWORD = ("github", "git")  # github://org:repo@main/rows.jsonl
PLAIN_QUERY = ("dl", "download", "format", "generation", "raw", "ref", "rev", "revision", "version", "versionid")


def refuse_secrets(source: str) -> str:
    """Refuse a URL that holds a password, a token or a signature: a run writes its sources into what it publishes.

    Args:
        source: path, URL or hub id as given.

    Returns:
        The same.

    Raises:
        ConfigError: there may be a secret in it; the message does not repeat it.
    """
    for found in _SCHEME.finditer(source):
        scheme, rest = found[1].lower(), source[found.end() :]
        http, user = scheme in ("http", "https"), _USER_INFO.match(rest)
        query = re.split("[&;]", rest.partition("?")[2].partition("#")[0]) if http else []
        if user and (http or (":" in user[0] and scheme not in NAMES_NO_PASSWORD)):
            got = "a user name, a password or a token before the host"
        elif any(part and part.partition("=")[0].lower() not in PLAIN_QUERY for part in query):
            got = "a query that may be a signature or a token"
        else:
            continue
        raise ConfigError(
            "this URL may hold a secret, and a run writes its sources into the files that it leaves",
            where=f"{scheme}://...", got=got,
            expected=f"no user info, and over http(s) no query but of {', '.join(PLAIN_QUERY)}",
            do="give credentials in the store's environment variables or in the configuration of fsspec (FSSPEC_HTTP, "
            "FSSPEC_S3, ~/.config/fsspec); or download the file and pass its path",
        )  # fmt: skip
    return source


def _hidden(text: object, length: int = 80) -> str:
    """What a message may repeat of a value: no URL behind its scheme, which may hold a secret."""
    return re.sub(r"://\S*", "://...", str(text))[:length]


SourcePath = Annotated[str, Field(min_length=1), AfterValidator(refuse_secrets)]
"""Local file, URL (``s3://bucket/rows.parquet``), or hub id (``org/name``, ``org/name:split``)."""


class Strict(BaseModel):
    """Base of every recipe section: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class SourceConfig(Strict):
    """A named file of rows.

    Args:
        label: source label of a pool, or name of an anchor.
        path: local file, URL (``s3://bucket/rows.parquet``) without secrets, or hub id (``org/name``, ``org/name:split``).
    """

    label: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")
    path: SourcePath


class DataConfig(Strict):
    """How rows are read and masked; the trainer uses the same values.

    Args:
        format: shape of the rows, or auto.
        loss_on: which tokens carry loss; None = assistant for messages, completion for prompt/completion, all for text.
        max_length: tokens kept from the start of a row, as the trainer truncates.
        dedup: drop gives exact copies the status DUPLICATE, keep leaves them eligible.
    """

    format: Format = "auto"
    loss_on: LossOn | None = None
    max_length: int = Field(default=1024, ge=2)
    dedup: Literal["drop", "keep"] = "drop"


class LoraConfig(Strict):
    """The navigator's adapter, seeded by the run's seed.

    Args:
        rank: LoRA rank.
        alpha: LoRA alpha; the scale is alpha / rank.
        target_modules: module names, or all-linear.
        warmup_share: share of the pool the adapter is trained on before measuring. At 0 the matrices B are zero, so
            the gradients of A are exactly zero and only B carries signal.
        warmup_lr: AdamW learning rate of the warm-up.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    target_modules: str | tuple[str, ...] = "all-linear"
    warmup_share: float = Field(default=0.0, ge=0.0, le=1.0)
    warmup_lr: float = Field(default=2e-4, gt=0)


class NavigatorConfig(Strict):
    """The small model that measures.

    Args:
        model: auto (the packaged SmolLM2-135M-Instruct), hub id, local folder or GGUF file.
        revision: 40-hex commit of a hub id.
        parameters: lora, all, or a list of name patterns (``fnmatch``) of the weights to differentiate.
        lora: the adapter, used when parameters is lora.
        dtype: arithmetic of the model.
        device: auto, cpu, cuda or cuda:N.
    """

    model: str = "auto"
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    parameters: Literal["lora", "all"] | tuple[str, ...] = "lora"
    lora: LoraConfig = LoraConfig()
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")


AUTO = 0
TokenBudget = Annotated[
    int,
    BeforeValidator(lambda value: AUTO if value == "auto" else value),
    PlainSerializer(lambda value: "auto" if value == AUTO else value, return_type=int | str),
]
"""Tokens, or ``auto``, which is kept as 0: a pass that nobody chose a budget for takes its rows one by one."""


class CollectConfig(Strict):
    """The one pass over the pool.

    Args:
        sketch_dim: length D of the sketch, a prime so that folding mixes rows and columns.
        layers: measure the upper decoder layers only, a share (25%, rounded up) or a count (8); None measures all.
        positions: trained holds what stands before a row's first trained token constant: its tokens have no gradient.
        dots: folded takes them by folded factors where prompts are held constant, on a CPU: cheaper by far, and exact only on
            average. Dots and norms of groups of layers are then kept apart too. It is what a screen measures.
        tokens_per_batch: longest row times rows of a micro-batch never exceed this; auto takes what fits the free memory.
        rows_per_shard: rows committed at once; a kill costs at most one shard.
        signals: auto measures what the method needs; all measures everything.
        abort_share: share of rows that cannot be measured (not finite, out of memory, killing the process) above which
            the run stops.
        unreadable_share: share of malformed and untokenizable pool rows above which the run stops before it measures.
        hang_seconds: a process that measures and is longer than this over one micro-batch ends, as if it had been
            killed; 0 never ends it.
        check_disk: refuse to begin when the signals will not fit on the disk.
    """

    sketch_dim: int = Field(default=4093, ge=2)
    layers: Numeral | None = Field(default=None, pattern=UPPER)
    positions: Literal["all", "trained"] = "all"
    dots: Literal["exact", "folded"] = "exact"
    tokens_per_batch: TokenBudget = Field(default=1024, ge=AUTO)
    rows_per_shard: int = Field(default=64, ge=1)
    signals: Literal["auto", "all"] = "auto"
    abort_share: float = Field(default=0.05, ge=0.0, le=1.0)
    unreadable_share: float = Field(default=0.5, ge=0.0, le=1.0)
    hang_seconds: float = Field(default=7200.0, ge=0.0)
    check_disk: bool = True


class ProbeConfig(Strict):
    """Short trainings of the navigator, for methods that ask what other rows teach about a row.

    Probes train what ``navigator.parameters`` names: a fresh adapter for lora, else these weights themselves.

    Args:
        num_repeats: times the rows are dealt into two folds; each gives two probes.
        num_steps: optimizer steps of a probe.
        batch_size: rows per step.
        lr: AdamW learning rate; whole models of more than some million weights want less than an adapter.
        replay: share of a probe's rows that are anchor rows.
    """

    num_repeats: int = Field(default=1, ge=1)
    num_steps: int = Field(default=40, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    replay: float = Field(default=0.25, ge=0.0, lt=1.0)


class RolloutConfig(Strict):
    """Short trainings of the navigator on schedules, for methods that learn from what training does.

    They train what ``navigator.parameters`` names, and measure rows of the anchors and of the target that are then no part
    of the directions.

    Args:
        lr: AdamW learning rate.
        batch_size: rows per optimizer step.
        dev_share: share of every anchor's and the target's rows that is held out.
        dev_rows: at most so many of each.
    """

    lr: float = Field(default=5e-4, gt=0)
    batch_size: int = Field(default=4, ge=1)
    dev_share: float = Field(default=0.4, gt=0.0, lt=1.0)
    dev_rows: int = Field(default=16, ge=2)


class ProxyRunConfig(Strict):
    """One training of the navigator in rounds, for methods that steer its mixture of domains.

    It trains what ``navigator.parameters`` names, with one optimizer state and one schedule.

    Args:
        lr: peak learning rate of AdamW.
        batch_size: rows per optimizer step where a round draws rows by the mixture.
        schedule: of the learning rate, over the whole run.
        held_share: share of the target's rows (of every task's) that gives its loss and no gradient.
        held_rows: at most so many.
    """

    lr: float = Field(default=5e-4, gt=0)
    batch_size: int = Field(default=8, ge=1)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    held_share: float = Field(default=0.5, gt=0.0, lt=1.0)
    held_rows: int = Field(default=200, ge=2)


class WarmupConfig(Strict):
    """The training of the navigator before it measures, for methods that ask for one (and for ``navigator.lora.warmup_share``).

    It trains what ``navigator.parameters`` names; how much of the pool, and for how long, is the method's.

    Args:
        lr: peak AdamW learning rate; whole models of more than some million weights want less than an adapter.
        batch_size: rows per optimizer step.
        schedule: of the learning rate, over the whole training.
        rise: share of the steps over which it rises.
    """

    lr: float = Field(default=2e-4, gt=0)
    batch_size: int = Field(default=32, ge=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    rise: float = Field(default=0.03, ge=0.0, lt=1.0)


class ScreenConfig(Strict):
    """A cheap pass over all rows before an exact one over those that may be chosen.

    Args:
        by: what the cheap pass measures: trained (every layer, with prompts held constant), or upper decoder layers, a share
            (25%) or a count (8); None measures every row exactly.
        calibrate: rows drawn at random and measured both ways, from which the screen's error is known.
        certify: rows drawn at random among those left out and measured exactly, which bound what was lost.
        miss: estimated share of the choice that may be left out.
        confidence: of that bound.
    """

    by: Numeral | None = Field(default=None, pattern=rf"{UPPER}|^trained$")
    calibrate: int = Field(default=100, ge=20)
    certify: int = Field(default=200, ge=1)
    miss: float = Field(default=0.02, gt=0.0, lt=1.0)
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)


class MethodConfig(Strict):
    """The rule that chooses.

    Args:
        name: registered name (``gradsift methods`` lists them).
        settings: the method's own fields.
    """

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Recipe(Strict):
    """Everything that determines a run of ``gradsift select``.

    Args:
        pool: candidate files.
        general: files of general rows that may be chosen as replay, for methods that decide about it.
        anchors: what must be kept, one source each.
        target: what must be learned.
        data: reading and masking.
        navigator: the measuring model.
        collect: the pass.
        screen: a cheap pass before it.
        probe: short trainings, for methods that need them.
        rollout: trainings on schedules, for methods that need them.
        warmup: training before measuring, for methods that need it.
        proxy: a training in rounds, for methods that steer its mixture.
        method: the rule.
        budget: ``10%``, ``500`` or ``20000tok``.
        allow_weak_anchor: let methods constrain on an anchor whose split-half reliability is below 0.2.
        active_anchors: rows of each anchor, those that oppose the target most, that give its direction; None takes all.
        seed: seed of every named stream.
    """

    pool: tuple[SourceConfig, ...] = Field(min_length=1)
    general: tuple[SourceConfig, ...] = ()
    anchors: tuple[SourceConfig, ...] = ()
    target: SourcePath | None = None
    data: DataConfig = DataConfig()
    navigator: NavigatorConfig = NavigatorConfig()
    collect: CollectConfig = CollectConfig()
    screen: ScreenConfig = ScreenConfig()
    probe: ProbeConfig = ProbeConfig()
    rollout: RolloutConfig = RolloutConfig()
    warmup: WarmupConfig = WarmupConfig()
    proxy: ProxyRunConfig = ProxyRunConfig()
    method: MethodConfig
    budget: Numeral
    allow_weak_anchor: bool = False
    active_anchors: int | None = Field(default=None, ge=2)
    seed: int = Field(default=42, ge=0, lt=2**63)


def parse_budget(text: str) -> Budget:
    """Read ``10%``, ``500`` or ``20000tok``.

    Args:
        text: the flag's value.

    Returns:
        The budget.

    Raises:
        ConfigError: the text is none of the three forms.
    """
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*(%|tok)?\s*", text)
    if match:
        number, unit = float(match[1].replace("_", "")), match[2]
        if unit == "%":
            return Budget(percent=number)
        if number == int(number):
            return Budget(tokens=int(number)) if unit == "tok" else Budget(rows=int(number))
    raise ConfigError(
        "the budget cannot be read",
        where="--budget",
        got=repr(text),
        expected="a percentage (10%), a number of rows (500) or trained tokens (20000tok)",
        do="write it in one of these forms",
    )


# The loader also meets dates that do not exist, keys that cannot be one, and nesting without end.
NOT_YAML = (yaml.YAMLError, ValueError, TypeError, RecursionError)


class _StrictLoader(yaml.SafeLoader):
    """Safe loading that also refuses aliases and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise ConfigError(
                "YAML aliases are not accepted in a recipe",
                where=str(self.peek_event().start_mark).strip(),
                do="write the value out",
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(
                    "a key stands twice in the recipe",
                    where=str(key_node.start_mark).strip(),
                    got=repr(key),
                    do="keep one of them",
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file as a plain nested mapping, not yet validated.

    Args:
        path: YAML file of at most 1 MiB.

    Returns:
        Nested dictionaries.

    Raises:
        ConfigError: the file is missing, too large, unreadable, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ConfigError("the recipe file does not exist", where="--recipe", got=str(path), do="check the path")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise ConfigError(
            "the recipe file is too large",
            where=str(path),
            got=f"{path.stat().st_size} bytes",
            expected=f"at most {MAX_RECIPE_BYTES}",
        )
    try:
        loaded = _load_yaml(path.read_text("utf-8"))
    except NOT_YAML as error:
        raise ConfigError("the recipe is not YAML", where=str(path), got=_hidden(str(error).replace("\n", " "), 300),
                          expected="YAML in UTF-8", do="correct it; quote a value that is meant as text") from None  # fmt: skip
    except OSError as error:
        raise ConfigError("the recipe file cannot be read", where=str(path), got=error.strerror or str(error),
                          expected="a readable file", do="check its permissions and the disk") from None  # fmt: skip
    if not isinstance(loaded, dict):
        raise ConfigError(
            "the recipe is not a mapping",
            where=str(path),
            got=type(loaded).__name__,
            expected="keys such as pool, method, budget",
        )
    return loaded


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``KEY=VALUE``; the value is read as YAML, so ``0.2``, ``true`` and ``[a, b]`` have their types.

    Args:
        text: one ``--set`` argument.

    Returns:
        The key and the typed value.

    Raises:
        ConfigError: there is no ``=`` or the value is not YAML.
    """
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError(
            "--set takes KEY=VALUE", where="--set", got=repr(_hidden(text)), do="for example --set band=middle"
        )
    try:
        return key.strip(), _load_yaml(value)
    except NOT_YAML:
        raise ConfigError(
            "the value is not YAML", where=f"--set {key}", got=repr(_hidden(value)), do="quote it"
        ) from None


TOP_LEVEL = tuple(Recipe.model_fields)


def apply_overrides(values: dict[str, Any], overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Put overrides into a nested mapping.

    A dotted key (``navigator.dtype``) names a recipe field; a plain key that is no recipe field
    (``band``) is a setting of the method.

    Args:
        values: nested dictionaries; not changed.
        overrides: keys and values, later wins.

    Returns:
        A new nested mapping.

    Raises:
        ConfigError: a dotted key goes through a field that has no parts.
    """
    result = _copy(values)
    for key, value in overrides:
        parts = key.split(".")
        if len(parts) == 1 and key not in TOP_LEVEL:
            parts = ["method", "settings", key]
        node = result
        for part in parts[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise ConfigError(
                    "this field has no parts",
                    where=f"--set {key}",
                    got=part,
                    do="see gradsift methods or recipe.yaml of an earlier run for the names",
                )
            node = child
        node[parts[-1]] = value
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return list(value) if isinstance(value, list | tuple) else value


S = TypeVar("S", bound=Strict)


def build_section(section: type[S], values: Mapping[str, Any], where: str) -> S:
    """Validate one section of a recipe.

    Args:
        section: its model.
        values: its fields.
        where: what a person is told is wrong.

    Returns:
        The section.

    Raises:
        ConfigError: a field is unknown, missing or has a wrong value; all of them are named.
    """
    try:
        return section.model_validate(_copy(values))
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']} (got {_hidden(e['input'])!r})" for e in error.errors()
        ]
        raise ConfigError(
            f"{where} is not valid", where="; ".join(problems), do="correct these fields in the recipe, --set or flags"
        ) from None


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """Validate a nested mapping.

    Args:
        values: nested dictionaries.

    Returns:
        The recipe.

    Raises:
        ConfigError: a field is unknown, missing or has a wrong value; all of them are named.
    """
    recipe = build_section(Recipe, values, "the recipe")
    for group, role in (((*recipe.pool, *recipe.general), "--pool or --general"), (recipe.anchors, "--anchor")):
        labels = [source.label for source in group]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ConfigError(
                "a label is used twice",
                where=role,
                got=", ".join(repeated),
                do="give each a label of its own: LABEL=PATH",
            )
    parse_budget(recipe.budget)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML that :func:`load_recipe` reads back to the same recipe.

    Args:
        recipe: any recipe.

    Returns:
        YAML text with every field.
    """
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
