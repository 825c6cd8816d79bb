"""``gradsift methods``: what can choose, what it needs, where it comes from."""

from __future__ import annotations

import dataclasses


def command() -> None:
    """List the methods: what each needs, what it costs, its settings and its source."""
    from rich.console import Console

    from gradsift.cli.screen import table
    from gradsift.methods import methods

    console = Console()
    out = table("Methods", "name", "needs", "cost", "what it does", "settings", "source")
    for name, cls in methods().items():
        method = cls()
        needs = [word for word, wanted in (("anchor", method.needs.anchors), ("target", method.needs.target)) if wanted]
        settings = ", ".join(f"{f.name}={getattr(method, f.name)}" for f in dataclasses.fields(cls))
        cost = method.needs.cost_class + (" + roll-outs" if method.needs.rollouts else "")
        out.add_row(name, ", ".join(needs) or "-", cost, cls.summary, settings or "-", cls.paper)
    console.print(out)
    console.print("cost: text = no model, forward = one forward per row, gradient = one forward and backward per row,")
    console.print("probe = one forward per row and several short trainings of the navigator,")
    console.print("roll-outs = many short trainings of the navigator, each measured on held-out rows")
