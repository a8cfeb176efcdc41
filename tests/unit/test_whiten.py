"""Whitened token vectors: halves of a text differ as much in one direction as in another."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from raybert.data.units import UnitRows
from raybert.spectral.whiten import whiten

TOKENS, SIZE = 60, 6


def units(seed, windows, parts=1):
    """Windows of 1 to 12 tokens, each about a topic of its own: tokens near a random place."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(parts):
        lengths = rng.integers(1, 13, windows // parts)
        about = np.repeat(rng.integers(0, TOKENS - 1, len(lengths)), lengths)
        tokens = ((about + rng.integers(0, 9, len(about))) % (TOKENS - 1)).astype(np.uint16)  # the last one never
        none = np.zeros(0, np.int64)
        found.append(UnitRows(tokens, np.append(0, np.cumsum(lengths)), none, none, np.arange(len(lengths))))
    return found


def vectors(seed):
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((TOKENS, SIZE)) * np.logspace(0, -1, SIZE) @ rng.standard_normal((SIZE, SIZE))
    drawn[TOKENS - 1] = 0
    return drawn.astype(np.float32)


def differences(table, rows):
    """By another way: window by window."""
    found = []
    for unit in rows:
        for low, high in zip(unit.token_offsets[:-1], unit.token_offsets[1:], strict=True):
            middle = low + (high - low) // 2
            if middle > low:
                first, second = table[unit.tokens[low:middle]], table[unit.tokens[middle:high]]
                found.append(first.mean(axis=0, dtype=float) - second.mean(axis=0, dtype=float))
    return np.array(found)


def test_halves_differ_as_much_in_each_direction_and_the_text_has_no_mean():
    rows, before = units(0, 20_000), vectors(1)
    after = whiten(before, rows)
    assert (after.dtype, after.shape) == (np.float32, before.shape)
    moved = differences(after, rows)
    np.testing.assert_allclose(moved.T @ moved / len(moved), np.eye(SIZE), atol=0.1)
    plain = differences(before, rows)
    spread = np.linalg.eigvalsh(plain.T @ plain)
    assert spread[-1] > 20 * spread[0], "which they did not before"
    tokens = np.concatenate([unit.tokens for unit in rows])
    np.testing.assert_allclose(after[tokens].mean(axis=0, dtype=float), 0, atol=1e-3)
    assert not after[TOKENS - 1].any(), "a token without a vector has none"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 400), st.floats(0.01, 100))
def test_another_basis_and_scale_give_the_same_vectors_in_that_basis(seed, windows, scale):
    rows, before = units(seed, windows), vectors(seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((SIZE, SIZE)))[0].astype(np.float32)
    turned = whiten(scale * before @ rotation, rows)
    np.testing.assert_allclose(turned, whiten(before, rows) @ rotation, rtol=1e-3, atol=1e-3 * np.abs(turned).max())


def test_how_the_windows_are_cut_into_units_changes_nothing():
    whole = units(3, 600)
    lengths = np.diff(whole[0].token_offsets)
    cut = int(whole[0].token_offsets[250])
    none = np.zeros(0, np.int64)
    parts = [
        UnitRows(whole[0].tokens[:cut], np.append(0, np.cumsum(lengths[:250])), none, none, np.arange(250)),
        UnitRows(whole[0].tokens[cut:], np.append(0, np.cumsum(lengths[250:])), none, none, np.arange(350)),
    ]
    np.testing.assert_array_equal(whiten(vectors(3), parts), whiten(vectors(3), whole))


@pytest.mark.parametrize("windows", [3, SIZE, 40])
def test_few_windows_still_give_finite_vectors(windows):
    after = whiten(vectors(4), units(5, windows))
    assert np.isfinite(after).all()
    assert after.any()


def test_threads_change_nothing_that_shows():
    rows = units(6, 3000)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, "blas"):
            found.append(whiten(vectors(6), rows))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-7)
