"""Seconds to embed AG News' 12,500 probe texts with the compact encoder; beside it transformers with the same weights.

The peer pads batches of 64 in file order, as the original process does, under the same autocast. The limit is 30 s.
"""

import torch

from benchmarks.common import DATA, alternate, result, seconds
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.interop import fast_tokenizer, to_transformers
from raybert.probe.embed import embed
from raybert.probe.encoders import RaybertEncoder
from raybert.probe.tasks import load_task
from raybert.probe.texts import load_texts
from raybert.train.step import pick_dtype


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Bert(BertConfig()).eval()
    encoder, theirs = RaybertEncoder(model), to_transformers(model).bert.to(device).eval()
    texts = load_texts(load_task(f"ag_news@{DATA / 'ag_news'}")).texts
    tokenizer, dtype = fast_tokenizer(256), pick_dtype("auto", device)

    def ours() -> float:
        return seconds(lambda: embed(encoder, encoder.tokenize(texts, 256), device=device))

    def peer() -> float:
        def work() -> None:
            with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                for start in range(0, len(texts), 64):
                    part = texts[start : start + 64]
                    batch = tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt")
                    theirs(**batch.to(device)).pooler_output.float().cpu()

        return seconds(work)

    first, second = alternate(ours, peer, rounds=1)
    result("embed", first, second, 30.0, "s (less is better)", texts=len(texts), dtype=str(dtype))


if __name__ == "__main__":
    main()
