"""The starts of a model: the original's unchanged to the last bit, and those that replace a part of it."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks.on_gpu import learn
from raybert.config import from_mapping
from raybert.data.shards import read_unit
from raybert.errors import InputError
from raybert.model import layout
from raybert.model.attention import attention
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.initialise import CENTRED_GAIN, WHITENED_GAIN, average_attention, freeze_last_norm
from raybert.spectral import files
from raybert.spectral.whiten import whiten
from raybert.train import start
from raybert.train.start import begin
from tests.data import make_shards

RECORD = Path(__file__).parents[2] / "jobs" / "record.yaml"
VOCABULARY, SIZE = 300, 32
# Of the weights that torch's generator gives from seed 0: another one is another start for every run.
DIGEST = "9f3491db4075f155bd6b2489d343a6995b4e7f83c4a5bbd42fac054ec648c53a"

# Of a start that does not ask how frequent tokens are.
NO_SHARDS = None


def model_settings(**model):
    dimensions = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return from_mapping({"model": dimensions | model})


def fresh(config, seed=0):
    torch.manual_seed(seed)
    return Bert(config.model.bert())


def digest(bert):
    whole = hashlib.sha256()
    for name, value in bert.state_dict().items():
        whole.update(name.encode())
        whole.update(value.numpy().tobytes())
    return whole.hexdigest()


def changed(before, after):
    return {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}


@pytest.fixture
def table(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((VOCABULARY, 48)).astype(np.float32) * 40
    vectors[::7] = 0  # never seen
    files.write(str(tmp_path / "table.npy"), vectors)
    return str(tmp_path / "table.npy"), vectors


def test_the_default_start_is_what_it_always_was():
    config = model_settings(embedding_init="random", attention_init="normal")
    bert = fresh(config)
    assert digest(bert) == DIGEST
    begin(bert, config, NO_SHARDS, "")
    assert digest(bert) == DIGEST


def test_vectors_replace_the_tokens_that_have_one(table):
    uri, vectors = table
    config = model_settings(embedding_init="spectral", initializer_range=0.03)
    before, bert = fresh(config), fresh(config)
    begin(bert, config, NO_SHARDS, uri)
    assert changed(before, bert) == {"word_embeddings.weight"}
    weight, drawn = bert.word_embeddings.weight.detach(), before.word_embeddings.weight.detach()
    seen = np.flatnonzero(vectors.any(axis=1))
    others = np.setdiff1d(np.arange(len(weight)), seen)
    assert torch.equal(weight[others], drawn[others]), "unseen tokens, specials and spare rows stay random"
    assert float(weight[seen].std()) == pytest.approx(0.03, rel=1e-4)
    ratio = weight[seen].numpy() / vectors[seen, :SIZE]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)


def test_an_averaging_start_changes_values_outputs_pooler_and_positions(table):
    config = model_settings(attention_init="average")
    before, bert = fresh(config), fresh(config)
    begin(bert, config, NO_SHARDS, "")
    layers = {f"layers.{i}.{name}.weight" for i in range(2) for name in ("qkv", "attention_out")}
    assert changed(before, bert) == layers | {"pooler.weight", "position_embeddings.weight"}
    for old, new in zip(before.layers, bert.layers, strict=True):
        assert torch.equal(old.qkv.weight[: 2 * SIZE], new.qkv.weight[: 2 * SIZE]), "queries and keys"
        product = new.attention_out.weight @ new.qkv.weight[2 * SIZE :]
        torch.testing.assert_close(product, torch.eye(SIZE), rtol=0, atol=1e-6)
    torch.testing.assert_close(bert.pooler.weight @ bert.pooler.weight.t(), torch.eye(SIZE), rtol=0, atol=1e-6)
    assert not torch.equal(bert.layers[0].attention_out.weight, bert.layers[1].attention_out.weight)
    assert float(bert.position_embeddings.weight.detach().std()) == pytest.approx(0.005, rel=0.1)
    again = fresh(config)
    begin(again, config, NO_SHARDS, "")
    assert digest(again) == digest(bert)
    average_attention(again, seed=1)
    assert digest(again) != digest(bert)


@torch.no_grad()
def test_attention_that_averages_gives_each_token_the_mean():
    torch.manual_seed(0)
    bert = Bert(model_settings(num_attention_heads=4, hidden_size=SIZE).model.bert()).eval()
    average_attention(bert, seed=0)
    hidden = torch.nn.functional.layer_norm(torch.randn(2 * 20, SIZE), (SIZE,))
    layer = bert.layers[0]
    added = layer.attention_out(attention(layer.qkv(hidden), 4, layout.padded(2, 20, None, None), 0.0))
    mean = hidden.view(2, 20, SIZE).mean(dim=1, keepdim=True).expand(-1, 20, -1).reshape(-1, SIZE)
    assert (added - mean).norm() < 0.1 * mean.norm()
    # With no difference between scores at all it is the mean itself.
    layer.qkv.weight[: 2 * SIZE] = 0
    added = layer.attention_out(attention(layer.qkv(hidden), 4, layout.padded(2, 20, None, None), 0.0))
    torch.testing.assert_close(added, mean, rtol=0, atol=1e-5)


def test_threads_leave_no_trace_in_an_orthogonal_start():
    config = BertConfig(vocab_size=100, num_hidden_layers=1)
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            bert = Bert(config)
            average_attention(bert, seed=0)
            found.add(digest(bert))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"embedding_init": "svd"}, ["model.embedding_init='svd'", "'random', 'spectral' or 'whitened'"]),
        ({"ffn_init": "none"}, ["model.ffn_init='none'", "'normal' or 'zero'"]),
        ({"ffn_init": "zero", "start_from": "/a"}, ["model.start_from", "model.ffn_init=zero"]),
        ({"attention_init": "mean"}, ["model.attention_init='mean'", "'normal' or 'average'"]),
        ({"embedding_init": "spectral", "start_from": "/a"}, ["model.start_from", "model.embedding_init=spectral"]),
        ({"attention_init": "average", "start_from": "/a"}, ["model.start_from", "model.attention_init=average"]),
        ({"output_init": "center"}, ["model.output_init='center'", "'normal' or 'centred'"]),
        ({"mlm_init": "unigrams"}, ["model.mlm_init='unigrams'", "'normal' or 'unigram'"]),
        ({"output_init": "centred", "start_from": "/a"}, ["model.start_from", "model.output_init=centred"]),
        ({"mlm_init": "unigram", "start_from": "/a"}, ["model.start_from", "model.mlm_init=unigram"]),
        ({"attention_init": "average", "num_attention_heads": 5}, ["num_attention_heads=5 does not divide"]),
    ],
)
def test_a_wrong_start_is_one_sentence(model, parts):
    with pytest.raises(InputError) as caught:
        model_settings(**model)
    for part in parts:
        assert part in str(caught.value)


def test_the_start_is_no_part_of_the_encoder_s_configuration():
    inits = {"embedding_init": "spectral", "attention_init": "average", "ffn_init": "zero", "output_init": "centred"}
    assert model_settings(**inits, mlm_init="unigram").model.bert() == model_settings().model.bert()
    assert model_settings(mlm_init="unigram").model.begins_random, "the encoder is as any other"
    for name, value in [*inits.items(), ("embedding_init", "whitened")]:
        assert not model_settings(**{name: value}).model.begins_random


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")), vocabulary=200, rows=600)


def frequencies(shards):
    counts = np.zeros(shards.vocabulary.size, np.int64)
    for unit in shards.units("train"):
        counts += np.bincount(read_unit(shards.uri, unit, shards.vocabulary).tokens, minlength=len(counts))
    return counts


@torch.no_grad()
def test_centred_embeddings_have_no_mean_over_the_text_and_the_output_layer_undoes_the_gain(shards):
    config = model_settings(output_init="centred")
    before, bert = fresh(config), fresh(config)
    begin(bert, config, shards, "")
    assert changed(before, bert) == {"embedding_norm.bias", "layers.1.ffn_norm.weight", "mlm_transform.weight"}
    counts = frequencies(shards)
    seen = torch.from_numpy(np.flatnonzero(counts))
    of = torch.from_numpy(counts)[seen] / counts.sum()
    # Positions are left out of the mean, so they are here.
    first = bert.word_embeddings.weight[seen] + bert.token_type_embeddings.weight[0]
    mean = of.float() @ bert.embedding_norm(first)
    assert mean.norm() < 1e-4
    assert (of.float() @ before.embedding_norm(first)).norm() > 0.1
    hidden = torch.randn(5, SIZE)
    ours, theirs = bert.mlm_features(CENTRED_GAIN * hidden), before.mlm_features(hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_feed_forward_layers_at_zero_add_nothing_and_learn_at_once():
    config = model_settings(ffn_init="zero")
    before, bert = fresh(config), fresh(config)
    begin(bert, config, NO_SHARDS, "")
    assert changed(before, bert) == {f"layers.{i}.ffn_out.weight" for i in range(2)}
    hidden = torch.randn(6, SIZE)
    layer, places = bert.layers[0].eval(), layout.padded(1, 6, None, None)
    attended = layer.attention_norm(hidden + layer.attention_out(attention(layer.qkv(hidden), 4, places, 0.0)))
    torch.testing.assert_close(layer(hidden, places), layer.ffn_norm(attended))
    layer(hidden, places)[:, 0].sum().backward()
    assert layer.ffn_out.weight.grad.abs().sum() > 0


def test_a_frozen_norm_gets_no_gradient_and_every_other_weight_does():
    bert = fresh(model_settings())
    freeze_last_norm(bert)
    bert(torch.arange(8).reshape(1, 8))["mlm_logits"].sum().backward()
    held = {name for name, value in bert.named_parameters() if value.grad is None}
    assert held == {"layers.1.ffn_norm.weight", "pooler.weight", "pooler.bias", "nsp_head.weight", "nsp_head.bias"}


@pytest.fixture
def whitened(shards, tmp_path):
    """A table for these shards, and the settings of a run that begins with it whitened."""
    uri = str(tmp_path / "table.npy")
    vectors = np.random.default_rng(0).standard_normal((shards.vocabulary.size, SIZE)).astype(np.float32)
    vectors[frequencies(shards) == 0] = 0
    files.write(uri, vectors)
    inits = {key: value for key, value in yaml.safe_load(RECORD.read_text())["model"].items() if key.endswith("_init")}
    units = [read_unit(shards.uri, unit, shards.vocabulary) for unit in shards.units("train")]
    return uri, inits, whiten(vectors, units)


@torch.no_grad()
def test_whitened_vectors_keep_their_lengths_and_segments_are_alike(shards, whitened):
    uri, inits, vectors = whitened
    config = model_settings(**inits)
    bert = fresh(config)
    begin(bert, config, shards, uri)
    seen = np.flatnonzero(vectors.any(axis=1))
    rows = vectors[seen] * (config.model.bert().initializer_range / vectors[seen].std())
    np.testing.assert_allclose(bert.word_embeddings.weight[seen], rows, rtol=1e-4, atol=1e-6)
    assert torch.equal(bert.layers[-1].ffn_norm.weight, torch.full((SIZE,), WHITENED_GAIN))
    # Through the embeddings' layer norm a vector is its own direction and length, in either segment.
    means = []
    for types in bert.token_type_embeddings.weight:
        through = bert.embedding_norm(bert.word_embeddings.weight[seen] + types).numpy()
        means.append(through.mean(axis=0))
        assert np.corrcoef(np.linalg.norm(rows, axis=1), np.linalg.norm(through, axis=1))[0, 1] > 0.8
    own = np.linalg.norm(through - means[-1], axis=1).mean()
    assert np.linalg.norm(means[0] - means[1]) < 0.5 * own


@torch.no_grad()
def test_the_gpu_benchmark_begins_with_the_same_weights(shards, whitened):
    uri, inits, vectors = whitened
    config = model_settings(**inits)
    run, benchmark = fresh(config), fresh(config)
    begin(run, config, shards, uri)
    learn.start(benchmark, vectors, frequencies(shards))
    assert not changed(run, benchmark)


@torch.no_grad()
@pytest.mark.parametrize("output", ["normal", "centred"])
def test_an_output_layer_that_knows_frequencies_expects_each_token_as_often_as_it_occurs(shards, output):
    config = model_settings(mlm_init="unigram", output_init=output)
    bert = fresh(config)
    begin(bert, config, shards, "")
    counts = frequencies(shards)
    share = torch.softmax(bert.mlm_bias, 0).numpy()
    np.testing.assert_allclose(share, (counts + 0.5) / (counts + 0.5).sum(), rtol=1e-4)
    # A hidden state of the last layer norm's own scale comes through as its GELU, whatever that scale is.
    hidden = torch.randn(5, SIZE)
    scaled = hidden * bert.layers[-1].ffn_norm.weight
    expected = bert.mlm_norm(torch.nn.functional.gelu(hidden))
    torch.testing.assert_close(bert.mlm_features(scaled), expected, rtol=1e-4, atol=1e-4)


def test_frequencies_are_counted_in_a_bounded_part_of_the_training_split(shards, monkeypatch):
    monkeypatch.setattr(start, "COUNTED_TOKENS", 3000)
    read = []
    monkeypatch.setattr(start, "read_unit", lambda *given: read.append(given[1]) or read_unit(*given))
    config = model_settings(mlm_init="unigram")
    digests = []
    for _ in range(2):
        bert = fresh(config)
        begin(bert, config, shards, "")
        digests.append(digest(bert))
    assert digests[0] == digests[1]
    assert 0 < len(read) // 2 < len(shards.units("train"))
    assert all(unit.shard.startswith("train-") for unit in read)
