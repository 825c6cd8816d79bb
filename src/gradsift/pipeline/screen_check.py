"""What a two-stage run is refused for, before anything is read."""

from __future__ import annotations

from gradsift.errors import ConfigError
from gradsift.launch.seat import Seat
from gradsift.methods import Method
from gradsift.recipe import Recipe

PREDICTED = frozenset({"grad_norm", "anchor_dot", "target_dot"})  # what the screen predicts
OF_WHOLE_ROWS = frozenset({"embedding", "hidden", "prompt_loss"})  # hidden states of prompts, or losses there
EXACT = frozenset({"loss", "head_grad_norm", "lexical"})  # what it measures exactly, or what needs no model


def check_parts(recipe: Recipe, method: Method) -> None:
    """Refuse a pass over a part of the model or of the rows that does not give what the method looks at.

    Args:
        recipe: the run's settings.
        method: the rule that will choose.

    Raises:
        ConfigError: the embedding's gradient is looked at and only upper layers or trained positions are measured; or
            hidden states or prompt losses are, and prompts are held constant.
    """
    collect, signals = recipe.collect, method.needs.signals
    if "emb_grad_norm" in signals and (collect.layers is not None or collect.positions != "all"):
        raise ConfigError(
            f"{method.name} looks at the embedding's gradient, which a part of the model or of the rows does not give",
            where="--layers and collect.positions",
            got=f"layers {collect.layers}, positions {collect.positions}",
            expected="every layer and position",
            do="leave them out, or choose another method",
        )
    if collect.dots == "folded" and collect.positions == "all":
        raise ConfigError(
            "folded dots are for held prompts", where="collect.dots", got="folded, with collect.positions=all",
            expected="collect.dots=exact", do="leave collect.dots out, or screen with --screen trained",
        )  # fmt: skip
    whole = sorted(signals & OF_WHOLE_ROWS)
    if collect.positions != "all" and (whole or collect.signals == "all"):
        raise ConfigError(
            f"{method.name} looks at what belongs to whole rows"
            if whole
            else "all signals include those of whole rows",
            where="collect.positions",
            got=f"{collect.positions}, with {', '.join(whole) or 'collect.signals=all'}",
            expected="collect.positions=all",
            do="leave collect.positions out",
        )


def check_screen(recipe: Recipe, method: Method) -> None:
    """Refuse a screen before a method whose rows cannot be screened.

    Args:
        recipe: the run's settings.
        method: the rule that will choose.

    Raises:
        ConfigError: the method looks at other signals than a screen predicts, or judges rows by one another; the pool
            keeps copies; or the exact pass is one over upper layers.
    """
    if recipe.screen.by is None:
        return
    needs = method.needs
    other = sorted(needs.signals - PREDICTED - EXACT)
    if not needs.gradients:
        what, got = "measures no gradient, so a screen saves nothing", ", ".join(sorted(needs.signals)) or "nothing"
    elif other:
        what, got = "looks at signals that a screen does not predict", ", ".join(other)
    elif not needs.by_row:
        what, got = "does not judge rows one by one, so what a screen loses cannot be bounded", "Needs.by_row is false"
    elif recipe.data.dedup == "keep":
        what, got = "would be given copies, which a sample of rows counts apart", "data.dedup=keep"
    elif recipe.collect.layers is not None or recipe.collect.positions != "all":
        parts = f"collect.layers={recipe.collect.layers}, collect.positions={recipe.collect.positions}"
        what, got = "is to have exact signals after a screen", parts
    else:
        return
    raise ConfigError(
        f"{method.name} {what}",
        where="--screen",
        got=got,
        expected="a method such as target_cosine or ogs_dual, every layer, and data.dedup=drop",
        do="leave --screen out, or change the method or setting named here",
    )


def check_alone(recipe: Recipe, seat: Seat | None) -> None:
    """Refuse a screen in a run of several processes.

    Args:
        recipe: the run's settings.
        seat: this process, or None.

    Raises:
        ConfigError: both are asked for.
    """
    if recipe.screen.by is not None and seat is not None and seat.launcher != "inline":
        raise ConfigError(
            "two stages run in one process",
            where="--screen and --launcher",
            got=seat.launcher,
            expected="inline",
            do="leave --screen out, or run it with --launcher inline",
        )
