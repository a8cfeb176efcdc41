"""What `raybert bench` times is what a run on this machine would do."""

from functools import partial

import torch

from raybert import bench
from raybert.data.tensors import to_torch
from raybert.tokenizer import GPT2
from raybert.train.alone import alone


def test_a_timed_step_is_packed_where_training_packs(monkeypatch):
    padded = bench.stepper("tiny", 4, 64, vocab_size=300)
    assert padded._worker.feed.lap() == {}, "a CPU packs nothing"
    monkeypatch.setattr(bench, "alone", partial(alone, packing=True))
    # 198 tokens are in a group of 256, whose dummies have ids of the small vocabulary too.
    for samples, length, filled in ((4, 64, 1.0), (3, 66, 198 / 256)):
        packed = bench.stepper("tiny", samples, length, vocab_size=300)
        assert packed._worker.feed.lap() == {"filled": filled, "shapes": 1}
        assert packed() > 0


def test_the_timed_batch_is_full_windows():
    columns = bench.random_columns(2, 40)
    batch = to_torch(columns, torch.device("cpu"))
    assert batch["attention_mask"].all()
    assert batch["masked_labels"].equal(batch["input_ids"].gather(1, batch["masked_positions"]))
    assert batch["token_type_ids"].sum(1).tolist() == [19, 19]
    assert int(batch["input_ids"].max()) < GPT2.cls
    small = bench.vocabulary_of(300)
    assert (small.text_stop, small.cls, small.pad) == (296, 296, 299)
    assert bench.vocabulary_of(GPT2.size) == GPT2
