"""Facts of one memory level: how often the pre-trained model can already complete them.

Paper: Ye et al., "60 Data Points are Sufficient to Fine-Tune LLMs for Question-Answering", 2024, arXiv 2409.15825;
formulas of its follow-up, Ye et al., EMNLP 2025, arXiv 2509.16596. Of the first paper only the abstract was at hand.

Algorithm:
    1  R_k = outputs that held the object / outputs, over 21 templates of 10 samples (a column of the rows: the counts)
    2  level 0 where R = 0, else the i with R in ((i - 1)/4, i/4]
    3  draw rows of ``level`` at random, in turn over relations, up to the budget

The counts are measured apart, by 210 short generations of the pre-trained model per fact;
``gradsift.geometry.recall.recalls`` says what counts as a hit.

Departures from the paper: level 2 by default, since the two papers disagree about the best and the middle is the safer
one; hits are on word boundaries, with case and accents folded, but anywhere in scripts without spaces and in Korean, whose
words carry endings; the draw is balanced over relations; every recall has a Wilson 95% interval, and facts whose interval
spans three levels are counted; rows whose prompt holds the object are left out; level 0 is refused unless asked for twice.

Departures from released code: none was found. Departures from our specification: the cheap stand-in by paraphrases is not
built; aliases and near misses are the business of whoever counts the hits; two spellings of one fact are not merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from gradsift.errors import ConfigError, DataError, InfeasibleError
from gradsift.geometry.recall import balanced_places, count_levels, level_of_share, recall_level, recalls, wilson
from gradsift.methods.base import Needs, register, require, resolve_budget, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Column, Note, Problem, Selection


@register
@dataclass(frozen=True)
class MemoryLevel:
    """Facts that the model recalls about so often.

    Args:
        level: 0 (never) to 4 (nearly always).
        counts: column of hits per template.
        samples: outputs per template.
        relation: column that names a fact's relation; empty takes the labels of the pool files.
        widen: also take the neighbor levels where the level has too few rows.
        allow_unknown: let level 0 in.
        max_answer: largest median of trained tokens per row, the end token included.
    """

    name: ClassVar[str] = "memory_level"
    paper: ClassVar[str] = "Ye et al. 2024, arXiv 2409.15825; 2025, arXiv 2509.16596"
    summary: ClassVar[str] = "facts that the pre-trained model recalls about so often; your recall counts"
    evidence: ClassVar[str] = "abstract + follow-up"

    level: Annotated[int, Field(ge=0, le=4)] = 2
    counts: str = "recall_counts"
    samples: Annotated[int, Field(ge=1)] = 10
    relation: str = ""
    widen: bool = False
    allow_unknown: bool = False
    max_answer: Annotated[int, Field(ge=1)] = 8

    def __post_init__(self) -> None:
        if self.level == 0 and not self.allow_unknown:
            raise ConfigError(
                "level 0 are facts that the model does not know: training on them does most harm",
                where="--set level", got="0", expected="1 to 4", do="--set allow_unknown=true to insist",
            )  # fmt: skip

    @property
    def needs(self) -> Needs:
        """Recall counts that were measured before, and the rows' texts; no model."""
        columns = [Column(self.counts, "numbers")]
        columns += [Column(self.relation, "word")] if self.relation else []
        return Needs(columns=tuple(columns), texts=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Draw facts of the level.

        Args:
            problem: the eligible rows with the counts and texts.
            budget: rows, percentage or trained tokens.
            stream: of the draw.

        Returns:
            The selection; scores are minus the place in the drawn order, ``cluster`` is not set.
        """
        require(problem, self)
        self._refuse(problem)
        hits, outputs = self._recalls(problem)
        levels = np.array([recall_level(int(h), int(t)) for h, t in zip(hits, outputs, strict=True)], dtype=np.int64)
        trivial = np.array([_answered(prompt, answer) for prompt, answer in problem.texts])
        groups = [str(r) for r in problem.external[self.relation]] if self.relation else list(problem.sources)
        draw = stream.child("draw").uniform(problem.ids)
        place, wide = self._places(levels, trivial, draw, groups, problem, budget)
        if not np.isfinite(place).any():
            raise InfeasibleError(
                f"no fact is at level {self.level}", got=_table(levels), expected="facts of that level",
                do="choose another --set level, or --set widen=true",
            )  # fmt: skip
        candidates = np.isfinite(place)
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=np.where(candidates, -place, np.nan),
            kept="level",
            why_kept=lambda i: f"recalled {hits[i]} times of {outputs[i]}, level {levels[i]}, relation {groups[i]}",
            candidates=candidates,
            dropped={
                int(i): ("dropped:trivial", "its prompt holds the object")
                if trivial[i]
                else ("dropped:level", f"recalled {hits[i]} times of {outputs[i]}, level {levels[i]}")
                for i in np.flatnonzero(~candidates)
            },
            notes=self._notes(problem, levels, (hits, outputs), trivial, wide, budget),
        )

    def _refuse(self, problem: Problem) -> None:
        empty = [i for i, (_, answer) in enumerate(problem.texts) if not answer.strip()]
        if empty:
            raise DataError(
                "a fact has no object",
                where=f"{len(empty)} rows, such as {', '.join(problem.ids[i] for i in empty[:3])}",
                got="an empty response", expected="the object as the response", do="correct the rows, or leave them out",
            )  # fmt: skip
        middle = float(np.median(problem.num_trained))
        if middle > self.max_answer:
            raise DataError(
                "this is no set of short answers", got=f"a median of {middle:g} trained tokens per row",
                expected=f"at most {self.max_answer}", do="use stm, grads or ogs, or raise --set max_answer",
            )  # fmt: skip

    def _recalls(self, problem: Problem) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        hits = np.zeros(problem.size, dtype=np.int64)
        outputs = np.zeros(problem.size, dtype=np.int64)
        for i, counts in enumerate(problem.external[self.counts]):
            whole = all(float(c).is_integer() and 0 <= c <= self.samples for c in counts)
            if len(counts) < 5 or not whole:
                raise DataError(
                    "the recall counts of a fact do not fit", where=f"column {self.counts}, row {problem.ids[i]}",
                    got=str(list(counts))[:80], expected=f"at least 5 whole numbers of 0 to {self.samples}",
                    do="count hits per template, or correct --set samples",
                )  # fmt: skip
            hits[i], outputs[i] = int(sum(counts)), len(counts) * self.samples
        return hits, outputs

    def _places(
        self,
        levels: Int[np.ndarray, " N"],
        trivial: Bool[np.ndarray, " N"],
        draw: Float[np.ndarray, " N"],
        groups: list[str],
        problem: Problem,
        budget: Budget,
    ) -> tuple[Float[np.ndarray, " N"], int]:
        """Places in the drawn order, and how many rows of neighbor levels are among the candidates."""
        own = (levels == self.level) & ~trivial
        place = balanced_places(draw, groups, own)
        allowance = resolve_budget(problem, budget)
        if not self.widen or int(allowance.cost(problem)[own].sum()) >= allowance.amount:
            return place, 0
        near = (np.abs(levels - self.level) == 1) & ~trivial & ((levels > 0) | self.allow_unknown)
        more = balanced_places(draw, groups, near)
        return np.where(near, more + int(own.sum()), place), int(near.sum())

    def _notes(
        self,
        problem: Problem,
        levels: Int[np.ndarray, " N"],
        recall: tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]],
        trivial: Bool[np.ndarray, " N"],
        wide: int,
        budget: Budget,
    ) -> list[Note]:
        notes = [Note("levels", f"facts per level: {_table(levels)}", problem.size)]
        spans = [wilson(int(h), int(t)) for h, t in zip(*recall, strict=True)]
        vague = [i for i, (low, high) in enumerate(spans) if level_of_share(high) - level_of_share(low) >= 2]
        if vague:
            text = f"the recall of {len(vague)} facts is uncertain: its 95% interval spans three levels or more"
            notes.append(Note("uncertain", text, len(vague), tuple(problem.ids[i] for i in vague[:5])))
        few = sum(len(counts) < 21 for counts in problem.external[self.counts])
        if few:
            notes.append(Note("few_templates", f"{few} facts were asked by fewer than 21 templates", few))
        if trivial.any():
            ids = tuple(problem.ids[i] for i in np.flatnonzero(trivial)[:5])
            text = f"{int(trivial.sum())} prompts hold the object and cannot be chosen"
            notes.append(Note("trivial", text, int(trivial.sum()), ids))
        if wide:
            notes.append(
                Note("widened", f"level {self.level} has too few facts: {wide} of its neighbors may follow", wide)
            )
        asked = resolve_budget(problem, budget).rows or 0
        if asked >= 1920:
            notes.append(Note("many", "at 1,920 facts the paper found worse results than at 240", asked))
        return notes


def _answered(prompt: str, answer: str) -> bool:
    return bool(answer.strip()) and recalls(prompt, [answer])


def _table(levels: Int[np.ndarray, " N"]) -> str:
    return ", ".join(f"{n} at level {k}" for k, n in enumerate(count_levels(levels)))
