"""Selection methods, one file each; importing this package registers them all.

``make_method(name, settings)`` builds one, ``methods()`` lists them; third parties register through the entry-point
group ``gradsift.methods``.
"""

from __future__ import annotations

from gradsift.methods import (
    bm25,
    conflict,
    crossfit,
    full,
    hybrid,
    length,
    loss,
    norm,
    ogs,
    ogs_dual,
    ogs_static,
    random_,
    rds,
    target_cosine,
)
from gradsift.methods.base import Method, Needs, make_method, methods, register, require

__all__ = [
    "Method",
    "Needs",
    "bm25",
    "conflict",
    "crossfit",
    "full",
    "hybrid",
    "length",
    "loss",
    "make_method",
    "methods",
    "norm",
    "ogs",
    "ogs_dual",
    "ogs_static",
    "random_",
    "rds",
    "register",
    "require",
    "target_cosine",
]
