"""Random numbers by key: the same key gives the same numbers, in any order, batch or process.

A generator with a state would make a sample depend on the samples drawn before it. Here each draw is a hash of
(key, purpose, counter), with the finaliser of SplitMix64 (https://doi.org/10.1145/2714064.2660195), so that a sample
is a pure function of its place in the data. Everything is vectorised over keys.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of uint64, in place: most of the time would go into new memory."""
    shifted = x >> np.uint64(30)
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(x, np.uint64(27), out=shifted)
    x ^= shifted
    x *= np.uint64(0x94D049BB133111EB)
    np.right_shift(x, np.uint64(31), out=shifted)
    x ^= shifted
    return x


def fold(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 key from whole numbers >= 0, broadcast against each other; at least one-dimensional."""
    return extend(np.zeros(1, np.uint64), *parts)


def extend(key: np.ndarray, *parts: int | np.ndarray) -> np.ndarray:
    """The key of more parts: `extend(fold(a), b)` is `fold(a, b)`."""
    for part in parts:
        key = _mix(key + (np.atleast_1d(np.asarray(part)).astype(np.uint64) + _GOLDEN))
    return key


def bits(keys: np.ndarray, purpose: int, count: int) -> np.ndarray:
    """(B,) keys -> (B, count) independent uint64."""
    return draw(fold(keys), purpose, count)


def draw(folded: np.ndarray, purpose: int, count: int) -> np.ndarray:
    """`bits` of keys that are folded already, for those of which several draws are made: `draw(fold(keys), ...)`."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return _mix(extend(folded, purpose)[:, None] + counters)


def uniform(random_bits: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1)."""
    return (random_bits >> np.uint64(11)) * 2.0**-53


def below(random_bits: np.ndarray, limit: int | np.ndarray) -> np.ndarray:
    """uint64 -> int64 uniform in [0, limit), for limits far below 2**53."""
    return (uniform(random_bits) * limit).astype(np.int64)
