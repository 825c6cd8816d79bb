"""gradsift picks the training examples that teach a domain without forgetting, and proves the choice.

Heavy imports are lazy: ``import gradsift`` and ``gradsift --help`` never import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradsift.api import select
    from gradsift.errors import GradsiftError
    from gradsift.methods import methods, register
    from gradsift.types import Budget, Problem, Selection

__all__ = ["Budget", "GradsiftError", "Problem", "Selection", "__version__", "methods", "register", "select"]

_PLACES = {
    "Budget": "gradsift.types",
    "GradsiftError": "gradsift.errors",
    "Problem": "gradsift.types",
    "Selection": "gradsift.types",
    "methods": "gradsift.methods",
    "register": "gradsift.methods",
    "select": "gradsift.api",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'gradsift' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
