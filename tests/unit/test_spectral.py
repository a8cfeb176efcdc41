"""Token vectors from co-occurrence: against their definition written out, and the same however work is divided."""

import weakref
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.data.units import UnitRows
from raybert.errors import InputError
from raybert.spectral import count, factorise, files
from raybert.spectral.recipe import Recipe, check
from raybert.tokenizer import GPT2
from tests.data import make_shards, random_rows

windows = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=20), min_size=1, max_size=6)


def unit_of(tokens: list[list[int]]) -> UnitRows:
    lengths = [len(window) for window in tokens]
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    every = np.arange(len(tokens) + 1)
    return UnitRows(np.concatenate(tokens).astype(np.uint16), offsets, np.array(lengths, np.uint16), every, every[:-1])


def pairs_by_definition(tokens: list[list[int]], vocabulary: int, reach: int) -> np.ndarray:
    found = np.zeros((vocabulary, vocabulary), np.int64)
    for window in tokens:
        for i, row in enumerate(window):
            for j, column in enumerate(window):
                found[row, column] += i != j and abs(i - j) <= reach
    return found


def dense(parts: list[count.Counts], columns: int) -> np.ndarray:
    rows = []
    for part in parts:
        made = np.zeros((len(part), columns), np.int64)
        made[np.repeat(np.arange(len(part)), np.diff(part.starts)), part.columns] = part.values
        rows.append(made)
    return np.concatenate(rows)


def counted(tokens: list[list[int]], *, vocabulary: int, columns: int, reach: int, parts: int, cut: int = 0):
    units = [unit_of(part) for part in (tokens[:cut], tokens[cut:]) if part]
    stream = np.concatenate([count.lay_out([unit], reach, GPT2) for unit in units])
    frequency = count.frequencies(stream, vocabulary)
    chosen = count.pick_columns(frequency, columns)
    shares = count.share_rows(frequency, parts)
    return chosen, [count.count(stream, chosen, first, stop, reach) for first, stop in shares]


@settings(max_examples=60)
@given(
    tokens=windows, reach=st.integers(1, 25), columns=st.integers(1, 40), parts=st.integers(1, 5), cut=st.integers(0, 6)
)
def test_counts_are_those_of_the_definition(tokens, reach, columns, parts, cut):
    chosen, found = counted(tokens, vocabulary=35, columns=columns, reach=reach, parts=parts, cut=cut)
    frequency = np.bincount(np.concatenate(tokens).astype(int), minlength=35)
    by_rank = sorted((token for token in range(35) if frequency[token]), key=lambda token: (-frequency[token], token))
    assert chosen.tolist() == by_rank[:columns]
    assert (dense(found, len(chosen)) == pairs_by_definition(tokens, 35, reach)[:, chosen]).all()
    for part in found:
        for start, stop in pairwise(part.starts):
            assert (np.diff(part.columns[start:stop].astype(int)) > 0).all()


def test_a_frequent_token_is_counted_in_pieces(monkeypatch):
    monkeypatch.setattr(count, "OCCURRENCES", 16)
    tokens = np.random.default_rng(0).zipf(1.5, (30, 20)).clip(max=30).tolist()
    chosen, found = counted(tokens, vocabulary=31, columns=31, reach=4, parts=2)
    assert (dense(found, len(chosen)) == pairs_by_definition(tokens, 31, 4)[:, chosen]).all()


def zipf_counts(parts: int = 1) -> tuple[int, list[count.Counts]]:
    rng = np.random.default_rng(3)
    tokens = [np.minimum(rng.zipf(1.3, 60), 400).tolist() for _ in range(300)]
    chosen, found = counted(tokens, vocabulary=420, columns=150, reach=5, parts=parts)
    return len(chosen), found


def ppmi_by_definition(matrix: np.ndarray) -> np.ndarray:
    total = matrix.sum()
    context = matrix.sum(axis=0) ** 0.75
    context /= context.sum()
    expected = matrix.sum(axis=1, keepdims=True) / total * context
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(matrix / total / expected)
    return np.where(matrix > 0, np.maximum(information, 0), 0)


@pytest.mark.parametrize(
    ("small", "block", "most"),
    [
        (factorise.SMALL, factorise.BLOCK_COLUMNS, factorise.MOST_ROWS),
        (factorise.SMALL, 16, 100),
        (factorise.SMALL, 16, 70),
        (0, 16, 100),
    ],
)
def test_information_and_its_factors_are_those_of_the_definition(monkeypatch, small, block, most):
    monkeypatch.setattr(factorise, "MOST_ROWS", most)
    monkeypatch.setattr(factorise, "SMALL", small)
    monkeypatch.setattr(factorise, "BLOCK_COLUMNS", block)
    monkeypatch.setattr(factorise, "BLOCK_ROWS", 64)
    columns, parts = zipf_counts(3)
    matrix = factorise.Information(parts, columns)
    exact = ppmi_by_definition(dense(parts, columns).astype(np.float64))
    np.testing.assert_allclose(matrix[:], exact, atol=1e-5)
    np.testing.assert_allclose(matrix[13:217], exact[13:217], atol=1e-5)

    found = factorise.principal_vectors(matrix, 20)
    left, values, _ = np.linalg.svd(exact, full_matrices=False)
    assert found.shape == (420, 20)
    basis = found / np.linalg.norm(found, axis=0)
    np.testing.assert_allclose(basis.T @ basis, np.eye(20), atol=1e-4)
    missed = np.linalg.norm(exact - basis @ (basis.T @ exact))
    np.testing.assert_allclose(missed, np.sqrt((values[20:] ** 2).sum()), rtol=1e-5)
    assert abs(basis[:, 0] @ left[:, 0]) > 0.9999
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), values[:20], rtol=1e-4)
    assert (found[np.abs(found).argmax(axis=0), np.arange(20)] > 0).all()


@pytest.mark.parametrize("most", [factorise.MOST_ROWS, 100])
def test_vectors_are_bit_equal_for_any_number_of_parts_and_threads(monkeypatch, most):
    monkeypatch.setattr(factorise, "MOST_ROWS", most)
    monkeypatch.setattr(factorise, "BLOCK_ROWS", 64)
    monkeypatch.setattr(factorise, "BLOCK_COLUMNS", 16)
    columns, alone = zipf_counts(1)
    first = factorise.principal_vectors(factorise.Information(alone, columns), 30, threads=1)
    for parts, threads in ((2, 2), (7, 3)):
        matrix = factorise.Information(zipf_counts(parts)[1], columns)
        again = factorise.principal_vectors(matrix, 30, threads=threads)
        assert again.tobytes() == first.tobytes()


def test_no_more_rows_than_the_most_are_in_memory(monkeypatch):
    monkeypatch.setattr(factorise, "MOST_ROWS", 64)
    columns, parts = zipf_counts(3)
    taken = []

    class Watched(factorise.Information):
        def __getitem__(self, wanted):
            taken.append(weakref.ref(found := super().__getitem__(wanted)))
            assert sum(len(block) for each in taken if (block := each()) is not None) <= 64
            return found

    factorise.principal_vectors(Watched(parts, columns), 20)
    assert len(taken) == 2 * 7 - 1, "of 420 rows every block is made twice, but for the last"


def test_a_matrix_of_few_directions_gives_few_components():
    rng = np.random.default_rng(0)
    matrix = (rng.random((300, 4)) @ rng.random((4, 90))).astype(np.float32)
    found = factorise.principal_vectors(matrix, 30)
    assert found.shape == (300, 4)
    np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(matrix), rtol=1e-4)


@pytest.mark.parametrize("shape", [(300, 90), (40, 90), (1, 5)])
@pytest.mark.parametrize("small", [factorise.SMALL, 0])
def test_rows_and_columns_without_a_pair_and_few_rows(monkeypatch, shape, small):
    monkeypatch.setattr(factorise, "SMALL", small)
    matrix = np.random.default_rng(1).random(shape, np.float32)
    matrix[:, ::4] = 0
    matrix[1::3] = 0
    values = np.linalg.svd(matrix, compute_uv=False)
    found = factorise.principal_vectors(matrix, 10)
    assert found.shape == (shape[0], min(10, int((values > 1e-3).sum())))
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), values[: found.shape[1]], rtol=1e-4)
    assert not found[1::3].any()
    assert factorise.principal_vectors(np.zeros_like(matrix), 10).shape == (shape[0], 0)


def test_a_sample_is_whole_units_of_the_training_split_in_a_seeded_order(tmp_path):
    shards = make_shards(str(tmp_path))
    units = shards.units("train")
    every = Recipe(0).sample(shards)
    assert sorted(every, key=units.index) == units
    assert every != units
    part = Recipe(0, sample_tokens=shards.tokens("train") // 2).sample(shards)
    assert part == every[: len(part)]
    assert 0 < len(part) < len(units)
    assert Recipe(1).sample(shards) != every


def test_the_name_tells_all_that_a_table_depends_on(tmp_path):
    first, second = make_shards(str(tmp_path / "a")), make_shards(str(tmp_path / "b"), rows=200)
    sampled = [Recipe(0, sample_tokens=10), Recipe(1, sample_tokens=10), Recipe(0, sample_tokens=11)]
    recipes = [*sampled, Recipe(0), Recipe(0, reach=8), Recipe(0, columns=9), Recipe(0, components=5)]
    names = {recipe.file_name(shards) for recipe in recipes for shards in (first, second)}
    assert len(names) == 14
    assert Recipe(0).file_name(first) == Recipe(0).file_name(make_shards(str(tmp_path / "c")))


def test_where_all_is_counted_the_seed_is_not_part_of_the_name(tmp_path):
    shards = make_shards(str(tmp_path))
    for tokens in (shards.tokens("train"), shards.tokens("train") - 1):
        first, second = Recipe(0, sample_tokens=tokens), Recipe(1, sample_tokens=tokens)
        every = set(first.sample(shards)) == set(second.sample(shards)) == set(shards.units("train"))
        same_name = first.file_name(shards) == second.file_name(shards)
        assert every or not same_name
        assert same_name == (tokens == shards.tokens("train"))


def test_a_model_reads_its_first_components(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    uri = str(tmp_path / "table.npy")
    assert files.shape(uri) is None
    files.write(uri, vectors)
    assert files.shape(uri) == (12, 50)
    assert (files.read(uri, 7) == vectors[:, :7]).all()
    with pytest.raises(InputError, match=r"at most 12 numbers .* hidden_size is 13.*embedding_init=random"):
        files.read(uri, 13)
    content = (tmp_path / "table.npy").read_bytes()
    for damaged in (content[:-4], content[:50], b"", b"\x93NUMPY\x02\x00" + content[8:]):
        (tmp_path / "table.npy").write_bytes(damaged)
        assert files.shape(uri) is None
        with pytest.raises(InputError, match="missing or damaged"):
            files.read(uri, 7)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "hidden_size", "parts"),
    [
        (300, 50_257, 384, ["at least 100,000 training tokens", "Prepare more text"]),
        (6000, 50_257, 1024, ["at most 768 numbers", "hidden_size is 1024", "lower model.hidden_size"]),
        (6000, 90, 128, ["at most 90 numbers", "hidden_size is 128"]),
    ],
)
def test_too_little_text_or_too_wide_a_model_is_a_sentence(tmp_path, rows, vocabulary, hidden_size, parts):
    shards = make_shards(str(tmp_path), rows=rows // 2, vocabulary=vocabulary)
    with pytest.raises(InputError) as caught:
        check(shards, Recipe(0), hidden_size)
    for part in [*parts, str(tmp_path), "Token vectors (model.embedding_init)", "set model.embedding_init=random"]:
        assert part in str(caught.value)


def test_enough_text_is_enough(tmp_path):
    check(make_shards(str(tmp_path), rows=3000, vocabulary=300), Recipe(0), 256)


def test_laid_out_windows_keep_their_distance():
    unit = random_rows(40, 24, documents=5)
    stream = count.lay_out([unit], 3, GPT2)
    assert (stream[stream != count.GAP] == unit.tokens).all()
    assert len(stream) == len(unit.tokens) + 3 * (len(unit) + 1)
    assert (stream[:3] == count.GAP).all()
    assert (stream[-3:] == count.GAP).all()
