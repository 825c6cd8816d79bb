"""Update rules of domain weights: the entropic step of DoGE, the group DRO step of DoReMi, the damped root step for DIDS.

Sources: Fan et al., DoGE (arXiv 2310.15393) and Xie et al., DoReMi (arXiv 2305.10429), rules as in their released code where
the specification says so; the root step replaces DIDS's (arXiv 2504.13227) division by the old weight and is ours.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from gradsift.errors import NumericsError
from gradsift.geometry.mixture import bounded

Clip = Literal["signed", "release", "none"]
Absent = Literal["zero", "decay"]
CLIP = 5.0  # largest |u| in learning rates
DECAY = 0.9


def alignment(gram: Float[np.ndarray, "a a"], num_domains: int, *, drop_self: bool = False) -> Float[np.ndarray, " k"]:
    """Add up each domain's inner products with the targets: DoGE's generalization estimate W_j.

    Args:
        gram: float64 [k+m, k+m], domains first; without tasks (m = 0) the domains themselves are the targets.
        num_domains: k.
        drop_self: leave <g_j, g_j> out where domains are targets.

    Returns:
        float64 [k] W_j = sum over targets t of <g_j, g_t>.

    Raises:
        NumericsError: a gradient is zero or not finite.
    """
    squares = np.diag(gram)
    bad = np.flatnonzero(~np.isfinite(gram).all(axis=1) | (squares <= 0))
    if bad.size:
        raise NumericsError(
            "a mean gradient is zero or not finite",
            where=f"domain or task number {bad[0]} of {len(gram)}, domains first",
            got=f"squared length {squares[bad[0]]}",
            expected="a finite gradient with a direction",
            do="look at the rows of this domain with gradsift inspect, and lower proxy.lr",
        )
    if len(gram) > num_domains:
        return gram[:num_domains, num_domains:].sum(axis=1)
    return gram.sum(axis=1) - (squares if drop_self else 0.0)


def entropic_evidence(
    dots: Float[np.ndarray, " k"],
    norms: Float[np.ndarray, " k"],
    lr: float,
    clip: Clip = "signed",
) -> Float[np.ndarray, " k"]:
    """Scale generalization estimates to u_j = lr W_j / mean |g| and clip them (doge.md step 5 and 6).

    Args:
        dots: float64 [k] W_j.
        norms: float64 [k] |g_j| of the train domains.
        lr: learning rate eta_t of the step.
        clip: ``signed`` to +-5 lr (ours), ``release`` to [0, 5 lr], which forgives a domain that hurts, or ``none``.

    Returns:
        float64 [k].
    """
    u = lr * dots / norms.mean()
    if clip == "none":
        return u
    return np.clip(u, 0.0 if clip == "release" else -CLIP * lr, CLIP * lr)


def fill_absent(
    evidence: Float[np.ndarray, " k"], carried: Float[np.ndarray, " k"], present: Bool[np.ndarray, " k"], how: Absent
) -> Float[np.ndarray, " k"]:
    """Give absent domains their evidence: nothing, or nine tenths of what they last had; never a silent reuse.

    Args:
        evidence: float64 [k], anything where a domain is absent.
        carried: float64 [k] of the step before.
        present: bool [k].
        how: ``zero`` or ``decay``.

    Returns:
        float64 [k].
    """
    return np.where(present, evidence, DECAY * carried if how == "decay" else 0.0)


def entropic_step(
    weights: Float[np.ndarray, " k"], evidence: Float[np.ndarray, " k"], mu: float
) -> Float[np.ndarray, " k"]:
    """Move weights by a_j <- a_j exp(u_j / mu), normalized: the closed form of max <a, u> - mu KL(a || a_old).

    Args:
        weights: float64 [k] on the simplex.
        evidence: float64 [k] u_j.
        mu: strength of the old weights, > 0.

    Returns:
        float64 [k] on the simplex. DoReMi's step is the same with u = lambda and mu = 1 / eta.
    """
    step = evidence / mu
    raised = weights * np.exp(step - step.max())
    return raised / raised.sum()


def largest_log_step(evidence: Float[np.ndarray, " k"], mu: float) -> float:
    """Give the largest move of a log-weight before normalization; 5 eta / mu at most with a clip, 0.25 at DoGE's settings.

    Args:
        evidence: float64 [k] u_j.
        mu: strength of the old weights.

    Returns:
        max_j |u_j| / mu.
    """
    return float(np.abs(evidence).max() / mu)


def token_excess(proxy: Float[np.ndarray, " t"], reference: Float[np.ndarray, " t"]) -> tuple[float, float]:
    """Average the excess of a domain's tokens, clipped per token before the average (doremi.md section 2).

    Args:
        proxy: nats of the tokens under the proxy.
        reference: nats of the same tokens under the reference.

    Returns:
        mean of max(0, proxy - reference), and the share of tokens where it is positive.
    """
    above = np.asarray(proxy, np.float64) - np.asarray(reference, np.float64)
    return float(np.maximum(above, 0.0).mean()), float((above > 0).mean())


def dro_step(
    weights: Float[np.ndarray, " k"], excess: Float[np.ndarray, " k"], eta: float, smoothing: float
) -> Float[np.ndarray, " k"]:
    """Raise domains that lag the reference: a_j exp(eta lambda_j), normalized, then (1 - c) a + c / k.

    Args:
        weights: float64 [k] on the simplex.
        excess: float64 [k] lambda_j >= 0, nats.
        eta: step size.
        smoothing: c in [0, 1).

    Returns:
        float64 [k] on the simplex, each at least c / k.
    """
    moved = entropic_step(weights, excess, 1.0 / eta)
    return (1 - smoothing) * moved + smoothing / len(weights)


def root_step(
    weights: Float[np.ndarray, " k"],
    utility: Float[np.ndarray, " k"],
    beta: float,
    *,
    low: Float[np.ndarray, " k"],
    high: Float[np.ndarray, " k"],
) -> Float[np.ndarray, " k"]:
    """Move halfway to the weights that minimize sum_j c_j / p_j, p_j proportional to sqrt(c_j) (dids.md steps 10 and 11).

    Args:
        weights: float64 [k] on the simplex.
        utility: float64 [k] c_j >= 0, not all 0.
        beta: weight of the old weights, in [0, 1).
        low: float64 [k] floors.
        high: float64 [k] caps.

    Returns:
        float64 [k] on the simplex and within the bounds.
    """
    root = np.sqrt(utility)
    return bounded(beta * weights + (1 - beta) * root / root.sum(), low, high)
