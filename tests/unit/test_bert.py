"""The encoder against transformers' BertForPreTraining: outputs and gradients, over random shapes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.interop import from_transformers, to_their_names, to_transformers
from raybert.model.losses import Pretraining, tied_cross_entropy

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@st.composite
def configs(draw):
    heads = draw(st.integers(1, 4))
    return BertConfig(
        vocab_size=draw(st.integers(65, 200)),
        hidden_size=heads * draw(st.sampled_from([4, 8, 16])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.sampled_from([None, 24])),
        max_position_embeddings=draw(st.integers(12, 40)),
        dropout=0.1,
        initializer_range=0.1,
    )


def inputs(config, batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    types = (torch.arange(length) >= torch.randint(1, length, (batch, 1), generator=generator)).long()
    mask = torch.arange(length) < torch.randint(2, length + 1, (batch, 1), generator=generator)
    return ids, types, mask


@settings(max_examples=15)
@given(config=configs(), batch=st.integers(1, 4), length=st.integers(3, 12), seed=st.integers(0, 2**31))
def test_outputs_and_gradients_equal_transformers(config, batch, length, seed):
    torch.manual_seed(seed)
    ours = Bert(config).eval()
    theirs = to_transformers(ours).eval()
    ids, types, mask = inputs(config, batch, length, seed)
    labels = torch.where(torch.rand(batch, length) < 0.3, ids, torch.tensor(-100))
    labels[0, 0] = ids[0, 0]
    next_sentence = torch.randint(0, 2, (batch,))

    out = ours(ids, types, mask)
    reference = theirs(
        input_ids=ids,
        token_type_ids=types,
        attention_mask=mask.long(),
        labels=labels,
        next_sentence_label=next_sentence,
        output_hidden_states=True,
    )
    torch.testing.assert_close(out["mlm_logits"][mask], reference.prediction_logits[mask], **TOLERANCE)
    torch.testing.assert_close(out["nsp_logits"], reference.seq_relationship_logits, **TOLERANCE)
    torch.testing.assert_close(out["last_hidden_state"][mask], reference.hidden_states[-1][mask], **TOLERANCE)
    torch.testing.assert_close(out["pooler_output"], theirs.bert(ids, mask.long(), types).pooler_output, **TOLERANCE)

    loss = F.cross_entropy(out["mlm_logits"].transpose(1, 2), labels) + F.cross_entropy(
        out["nsp_logits"], next_sentence
    )
    torch.testing.assert_close(loss, reference.loss, **TOLERANCE)
    loss.backward()
    reference.loss.backward()
    gradients = to_their_names({name: p.grad for name, p in ours.named_parameters()}, config)
    for name, parameter in theirs.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name, **TOLERANCE)


def test_there_and_back_changes_nothing():
    model = Bert(BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    again = from_transformers(to_transformers(model))
    assert again.config.hidden_size == 16
    for name, value in model.state_dict().items():
        assert torch.equal(value[:100], again.state_dict()[name][:100]), name


def test_padding_changes_nothing():
    config = BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = Bert(config).eval()
    ids = torch.randint(0, 100, (2, 9))
    padded = F.pad(ids, (0, 5), value=7)
    mask = torch.arange(14).expand(2, -1) < 9
    alone, among = model(ids), model(padded, attention_mask=mask)
    torch.testing.assert_close(alone["pooler_output"], among["pooler_output"], **TOLERANCE)
    torch.testing.assert_close(alone["mlm_logits"], among["mlm_logits"][:, :9], **TOLERANCE)


@settings(max_examples=10)
@given(rows=st.integers(1, 300), width=st.integers(2, 20), classes=st.integers(2, 80), seed=st.integers(0, 1000))
def test_the_fused_cross_entropy_is_the_plain_one(rows, width, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    features, weight, bias = (
        torch.randn(shape, generator=generator, requires_grad=True)
        for shape in ((rows, width), (classes, width), (classes,))
    )
    labels = torch.randint(0, classes, (rows,), generator=generator)
    loss, right = tied_cross_entropy(features, weight, bias, labels)
    logits = features @ weight.t() + bias
    plain = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-4)
    assert right == (logits.argmax(-1) == labels).sum()
    ours = torch.autograd.grad(loss, (features, weight, bias))
    theirs = torch.autograd.grad(plain, (features, weight, bias))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_head_on_masked_positions_is_the_full_head_there():
    config = BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, dropout=0.0)
    model = Bert(config)
    ids = torch.randint(0, 100, (2, 8))
    positions = torch.tensor([[1, 4, -1], [2, -1, -1]])
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    full = model(ids)["mlm_logits"]
    picked = model(ids, masked_positions=positions)["mlm_logits"]
    torch.testing.assert_close(picked[:, :100], torch.stack([full[0, 1], full[0, 4], full[1, 2]]), **TOLERANCE)
    ones = torch.ones(2, 8, dtype=torch.bool)
    sums = Pretraining(model)(ids, torch.zeros_like(ids), ones, positions, labels, torch.tensor([0, 1]))
    expected = F.cross_entropy(picked[:, :100], torch.tensor([5, 6, 7]), reduction="sum")
    torch.testing.assert_close(sums[0], expected, rtol=1e-5, atol=1e-4)
    assert sums[1] == 3
    assert sums[4] == 2


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        BertConfig(hidden_size=10, num_attention_heads=3)
