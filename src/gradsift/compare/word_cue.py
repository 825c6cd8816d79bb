"""A word cue: which of two kinds of text a row's words look like, blind to their order (naive Bayes)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gradsift.data.lexical import words
from gradsift.errors import DataError


@dataclass(frozen=True)
class WordOdds:
    """Naive Bayes over words with equal priors: log-odds of a word in one kind of text against another.

    Args:
        odds: word -> log(p(word | domain) / p(word | general)); unknown words count 0.
    """

    odds: Mapping[str, float]

    def score(self, text: str) -> float:
        """Average over a text's words; blind to their order.

        Args:
            text: any text.

        Returns:
            Mean log-odds; > 0 looks like the domain; 0 without words.
        """
        found = words(text)
        return sum(sorted(self.odds.get(word, 0.0) for word in found)) / max(1, len(found))


def fit_word_odds(domain: Iterable[str], general: Iterable[str]) -> WordOdds:
    """Count words on both sides, with add-one smoothing: for much text.

    Args:
        domain: texts of the domain.
        general: other texts.

    Returns:
        The odds.

    Raises:
        DataError: a side holds no word.
    """
    one, two = (Counter(word for text in side for word in words(text)) for side in (domain, general))
    if not one or not two:
        raise DataError("a word cue needs words on both sides", got=f"{one.total()} and {two.total()} words")
    every = sorted({*one, *two})
    total_one, total_two = one.total() + len(every), two.total() + len(every)
    return WordOdds({w: math.log((one[w] + 1) / total_one) - math.log((two[w] + 1) / total_two) for w in every})


def fit_word_cue(domain: Iterable[str], general: Iterable[str], background: Iterable[str]) -> WordOdds:
    """Count words on both sides, mixed half and half with unlabeled text: for a few rows (Jelinek and Mercer 1980).

    p(w | side) = (count_side(w) / total_side + p(w | all text)) / 2, so a word that neither side has tells nothing, and
    neither side gains by being the smaller one, as it would with add-one smoothing.

    Args:
        domain: texts of the domain.
        general: other texts.
        background: unlabeled texts, such as the pool.

    Returns:
        The odds.

    Raises:
        DataError: a side holds no word.
    """
    one, two, other = (Counter(w for text in side for w in words(text)) for side in (domain, general, background))
    if not one or not two:
        raise DataError("a word cue needs words on both sides", got=f"{one.total()} and {two.total()} words")
    every = one + two + other
    odds = {}
    for word in sorted(every):
        common = every[word] / every.total()
        odds[word] = math.log(one[word] / one.total() + common) - math.log(two[word] / two.total() + common)
    return WordOdds(odds)
