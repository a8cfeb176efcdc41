"""The starts of a model: the original's unchanged to the last bit, and those that replace a part of it."""

import hashlib

import numpy as np
import pytest
import torch

from raybert.config import from_mapping
from raybert.errors import InputError
from raybert.model import layout
from raybert.model.attention import attention
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.initialise import average_attention
from raybert.spectral import files
from raybert.train.start import begin

VOCABULARY, SIZE = 300, 32
# Of the weights that torch's generator gives from seed 0: another one is another start for every run.
DIGEST = "9f3491db4075f155bd6b2489d343a6995b4e7f83c4a5bbd42fac054ec648c53a"


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
    begin(bert, config, "")
    assert digest(bert) == DIGEST


def test_vectors_replace_the_tokens_that_have_one(table):
    uri, vectors = table
    config = model_settings(embedding_init="spectral", initializer_range=0.03)
    before, bert = fresh(config), fresh(config)
    begin(bert, config, uri)
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
    begin(bert, config, "")
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
    begin(again, config, "")
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
        ({"embedding_init": "svd"}, ["model.embedding_init='svd'", "'random' or 'spectral'"]),
        ({"attention_init": "mean"}, ["model.attention_init='mean'", "'normal' or 'average'"]),
        ({"embedding_init": "spectral", "start_from": "/a"}, ["model.start_from", "model.embedding_init=spectral"]),
        ({"attention_init": "average", "start_from": "/a"}, ["model.start_from", "model.attention_init=average"]),
        ({"attention_init": "average", "num_attention_heads": 5}, ["num_attention_heads=5 does not divide"]),
    ],
)
def test_a_wrong_start_is_one_sentence(model, parts):
    with pytest.raises(InputError) as caught:
        model_settings(**model)
    for part in parts:
        assert part in str(caught.value)


def test_the_start_is_no_part_of_the_encoder_s_configuration():
    assert (
        model_settings(embedding_init="spectral", attention_init="average").model.bert()
        == model_settings().model.bert()
    )
