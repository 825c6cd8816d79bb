"""Which parameters count, and which share of them the measured signals cover."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

WARN_BELOW = 0.95


@dataclass(frozen=True)
class Parameters:
    """The parameters a gradient is taken over.

    Args:
        names: names in model order, each parameter once; a tied weight has the name of its embedding.
        sizes: number of elements of each.
        kind: ``lora``, ``all`` or ``patterns``.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    kind: Literal["lora", "all", "patterns"]

    @property
    def numel(self) -> int:
        """Number of elements of all of them."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Coverage:
    """How much of the chosen parameters the signals see.

    Args:
        num_seen: elements seen.
        num_chosen: elements chosen.
        unseen: names of the parameters that no layer rule reads.
    """

    num_seen: int
    num_chosen: int
    unseen: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the elements that is seen, in [0, 1]."""
        return self.num_seen / self.num_chosen

    @property
    def enough(self) -> bool:
        """False below 95%, where a person is warned with the names."""
        return self.share >= WARN_BELOW


def choose_parameters(model: nn.Module, which: str | tuple[str, ...]) -> Parameters:
    """Choose the parameters a gradient is taken over.

    Args:
        model: any model; with an adapter attached for ``lora``.
        which: ``lora`` (the A and B matrices of an adapter), ``all`` (every floating parameter once), or name patterns
            in the manner of ``fnmatch``. A tied weight matches by any of its names.

    Returns:
        The parameters in model order.

    Raises:
        ConfigError: nothing matches, or a pattern matches nothing; some names are listed.
    """
    every = _floating(model)
    if which == "all":
        return _pack(every, "all")
    if which == "lora":
        found = [entry for entry in every if ".lora_A." in entry[0] or ".lora_B." in entry[0]]
        if not found:
            raise ConfigError(
                "the model has no LoRA parameters",
                where="navigator.parameters",
                got="lora",
                expected="a model with an adapter",
                do="attach an adapter, or use --set navigator.parameters=all",
            )
        return _pack(found, "lora")
    patterns = (which,) if isinstance(which, str) else which
    hits = {p: {e[0] for e in every if any(fnmatchcase(name, p) for name in e[1])} for p in patterns}
    for pattern, names in hits.items():
        if not names:
            some = ", ".join(dict.fromkeys(e[0] for e in every[:2] + every[len(every) // 2 :][:4] + every[-2:]))
            raise ConfigError(
                "a pattern matches no parameter",
                where="navigator.parameters",
                got=pattern,
                expected=f"names such as {some}",
                do="patterns are matched as in fnmatch: * stands for anything, dots included",
            )
    chosen = set().union(*hits.values())
    return _pack([entry for entry in every if entry[0] in chosen], "patterns")


def coverage(parameters: Parameters, seen_names: Iterable[str]) -> Coverage:
    """Compare the chosen parameters with those that layer rules read.

    Args:
        parameters: what was chosen.
        seen_names: names that the signals cover; others than the chosen ones are ignored.

    Returns:
        Elements seen and names unseen, in model order.
    """
    seen = set(seen_names)
    pairs = list(zip(parameters.names, parameters.sizes, strict=True))
    return Coverage(
        num_seen=sum(size for name, size in pairs if name in seen),
        num_chosen=parameters.numel,
        unseen=tuple(name for name, _ in pairs if name not in seen),
    )


def _floating(model: nn.Module) -> list[tuple[str, tuple[str, ...], int]]:
    """List every floating parameter once: its name, all its names, its size; an embedding's name goes first."""
    from torch import nn

    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            names.setdefault(id(parameter), []).append(name)
            parameters[id(parameter)] = parameter
    embeddings = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding)
    }
    listed = []
    for key, known in names.items():
        canonical = next((name for name in known if name in embeddings), known[0])
        listed.append((canonical, tuple(known), parameters[key].numel()))
    return listed


def _pack(entries: list[tuple[str, tuple[str, ...], int]], kind: Literal["lora", "all", "patterns"]) -> Parameters:
    return Parameters(tuple(e[0] for e in entries), tuple(e[2] for e in entries), kind)
