"""Randomness keyed by (seed, stream, id), never by position (ours).

A draw for a row depends on the run's seed, the name of the stream and the row's id alone, so the order of rows, batch
sizes, worker counts and restarts cannot change it. blake2b is the key function: its bits are the same everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


def key64(*parts: object) -> int:
    """Hash any parts to an unsigned 64-bit key.

    Args:
        *parts: anything with a stable ``str``; joined by a unit separator.

    Returns:
        An integer in [0, 2**64).
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Stream:
    """A named, independent stream of random numbers.

    Args:
        seed: the run's seed.
        name: what the draw is for, such as ``"select/random"``.
    """

    seed: int
    name: str

    def child(self, name: str) -> Stream:
        """Return the stream ``self.name/name``.

        Args:
            name: last part of the new stream's name.

        Returns:
            An independent stream.
        """
        return Stream(self.seed, f"{self.name}/{name}")

    def uniform(self, ids: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Draw one number in [0, 1) per id.

        Args:
            ids: N row ids.

        Returns:
            float64 [N]; equal ids get equal numbers, whatever their position.
        """
        keys = np.fromiter((key64(self.seed, self.name, i) for i in ids), dtype=np.uint64, count=len(ids))
        return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def numpy(self) -> np.random.Generator:
        """Return a numpy generator for draws that have no id (splits, batches), Philox keyed by the stream.

        Returns:
            A fresh generator: two calls give the same numbers.
        """
        return np.random.Generator(np.random.Philox(key=key64(self.seed, self.name, "numpy")))


def stream(seed: int, name: str) -> Stream:
    """Name a stream of the run's randomness.

    Args:
        seed: the run's seed.
        name: what the draw is for.

    Returns:
        The stream.
    """
    return Stream(seed, name)
