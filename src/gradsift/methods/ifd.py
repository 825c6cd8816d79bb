"""Rows whose answer the prompt helps least: instruction-following difficulty.

Paper: Li et al., "From Quantity to Quality: Boosting LLM Performance with Self-Guided Data Selection for Instruction
Tuning", NAACL 2024, arXiv 2308.12032 (IFD, "cherry" data).

Algorithm:
    1  l_i = loss of the answer given the prompt; a_i = loss of the same answer tokens alone
    2  IFD_i = l_i / a_i
    3  rows with IFD_i >= 1 are left out: there the prompt does not help, so prompt and answer are taken not to belong together
    4  take the rows of largest IFD_i

Departures from the paper: the navigator scores as it is, where the paper first trains the model on a thousand rows of
100 clusters; a row is one text with the trainer's own template, so everything without loss is removed, earlier turns
included, and a begin token stands in front, so that both losses are of the same tokens; rows without a prompt, and rows
whose answer alone costs next to nothing, have no ratio, and are left out and counted.

Departures from released code: none was read; it removes rows above 1 as step 3 does by the paper's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from gradsift.errors import InfeasibleError
from gradsift.methods.base import Needs, register, require, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Note, Problem, Selection


@register
@dataclass(frozen=True)
class Ifd:
    """Largest ratio of losses with and without the prompt, below a limit.

    Args:
        limit: ratio from which a row is left out.
    """

    name: ClassVar[str] = "ifd"
    paper: ClassVar[str] = "Li et al. 2023, arXiv 2308.12032 (IFD)"
    summary: ClassVar[str] = "rows whose answers the prompt helps least, but helps"
    evidence: ClassVar[str] = "summaries"

    limit: Annotated[float, Field(gt=0)] = 1.0

    @property
    def needs(self) -> Needs:
        """One forward pass, and a short one over the answers alone."""
        return Needs(signals=frozenset({"loss", "alone_loss"}))

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the rows of largest ratio below the limit.

        Args:
            problem: the eligible rows with ``loss`` and ``alone_loss``.
            budget: rows, percentage or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection; scores are ratios, NaN for rows that have none.
        """
        require(problem, self)
        loss, alone, noise = problem.loss, problem.alone_loss, problem.noise.loss
        assert loss is not None
        assert alone is not None
        least = 8 * noise  # below it rounding decides the ratio
        prompted = problem.num_tokens - problem.num_trained > 1  # the first token is never trained, prompt or not
        defined = prompted & (alone > 0) & (alone >= least)
        ratio = np.where(defined, loss / np.where(defined, alone, 1.0), np.nan)
        fits = defined & (ratio < self.limit)
        if not fits.any():
            raise InfeasibleError(
                f"no row has a ratio below {self.limit:g}",
                got=f"{problem.size} rows, {int(prompted.sum())} of them with a prompt, {int(defined.sum())} with a ratio",
                expected="prompts that help their answers",
                do="raise --set limit, or train on completions only (--loss-on completion or assistant)",
            )
        maybe, spread = self._unsure(loss, alone, prompted, fits, noise)
        selection = select_ranked(
            problem,
            self,
            budget,
            stream,
            score=ratio if maybe is None else np.where(maybe & ~defined, _ratio(loss, alone), ratio),
            bound=spread,
            kept="ratio",
            why_kept=lambda i: f"loss {loss[i]:.4g} with its prompt and {alone[i]:.4g} alone, ratio {ratio[i]:.4f}",
            candidates=fits,
            unsure=maybe,
            dropped=self._dropped(loss, alone, prompted, defined, fits),
            notes=self._notes(problem, prompted, defined, fits),
        )
        return selection

    def _unsure(
        self,
        loss: Float[np.ndarray, " N"],
        alone: Float[np.ndarray, " N"],
        prompted: Bool[np.ndarray, " N"],
        fits: Bool[np.ndarray, " N"],
        noise: float,
    ) -> tuple[Bool[np.ndarray, " N"] | None, float]:
        """Rows whose candidacy the measurement does not settle, and how far a ratio may move.

        (l + e)/(a + f) - l/a = (e - f l/a)/(a + f), so |e|, |f| <= n move it by at most n (1 + l/a)/(a - n).
        """
        if not noise:
            return None, 0.0
        safe = prompted & (alone > 4 * noise)
        move = noise * (1 + _ratio(loss, alone)) / np.where(safe, alone - noise, 1.0)
        near = np.abs(_ratio(loss, alone) - self.limit) <= 4 * move
        maybe = safe & (near | (np.abs(alone - 8 * noise) <= 4 * noise))
        return maybe, float(move[(fits | maybe) & safe].max(initial=0.0))

    def _dropped(
        self,
        loss: Float[np.ndarray, " N"],
        alone: Float[np.ndarray, " N"],
        prompted: Bool[np.ndarray, " N"],
        defined: Bool[np.ndarray, " N"],
        fits: Bool[np.ndarray, " N"],
    ) -> dict[int, tuple[str, str]]:
        out: dict[int, tuple[str, str]] = {}
        for i in np.flatnonzero(~fits).tolist():
            if not prompted[i]:
                out[i] = ("dropped:no_prompt", "every token carries loss, so there is no prompt to remove")
            elif not defined[i]:
                out[i] = (
                    "dropped:no_ratio",
                    f"its answer alone costs {alone[i]:.3g} nats per token, too little to divide by",
                )
            else:
                text = f"ratio {loss[i] / alone[i]:.4f}, not below {self.limit:g}: the prompt does not help the answer"
                out[i] = ("dropped:misaligned", text)
        return out

    def _notes(
        self,
        problem: Problem,
        prompted: Bool[np.ndarray, " N"],
        defined: Bool[np.ndarray, " N"],
        fits: Bool[np.ndarray, " N"],
    ) -> list[Note]:
        groups = (
            ("no_prompt", ~prompted, "have no prompt"),
            ("no_ratio", prompted & ~defined, "have an answer that costs next to nothing alone"),
            ("misaligned", defined & ~fits, f"have a ratio of {self.limit:g} or more"),
        )
        return [
            Note(code, f"{int(rows.sum())} rows {what} and cannot be chosen", int(rows.sum()),
                 tuple(problem.ids[i] for i in np.flatnonzero(rows)[:5]))
            for code, rows, what in groups
            if rows.any()
        ]  # fmt: skip


def _ratio(loss: Float[np.ndarray, " N"], alone: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    return loss / np.where(alone > 0, alone, 1.0)
