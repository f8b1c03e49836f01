"""Shuffles an epoch of any size without storing the permutation: each value is computed on demand.

The permutation is a Feistel network over pairs (left, right) with left < a, right < b and a * b >= size. Each round
adds a keyed hash of one half to the other half, which is invertible for any hash. A result that is not below `size` is
permuted again until it is.

Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 3 and 4 (cycle walking; generalised
Feistel).
"""

import hashlib
import math

import numpy as np

ROUNDS = 8  # half of them change `left`, half of them `right`


class Shuffle:
    """A pseudorandom permutation of 0 .. size - 1, determined by `key` (any number of integers)."""

    def __init__(self, size: int, *key: int):
        self.size = size
        self._right_size = math.isqrt(size - 1) + 1
        self._left_size = -(-size // self._right_size)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Returns the permuted indices, int64 in the same shape. `indices` must be below `size`."""
        values = self._permute(np.asarray(indices, dtype=np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        """Returns the values permuted once, by a permutation of 0 .. a * b - 1."""
        left_size, right_size = np.uint64(self._left_size), np.uint64(self._right_size)
        left, right = values // right_size, values % right_size
        for index in range(0, ROUNDS, 2):
            left = (left + _hash(right, self._keys[index]) % left_size) % left_size
            right = (right + _hash(left, self._keys[index + 1]) % right_size) % right_size
        return left * right_size + right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Returns 64 hashed bits per value.

    Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", the mixing function of SplitMix64.
    """
    values = np.atleast_1d(values) + key  # NumPy warns about overflow in scalars, but not in arrays
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
