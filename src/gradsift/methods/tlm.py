"""Rows whose prompts surprise the model, weighted by the prompt's perplexity.

Paper: Hu et al., "Test-Time Learning for Large Language Models", ICML 2025, arXiv 2505.20633 (TLM). Only its weighting is
used, for supervised fine-tuning; the paper adapts a model to unlabeled inputs.

Algorithm:
    1  CE_i = mean nats per prompt token, template tokens left out; log P_i = CE_i, clipped at its ``clip`` quantile
    2  log P0: the ceil((1 - share) N)-th smallest CE (``quantile``), or ``log_threshold`` (``absolute``; 3 nats in the paper)
    3  S_i = P_i / P0 where P_i > P0, else 0                                      (equations 5 and 6; lambda cancels in step 5)
    4  take the rows of largest S_i > 0
    5  weights S_i / mean S of the rows taken, or 1 (``weights = none``)

Departures from the paper: the weights serve supervised training on the responses, where the paper minimizes the
perplexity of the inputs themselves; the threshold is a quantile by default, because e^3 belongs to one model and
tokenizer; template tokens are left out, since they dilute short prompts more; perplexities are clipped, so that one
garbled prompt cannot carry a batch; prompts of fewer than ``min_prompt`` tokens are left out and counted.

Departures from released code: of Fhujinwu/TLM at 0ff4db9 the trainer is not built, which minimizes
the mean cross-entropy where equation 7 has the perplexity; its weights are those of step 3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from gradsift.errors import InfeasibleError
from gradsift.geometry.surprise import clip_at, quantile_threshold, surprise_weights
from gradsift.methods.base import Needs, register, require, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Note, Problem, Selection

Share = Annotated[float, Field(gt=0, le=1)]


@register
@dataclass(frozen=True)
class Tlm:
    """Largest prompt perplexity.

    Args:
        mode: ``quantile`` puts the threshold at a quantile of the pool, ``absolute`` at ``log_threshold``.
        share: share of the rows above the threshold, in (0, 1]; ``quantile`` only.
        log_threshold: log P0 in nats; ``absolute`` only.
        min_prompt: least prompt tokens of a row.
        clip: quantile of the perplexity at which larger ones are cut, in (0, 1].
        weights: ``perplexity`` or ``none``.
    """

    name: ClassVar[str] = "tlm"
    paper: ClassVar[str] = "Hu et al. 2025, arXiv 2505.20633 (TLM)"
    summary: ClassVar[str] = "rows whose prompts the model finds surprising, weighted by perplexity"
    evidence: ClassVar[str] = "sections + code"

    mode: Literal["quantile", "absolute"] = "quantile"
    share: Share = 0.5
    log_threshold: float = 3.0
    min_prompt: Annotated[int, Field(ge=1)] = 8
    clip: Share = 0.99
    weights: Literal["perplexity", "none"] = "perplexity"

    @property
    def needs(self) -> Needs:
        """One forward pass that also sees the prompts."""
        return Needs(signals=frozenset({"prompt_loss"}))

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the rows of the most surprising prompts.

        Args:
            problem: the eligible rows with ``prompt_loss`` and ``num_prompt``.
            budget: rows, percentage or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection; scores are clipped mean nats per prompt token, NaN for rows without a prompt.
        """
        require(problem, self)
        loss, count = problem.prompt_loss, problem.num_prompt
        assert loss is not None
        assert count is not None
        long = count >= self.min_prompt
        edge = self._threshold(loss, long)
        top = clip_at(loss[long], self.clip)
        score = np.where(long, np.minimum(loss, top), np.nan)
        above = long & (loss > edge)
        if above.any() and top <= edge:
            raise _clip_too_low(top, edge)
        reach = 4 * problem.noise.loss
        near = long & (np.abs(loss - edge) <= reach) if reach and np.isfinite(edge) else None
        selection = select_ranked(
            problem,
            self,
            budget,
            stream,
            score=score,
            bound=problem.noise.loss,
            kept="prompt",
            why_kept=lambda i: (
                f"prompt perplexity {np.exp(loss[i]):.4g} over {count[i]} tokens, threshold {_power(edge)}"
            ),
            candidates=above,
            unsure=near,
            dropped=self._dropped(problem, long, above, edge),
            notes=self._notes(problem, loss, long, above, top),
        )
        if self.weights == "none":
            return selection
        return dataclasses.replace(selection, weights=self._weights(selection, score, edge))

    def _threshold(self, loss: Float[np.ndarray, " N"], long: Bool[np.ndarray, " N"]) -> float:
        if not long.any():
            raise InfeasibleError(
                f"no row has a prompt of {self.min_prompt} tokens",
                got=f"{len(long)} rows",
                expected="rows with a prompt that carries no loss",
                do="--set min_prompt=1, or train on completions only (--loss-on completion or assistant)",
            )
        if self.mode == "quantile":
            return quantile_threshold(loss[long], self.share)
        if not (loss[long] > self.log_threshold).any():
            low, middle, high = np.exp(np.quantile(loss[long], [0.1, 0.5, 1.0]))
            raise InfeasibleError(
                "no prompt is above the threshold",
                where="log_threshold",
                got=f"perplexities {low:.4g} (10%), {middle:.4g} (median), {high:.4g} (largest)",
                expected=f"above {np.exp(self.log_threshold):.4g}",
                do="--set mode=quantile",
            )
        return self.log_threshold

    def _weights(self, selection: Selection, score: Float[np.ndarray, " N"], edge: float) -> Float[np.ndarray, " k"]:
        place = {row: k for k, row in enumerate(selection.problem_ids)}
        taken = score[[place[row] for row in selection.ids]]
        # A threshold of -inf (share = 1) cancels like any other, so the least score stands in for it.
        weight = surprise_weights(taken, max(edge, float(taken.min()) - 1.0))
        return (weight / weight.mean()).astype(np.float32)

    def _dropped(
        self, problem: Problem, long: Bool[np.ndarray, " N"], above: Bool[np.ndarray, " N"], edge: float
    ) -> dict[int, tuple[str, str]]:
        assert problem.prompt_loss is not None
        assert problem.num_prompt is not None
        out: dict[int, tuple[str, str]] = {}
        for i in np.flatnonzero(~above).tolist():
            if long[i]:
                text = f"prompt perplexity {np.exp(problem.prompt_loss[i]):.4g}, not above {_power(edge)}"
                out[i] = ("dropped:not_surprising", text)
            else:
                out[i] = ("dropped:short_prompt", f"{problem.num_prompt[i]} prompt tokens, below {self.min_prompt}")
        return out

    def _notes(
        self,
        problem: Problem,
        loss: Float[np.ndarray, " N"],
        long: Bool[np.ndarray, " N"],
        above: Bool[np.ndarray, " N"],
        top: float,
    ) -> list[Note]:
        notes = []
        if not long.all():
            short = np.flatnonzero(~long)
            text = f"{len(short)} rows have fewer than {self.min_prompt} prompt tokens, template left out, and cannot be chosen"
            notes.append(Note("short_prompt", text, len(short), tuple(problem.ids[i] for i in short[:5])))
        beyond = np.flatnonzero(long & (loss > top))
        if len(beyond):
            worst = beyond[np.lexsort((beyond, -loss[beyond]))]
            text = f"{len(beyond)} prompts are above the {self.clip:.0%} quantile of perplexity and count as if they stood at it"
            notes.append(Note("clipped", text, len(beyond), tuple(problem.ids[i] for i in worst[:5])))
        if self.mode == "absolute" and above[long].all():
            notes.append(
                Note("no_effect", "every prompt is above the threshold, which then has no effect", int(long.sum()))
            )
        return notes


def _clip_too_low(top: float, edge: float) -> InfeasibleError:
    """Every row above the threshold would count as if it stood below it, with a weight of 0."""
    return InfeasibleError(
        "perplexities are clipped at or below the threshold",
        where="clip",
        got=f"clipped at {np.exp(top):.4g}, threshold {_power(edge)}",
        expected="a clip above the threshold",
        do="--set clip=1, or lower the threshold: raise share, or lower log_threshold",
    )


def _power(edge: float) -> str:
    return "none" if edge == -np.inf else f"{np.exp(edge):.4g}"
