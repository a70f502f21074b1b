"""Keys of stored rows: hashes of everything that decides the content of a row."""

import numpy as np

from common.hashing import hash_of

KEY_BYTES = 16
KEY_DTYPE = f"S{KEY_BYTES}"
"""Keys in numpy arrays, which can be sorted and searched."""


def key_of(*contents: str | bytes) -> bytes:
    """Return the key of a row: `hash_of` as bytes."""
    return bytes.fromhex(hash_of(*contents))


def full_key(key: bytes) -> bytes:
    """Return a key from an array with the zero bytes at its end, which numpy removes."""
    return key.ljust(KEY_BYTES, b"\0")


def key_array(keys: list[bytes]) -> np.ndarray:
    return np.array(keys, KEY_DTYPE)


def join_keys(arrays: list[np.ndarray]) -> np.ndarray:
    """Concatenate any number of arrays of keys."""
    return np.concatenate([np.empty(0, KEY_DTYPE), *arrays])
