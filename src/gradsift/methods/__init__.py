"""Selection methods, one file each; importing this package registers them all.

``make_method(name, settings)`` builds one, ``methods()`` lists them; third parties register through the entry-point
group ``gradsift.methods``.
"""

from __future__ import annotations

from gradsift.methods import (
    bm25,
    conflict,
    crossfit,
    daar,
    dids,
    doge,
    doremi,
    dsir,
    full,
    grad_match,
    grad_match_partitioned,
    grads,
    hybrid,
    ifd,
    length,
    less,
    loss,
    memory_level,
    norm,
    ogs,
    ogs_dual,
    ogs_static,
    random_,
    rds,
    target_cosine,
    thtb,
    tlm,
)
from gradsift.methods.base import Method, Needs, make_method, methods, register, require

__all__ = [
    "Method",
    "Needs",
    "bm25",
    "conflict",
    "crossfit",
    "daar",
    "dids",
    "doge",
    "doremi",
    "dsir",
    "full",
    "grad_match",
    "grad_match_partitioned",
    "grads",
    "hybrid",
    "ifd",
    "length",
    "less",
    "loss",
    "make_method",
    "memory_level",
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
    "thtb",
    "tlm",
]
