"""From files to tokens: everything that can be checked before a model loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gradsift.data.columns import read_columns
from gradsift.data.pool import Pool, read_pool
from gradsift.data.token_cache import tokenize_pool
from gradsift.data.token_rows import TokenRows, content_of
from gradsift.data.tokenize import MaskRule, mask_rule
from gradsift.errors import ConfigError, DataError
from gradsift.launch.bench import INLINE, Launch
from gradsift.methods import Method
from gradsift.models.load import load_tokenizer, tokenizer_sha256
from gradsift.models.resolve import Resolved, resolve_navigator
from gradsift.pipeline.early import check_early
from gradsift.pipeline.forward import reads_prompts
from gradsift.pipeline.progress import Clock
from gradsift.pipeline.proxy_check import check_proxy
from gradsift.pipeline.screen_check import check_parts, check_screen
from gradsift.pipeline.warm_check import check_warmup
from gradsift.recipe import Recipe, SourceConfig
from gradsift.seeds import stream
from gradsift.store.spec import set_hash
from gradsift.types import Note, RowStatus, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """Rows of one role with their tokens.

    Args:
        role: ``pool``, ``anchor`` or ``target``.
        name: ``pool``, the anchor's name, or ``target``.
        pool: rows as read.
        tokens: one token row per row, in input order.
    """

    role: str
    name: str
    pool: Pool
    tokens: Sequence[TokenRow]

    @property
    def usable(self) -> Sequence[TokenRow]:
        """Rows that may be measured or selected, copies of a kept row included."""
        if isinstance(self.tokens, TokenRows):
            return self.tokens.usable
        return tuple(row for row in self.tokens if row.status.usable)

    @property
    def status(self) -> Mapping[RowStatus, int]:
        """Rows per status; the values add up to the rows read."""
        return self.tokens.counts if isinstance(self.tokens, TokenRows) else Counter(row.status for row in self.tokens)

    @property
    def digest(self) -> str:
        """Hash of the usable rows' tokens and masks, whatever their order."""
        return set_hash(content_of(row) for row in self.usable)


@dataclass(frozen=True)
class Prepared:
    """All inputs of a run, checked.

    Args:
        recipe: the run's settings.
        method: the rule that will choose.
        resolved: where the navigator is.
        tokenizer: its tokenizer.
        rule: which tokens carry loss.
        pool: the candidates.
        anchors: what must be kept.
        target: what must be learned.
        dev: held-out rows of the anchors in their order, then of the target; empty unless the method wants roll-outs.
        notes: remarks about the data.
        launch: how the units of the pass are given to processes.
    """

    recipe: Recipe
    method: Method
    resolved: Resolved
    tokenizer: PreTrainedTokenizerBase
    rule: MaskRule
    pool: Source
    anchors: tuple[Source, ...]
    target: Source | None
    notes: tuple[Note, ...]
    dev: tuple[Source, ...] = ()
    launch: Launch = INLINE

    @property
    def directions(self) -> tuple[Source, ...]:
        """Anchors in their order, then the target."""
        return self.anchors if self.target is None else (*self.anchors, self.target)

    @property
    def pad_id(self) -> int:
        """Padding token; it never carries loss, so any id will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else 0


def check_needs(recipe: Recipe, method: Method) -> None:
    """Refuse a method that lacks an anchor or target, before anything is read.

    Args:
        recipe: the run's settings.
        method: the rule that will choose.

    Raises:
        ConfigError: something is missing, or the navigator's own weights would be trained in bfloat16; the flag is named.
    """
    needs = method.needs
    if needs.anchors and not recipe.anchors:
        raise ConfigError(
            f"{method.name} needs at least one anchor",
            where="--anchor",
            got="none",
            expected="a set of rows that stands for what must be kept",
            do="add --anchor NAME=PATH, for example --anchor math=math.jsonl",
        )
    if needs.target and recipe.target is None:
        raise ConfigError(
            f"{method.name} needs a target set",
            where="--target",
            got="none",
            expected="a small set of rows like those the model must get better at",
            do="add --target PATH",
        )
    if recipe.active_anchors is not None and (recipe.target is None or not recipe.anchors):
        raise ConfigError(
            "active anchors are chosen by their cosine with the target",
            where="active_anchors",
            got="no target" if recipe.target is None else "no anchor",
            expected="a target and at least one anchor",
            do="give both, or leave active_anchors out",
        )
    if recipe.general and not needs.rollouts:
        raise ConfigError(
            f"{method.name} does not decide about replay",
            where="--general",
            got=", ".join(source.label for source in recipe.general),
            expected="a method that chooses general rows (ogs)",
            do="leave --general out, and mix replay in at training: gradsift train --replay",
        )
    if needs.domains and len(recipe.pool) < 2:
        raise ConfigError(
            f"{method.name} needs a pool of at least two labels: they are its domains",
            where="--pool",
            got=", ".join(source.label for source in recipe.pool),
            expected="--pool medical=a.jsonl --pool law=b.jsonl",
            do="give several labeled files, or find domains: --set domains="
            + ("clusters" if method.name == "daar" else "cluster"),
        )
    if (
        (needs.rollouts or needs.proxy)
        and recipe.navigator.dtype == "bfloat16"
        and recipe.navigator.parameters != "lora"
    ):
        raise ConfigError(
            f"{'proxy runs' if needs.proxy else 'roll-outs'} cannot train bfloat16 weights: rounding swallows their steps",
            where="navigator.dtype",
            got="bfloat16 with navigator.parameters other than lora",
            expected="float32, or an adapter",
            do="--set navigator.dtype=float32 or --set navigator.parameters=lora",
        )
    check_parts(recipe, method)
    check_screen(recipe, method)
    check_warmup(recipe, method)
    taken = {source.label for source in recipe.anchors} & {"target"}
    if taken:
        raise ConfigError("an anchor may not be called target", where="--anchor", do="give it another name")


def prepare(recipe: Recipe, method: Method, clock: Clock) -> Prepared:
    """Read and tokenize every input.

    Args:
        recipe: the run's settings.
        method: the rule that will choose.
        clock: timing and progress.

    Returns:
        Rows and tokens of every role.

    Raises:
        DataError: a pool, anchor or target has no usable row.
    """
    check_needs(recipe, method)
    wanted = [("pool", "pool", (*recipe.pool, *recipe.general))]
    wanted += [("anchor", a.label, (a,)) for a in recipe.anchors]
    if recipe.target is not None:
        wanted.append(("target", "target", (SourceConfig(label="target", path=recipe.target),)))
    with clock.stage("read"):
        pools = [
            (
                role,
                name,
                read_pool(sources, fmt=recipe.data.format, dedup=recipe.data.dedup if role == "pool" else "drop"),
            )
            for role, name, sources in wanted
        ]
    with clock.stage("tokenize"):
        resolved = resolve_navigator(recipe.navigator.model, recipe.navigator.revision)
        tokenizer = load_tokenizer(resolved)
        rule = mask_rule(tokenizer, recipe.data.loss_on, {shape for _, _, pool in pools for shape in pool.shapes})
        sources = [
            Source(
                role,
                name,
                pool,
                tokenize_pool(
                    pool,
                    tokenizer,
                    rule,
                    max_length=recipe.data.max_length,
                    tokenizer_key=lambda: tokenizer_sha256(tokenizer),
                    find_template=role == "pool" and reads_prompts(method.needs),
                ),
            )
            for role, name, pool in pools
        ]
    for source in sources:
        _refuse_unusable(source)
    _refuse_mostly_broken(sources[0], recipe.collect.unreadable_share)
    read_columns(
        sources[0].pool, [row.id for row in sources[0].usable], method.needs.columns
    )  # refuses before a model loads
    by_role: dict[str, list[Source]] = {role: [s for s in sources if s.role == role] for role in ("anchor", "target")}
    prepared = Prepared(
        recipe,
        method,
        resolved,
        tokenizer,
        rule,
        sources[0],
        tuple(by_role["anchor"]),
        by_role["target"][0] if by_role["target"] else None,
        (),
    )
    check_proxy(prepared)
    check_early(prepared)
    prepared = replace(prepared, notes=tuple(_data_notes(prepared)))
    return _with_dev(prepared) if method.needs.rollouts else prepared


def _with_dev(prepared: Prepared) -> Prepared:
    """Hold rows of every anchor and of the target out; what is left gives the directions."""
    config = prepared.recipe.rollout
    held, dev = set(), []
    for source in prepared.directions:
        by_content = {content_of(row): row for row in source.usable}
        draws = stream(prepared.recipe.seed, f"dev/{source.name}").uniform(tuple(by_content))
        order = [
            row for _, row in sorted(zip(draws.tolist(), by_content.values(), strict=True), key=lambda one: one[0])
        ]
        count = min(config.dev_rows, round(config.dev_share * len(order)))
        if count < 2 or len(order) - count < 2:
            raise ConfigError(
                f"{source.name} has too few rows to hold some out",
                where="--target" if source.role == "target" else f"--anchor {source.name}",
                got=f"{len(order)} different usable rows, of which {count} would be held out",
                expected="at least 2 held out and 2 for the direction",
                do="give more rows, or --set rollout.dev_share=0.5",
            )
        held |= {content_of(row) for row in order[:count]}
        dev.append(replace(source, tokens=tuple(sorted(order[:count], key=lambda row: row.id))))
    kept = [_without(source, held) for source in prepared.directions]  # sources may share rows
    target = kept[-1] if prepared.target is not None else None
    anchors = tuple(kept[: len(prepared.anchors)])
    return replace(prepared, anchors=anchors, target=target, dev=tuple(dev))


def _without(source: Source, held: Set[str]) -> Source:
    """The rows that give a direction: none whose content is held out, of this source or of another."""
    rest = tuple(row for row in source.tokens if content_of(row) not in held)
    left = {content_of(row) for row in rest if row.status.usable}
    if len(left) < 2:
        raise ConfigError(
            f"{source.name} shares nearly all its rows with other sets",
            where="--target" if source.role == "target" else f"--anchor {source.name}",
            got=f"{len(left)} rows whose content is not held out",
            expected="at least 2 for the direction",
            do="give rows of its own",
        )
    return replace(source, tokens=rest)


def _refuse_unusable(source: Source) -> None:
    if source.usable:
        return
    counts = ", ".join(f"{status.value} {n}" for status, n in sorted(source.status.items())) or "no rows at all"
    first = next((row for row in source.tokens if row.reason), None)
    raise DataError(
        f"no usable row in the {source.role}" + ("" if source.role == source.name else f" {source.name}"),
        where=", ".join(file.path for file in source.pool.files),
        got=counts + (f"; first reason: {first.reason}" if first else ""),
        expected="at least one row that trains a token",
        do="check --format and --loss-on; gradsift inspect FILE --row 0 shows how a row is read",
    )


def _refuse_mostly_broken(pool: Source, share: float) -> None:
    """Stop where the reading is at fault rather than the rows: a wrong format, template or tokenizer."""
    bad = (RowStatus.MALFORMED, RowStatus.TOKENIZE_ERROR)
    num_bad, total = sum(pool.status[status] for status in bad), len(pool.tokens)
    if total < 20 or num_bad <= share * total:
        return
    first = next(row for row in pool.tokens if row.status in bad)
    raise DataError(
        "too many rows of the pool cannot be read",
        where=", ".join(file.path for file in pool.pool.files) + "; collect.unreadable_share",
        got=f"{num_bad} of {total} rows; first, row {first.id}: {first.status.value}, {first.reason}",
        expected=f"at most {share:.0%}",
        do="check --format; gradsift inspect FILE --row 0 shows how a row is read; or raise collect.unreadable_share",
    )


def _data_notes(prepared: Prepared) -> list[Note]:
    """Rows of anchors or target that also stand in the pool, and truncated rows."""
    notes = []
    wanted = {content_of(row) for source in prepared.directions for row in source.usable}
    pool = {digest: row.id for row in prepared.pool.usable if (digest := content_of(row)) in wanted}
    for source in prepared.directions:
        shared = [pool[h] for h in map(content_of, source.usable) if h in pool]
        if shared:
            text = (
                f"{len(shared)} rows of {source.name} also stand in the pool; keep such sets apart from what is trained"
            )
            notes.append(Note("leak", text, len(shared), tuple(shared[:5])))
    for source in (prepared.pool, *prepared.directions):
        cut = [row for row in source.tokens if row.status is RowStatus.TRUNCATED]
        if cut:
            text = f"{len(cut)} rows of {source.name} were cut to {prepared.recipe.data.max_length} tokens, as the trainer will"
            notes.append(Note("truncated", text, len(cut), tuple(row.id for row in cut[:5])))
    return notes


def refuse_changed(prepared: Prepared, manifest: Mapping[str, Any]) -> None:
    """Refuse inputs that are no longer those of a finished run.

    Args:
        prepared: the inputs as they are now.
        manifest: of the run.

    Raises:
        DataError: a file has other bytes, or was no file of the run.
    """
    then = {(e["role"], e["label"], e["path"]): e["sha256"] for e in manifest["inputs"]}
    for source in (prepared.pool, *prepared.directions):
        for file in source.pool.files:
            known = then.get((source.role, file.label, file.path))
            if known != file.sha256:
                raise DataError(
                    "a file has changed since the run", where=file.path, got=f"sha256 {file.sha256[:12]}",
                    expected=f"sha256 {known[:12] if known else 'of a file of the run'}",
                    do="restore the file, or run gradsift select again",
                )  # fmt: skip
