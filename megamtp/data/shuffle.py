"""A permutation that is computed where it is looked at, instead of kept: the order of an epoch of any size, in no
memory.

A Feistel network over pairs (left, right) with left < a, right < b and a * b >= number: each round adds a keyed hash of
one to the other, which can be undone whatever the hash is. Values from `number` up are sent through again until they
fall below it.

Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 3 and 4 (cycle walking; generalised
Feistel).
"""

import hashlib
import math

import numpy as np

ROUNDS = 8  # half of them for either side


class Shuffle:
    """A permutation of 0 .. number - 1 that is drawn by `key`, some integers: `shuffle(places)` looks it up, array
    by array.
    """

    def __init__(self, number: int, *key: int):
        self.number = number
        self._right = math.isqrt(number - 1) + 1
        self._left = -(-number // self._right)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """int64, of the shape of `places`, whose values are below `number`."""
        values = self._permute(np.asarray(places, dtype=np.uint64))
        while (outside := values >= self.number).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        """One pass: a permutation of 0 .. a * b - 1."""
        left_size, right_size = np.uint64(self._left), np.uint64(self._right)
        left, right = values // right_size, values % right_size
        for index in range(0, ROUNDS, 2):
            left = (left + _hash(right, self._keys[index]) % left_size) % left_size
            right = (right + _hash(left, self._keys[index + 1]) % right_size) % right_size
        return left * right_size + right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 bits each. Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", the mix of
    SplitMix64.
    """
    values = np.atleast_1d(values) + key  # arrays wrap around in silence
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
