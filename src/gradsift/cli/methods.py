"""``gradsift methods``: what can choose, what it needs and costs, what its page rests on; one method's settings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gradsift.methods.base import Needs

WIDTH = 100
UNSTATED = "not stated"
COSTS = {
    "text": "no model",
    "forward": "one forward per row",
    "probe": "one forward per row and several short trainings of the navigator",
    "proxy": "one forward per row and a training of the navigator in rounds",
    "gradient": "one forward and backward per row",
    "trained": "a training of the navigator on the pool, then one forward and backward per row and checkpoint",
}
"""Cost classes by rising cost; one that is not listed here comes last, under its name."""


def command(
    name: Annotated[str | None, typer.Argument(help="Show one method: settings, defaults, needs and its page.")] = None,
) -> None:
    """List the methods by what measuring costs, or show one with its settings."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    if name is None:
        _list(console)
    else:
        _show(console, name)


def _list(console: Console) -> None:
    from gradsift.methods import methods
    from gradsift.methods.evidence import EVIDENCE

    known = {name: cls() for name, cls in methods().items()}
    classes = {method.needs.cost_class for method in known.values()}
    for cost in [*(c for c in COSTS if c in classes), *sorted(classes - set(COSTS))]:
        console.print(f"{cost}: {COSTS[cost]}" if cost in COSTS else cost, style="bold")
        out = _plain()
        out.columns[0].min_width = max(map(len, known))
        for name, method in known.items():
            if method.needs.cost_class == cost:
                lines = (method.summary, describe_needs(method.needs), f"{method.paper} [{mark(method)}]")
                out.add_row(name, "\n".join(lines))
        console.print(out)
        console.print()
    console.print("In brackets what a page rests on:", style="bold")
    legend = _plain()
    for word, text in EVIDENCE.items():
        legend.add_row(word, text)
    console.print(legend)
    console.print()
    console.print("gradsift methods NAME shows settings and defaults; docs/methods/NAME.md is the method's page.")
    console.print("Options of training that combine with every method, token masking (stm) among them: gradsift train.")


def _plain() -> Table:
    """Two columns without title and headings; the first is not folded."""
    from gradsift.cli.screen import table

    out = table("", "", "")
    out.title, out.show_header = None, False
    out.columns[0].no_wrap = True
    return out


def mark(method: Any) -> str:
    """Give a method's evidence, or say that it states none.

    Args:
        method: a method.

    Returns:
        Its mark.
    """
    return getattr(method, "evidence", UNSTATED)


def describe_needs(needs: Needs) -> str:
    """Say what a method must be given, in a line.

    Args:
        needs: of a method.

    Returns:
        Words such as ``needs an anchor, a target; signals anchor_dot, grad_norm``.
    """
    given = [
        *(["an anchor"] if needs.anchors else []),
        *(["a target"] if needs.target else []),
        *(["two domains"] if needs.domains else []),
        *([f"columns {', '.join(column.name for column in needs.columns)}"] if needs.columns else []),
        *(["row texts"] if needs.texts else []),
        *([f"a warm-up (checkpoints: {needs.warmup.num_checkpoints})"] if needs.warmup else []),
        *(["probes"] if needs.probes else []),
        *(["a proxy run"] if needs.proxy else []),
        *(["roll-outs"] if needs.rollouts else []),
    ]
    signals = f"; signals {', '.join(sorted(needs.signals))}" if needs.signals else ""
    return f"needs {', '.join(given) or 'the rows only'}{signals}"


def _show(console: Console, name: str) -> None:
    from pydantic import TypeAdapter

    from gradsift.cli.screen import table
    from gradsift.methods import make_method, methods
    from gradsift.methods.evidence import EVIDENCE, evidence_parts

    method = make_method(name, {})
    cls: type[Any] = methods()[name]
    cost = method.needs.cost_class
    words = [f"{word} ({EVIDENCE[word]})" for word in evidence_parts(mark(method)) if word in EVIDENCE]
    facts = _plain()
    for key, value in {
        name: method.summary,
        "source": method.paper,
        "evidence": "; ".join(words) or mark(method),
        "cost": f"{cost}: {COSTS.get(cost, cost)}",
        "by default": describe_needs(method.needs),
        "page": f"docs/methods/{name}.md",
    }.items():
        facts.add_row(key, value)
    console.print(facts)
    console.print()
    fields, said = dataclasses.fields(cls), setting_words(cls)
    if not fields:
        console.print("no settings")
        return
    schema = TypeAdapter(cls).json_schema()["properties"]
    out = table("Settings, each given as --set NAME=VALUE", "name", "default", "allowed", "what it is")
    for field in fields:
        value = getattr(method, field.name)
        shown = "none" if value is None else str(value)
        out.add_row(field.name, shown, allowed(schema.get(field.name, {})), said.get(field.name, ""))
    console.print(out)


def allowed(schema: Mapping[str, Any]) -> str:
    """Say which values a setting takes.

    Args:
        schema: its JSON schema.

    Returns:
        Words, such as ``low, middle, high`` or ``integer >= 1, or none``.
    """
    if "anyOf" in schema:
        return ", or ".join(allowed(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    given = str(schema.get("type", "any"))
    kind = {"null": "none", "object": "by name", "array": "list"}.get(given, given)
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return " ".join([kind, ", ".join(bounds)]).strip()


def setting_words(cls: type[Any]) -> dict[str, str]:
    """Read what each setting is from the class's docstring and those of the classes it extends.

    Args:
        cls: a method.

    Returns:
        Sentence by setting.
    """
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        part = re.split(r"^(?:Returns|Raises|Yields|Attributes):", text.partition("Args:\n")[2], flags=re.MULTILINE)[0]
        for entry in re.split(r"\n(?=    \w+: )", "\n" + part):
            found = re.match(r"\s*(\w+): (.*)", " ".join(entry.split()))
            if found:
                out[found[1]] = found[2].replace("``", "")
    return out
