"""What a warm-up of the navigator asks of the recipe, checked before anything is read."""

from __future__ import annotations

from gradsift.errors import ConfigError
from gradsift.methods import Method
from gradsift.recipe import Recipe


def check_warmup(recipe: Recipe, method: Method) -> None:
    """Refuse a recipe under which the navigator cannot be trained as the method needs it.

    Args:
        recipe: the run's settings.
        method: the rule that will choose.

    Raises:
        ConfigError: its own weights would be trained in bfloat16, or the adapter would be warmed twice.
    """
    warmup = method.needs.warmup
    if warmup is None or warmup.epochs == 0:
        return
    navigator = recipe.navigator
    if navigator.dtype == "bfloat16" and navigator.parameters != "lora":
        raise ConfigError(
            "a warm-up cannot train bfloat16 weights: rounding swallows its steps",
            where="navigator.dtype",
            got="bfloat16 with navigator.parameters other than lora",
            expected="float32, or an adapter",
            do="--set navigator.dtype=float32 or --set navigator.parameters=lora",
        )
    if navigator.lora.warmup_share > 0:
        raise ConfigError(
            f"{method.name} trains the navigator itself before it measures",
            where="navigator.lora.warmup_share",
            got=navigator.lora.warmup_share,
            expected="0",
            do=f"leave it out; how {method.name} trains is said by its own settings and by warmup.lr",
        )
