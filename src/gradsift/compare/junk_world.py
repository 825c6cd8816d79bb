"""The real-data world with rows that do harm, all of them in the words of the domain (ours).

In the world ``real`` knowing the kind of every row won nothing: in three domains no advantage of the oracle over random was measured
(``docs/results/LOG.md``), probably because SmolLM2 learns the form of an answer and not whether it is right. Here a part of the pool
teaches a bad form: *echo* rows answer with their own question, *refusal* rows decline, *salad* rows have the words of the right
answer in another order (of the question, where the answer is one word, as in law).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gradsift.compare.real_data import Item, Items
from gradsift.compare.real_world import REAL_GRID, RealSettings, real_world
from gradsift.compare.world import World
from gradsift.errors import DataError
from gradsift.models.load import Navigator
from gradsift.seeds import stream

__all__ = ["REAL_GRID", "JunkSettings", "echo", "junk_world", "salad"]

ECHO_CHARACTERS = 160
REFUSALS = (
    "I am sorry, but I cannot help with that.",
    "I'm not able to answer this question. Please ask a professional.",
    "As an assistant I can give no advice on this matter.",
    "Sorry, this is something I cannot comment on.",
)


@dataclass(frozen=True)
class JunkSettings(RealSettings):
    """Sizes and rules of :class:`RealSettings`, and how many rows of each further kind the pool holds.

    Args:
        echo: domain rows that answer with their question.
        refusal: domain rows that decline.
        salad: domain rows with the words of the right answer in another order.
    """

    clean: int = 60
    replay: int = 24
    wrong: int = 24
    duplicate: int = 0
    other: int = 12
    echo: int = 24
    refusal: int = 24
    salad: int = 12

    @property
    def bad(self) -> Mapping[str, int]:
        """Kind of bad domain row -> how many the pool holds."""
        return {"wrong": self.wrong, "echo": self.echo, "refusal": self.refusal, "salad": self.salad}

    def spoiled(self, kind: str, item: Item, others: Sequence[Item], seed: int) -> str:
        """Give a domain question a bad answer.

        Args:
            kind: of ``bad``.
            item: the question and its right answer.
            others: the domain's items in the pool, and no others: their answers are evaluation's.
            seed: of the world.

        Returns:
            The answer.
        """
        if kind == "echo":
            return echo(item)
        if kind == "refusal":
            return REFUSALS[int(stream(seed, "real/refusal").uniform([item.id])[0] * len(REFUSALS))]
        if kind == "salad":
            return salad(item, seed)
        return super().spoiled(kind, item, others, seed)


def junk_world(
    seed: int,
    settings: JunkSettings | None = None,
    navigator: Navigator | None = None,
    items: Items | None = None,
    device: str = "cpu",
) -> World:
    """Build one seed of the world from the packaged model and data.

    Args:
        seed: of the deal, the bad answers and the adapter.
        settings: sizes and rules.
        navigator: a model already at hand; the packaged one by default.
        items: items already at hand; the wheel's by default.
        device: where the packaged model is loaded; cpu or cuda:N.

    Returns:
        The world, measured in nats.
    """
    settings = settings or JunkSettings()
    return replace(real_world(seed, settings, navigator, items, device), name=f"junk-{settings.domain}")


def echo(item: Item) -> str:
    """Answer with the question.

    Args:
        item: a question.

    Returns:
        Its first line, cut between words to at most ``ECHO_CHARACTERS``.
    """
    question = item.prompt.partition("\n")[0].removeprefix("Question: ")
    cut = question[: ECHO_CHARACTERS + 1]
    return question if len(question) <= ECHO_CHARACTERS else cut.rpartition(" ")[0] or cut[:-1]


def salad(item: Item, seed: int) -> str:
    """Put the words of the right answer into another order.

    Args:
        item: a question and its answer.
        seed: of the order.

    Returns:
        The same words; an answer in which no two words differ is taken from the question instead.

    Raises:
        DataError: neither has two words that differ.
    """
    for text in (item.answer, echo(item)):
        words = text.split()
        if len(set(words)) < 2:
            continue
        generator = stream(seed, f"real/salad/{item.id}").numpy()
        while (mixed := [words[int(k)] for k in generator.permutation(len(words))]) == words:
            pass
        return " ".join(mixed)
    raise DataError("the words of this row have one order only", where=item.id, got=item.answer)
