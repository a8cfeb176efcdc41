"""The probe without scikit-learn: vectors of AG News' texts, and logistic regression as scikit-learn defines it."""

import time
from typing import Any

import numpy as np
import torch

from benchmarks.on_gpu.carried import Carried
from benchmarks.on_gpu.parts import Order
from raybert.encode.encoders import RaybertEncoder, Sequences, tokenize
from raybert.encode.vectors import embed
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.sizes import SIZES
from raybert.probe.statistics import wilson
from raybert.tokenizer import TextTokenizer

MAX_TOKENS = 256  # of a text, as the task ag_news has it
MOST_STEPS, TOLERANCE = 50, 1e-7  # of Newton's method, and the largest entry of its gradient


def run(order: Order) -> None:
    """Seconds for all texts with an untrained compact encoder, on a CPU a tiny one: to ids, to vectors, three fits."""
    carried = order.load()
    torch.manual_seed(0)
    size = "compact" if order.on_gpu else "tiny"
    bert = Bert(BertConfig(**SIZES[size])).to(order.device)
    start = time.perf_counter()
    prober = Prober(carried, order)
    tokenized = time.perf_counter() - start
    order.tell(texts=len(carried.texts), tokenizing_s=tokenized)  # each as it comes, since time may end the part
    prober.vectors(bert, few=True)  # the first products set libraries up
    start = time.perf_counter()
    vectors = prober.vectors(bert)
    embedded = time.perf_counter() - start
    order.tell(size=size, embedding_s=embedded)
    start = time.perf_counter()
    scores = prober.judge(vectors)
    fitted = time.perf_counter() - start
    order.tell(
        size=size,
        texts=len(carried.texts),
        seconds=tokenized + embedded + fitted,
        tokenizing_s=tokenized,
        embedding_s=embedded,
        fitting_s=fitted,
        untrained=scores,
    )


class Prober:
    """Texts of a carried file, tokenised once, and judged for any encoder with this tokenizer: raybert's own or one of
    words."""

    def __init__(self, carried: Carried, order: Order, tokenizer: TextTokenizer | None = None) -> None:
        self._carried, self._order = carried, order
        # Where the vocabulary of raybert's own is not installed it is from now on.
        self._tokenizer = tokenizer or carried.tokenizer
        self._sequences: Sequences | None = None
        self._longest = 0
        self._tokenize(MAX_TOKENS)
        counts = np.bincount(carried.labels[: carried.n_train])
        test = carried.labels[carried.n_train :]
        self.majority = float((test == counts.argmax()).mean())

    def _tokenize(self, longest: int) -> Sequences:
        if self._sequences is None or longest != self._longest:
            self._sequences, self._longest = tokenize(self._carried.texts, longest, self._tokenizer), longest
        return self._sequences

    def vectors(self, bert: Bert, *, few: bool = False) -> dict[str, np.ndarray]:
        """float32 (N, D) by pooling. The model is left in training."""
        encoder = RaybertEncoder(bert)
        sequences = self._tokenize(min(MAX_TOKENS, bert.config.max_position_embeddings))
        if few:
            sequences = tokenize(self._carried.texts[:100], self._longest, self._tokenizer)
        found = embed(encoder, sequences, device=self._order.device)
        bert.train()
        return found

    def judge(self, vectors: dict[str, np.ndarray]) -> dict[str, Any]:
        """Accuracies by pooling, C = 1, with the 95 % interval of the test texts."""
        n, labels = self._carried.n_train, self._carried.labels
        found = {}
        for pooling, values in vectors.items():
            weights, bias = fit(values[:n], labels[:n], self._order.device)
            right = (values @ weights + bias).argmax(1) == labels
            test = right[n:]
            found[pooling] = {
                "train_accuracy": float(right[:n].mean()),
                "test_accuracy": float(test.mean()),
                "interval": list(wilson(int(test.sum()), len(test))),
            }
        return found | {"majority": self.majority}

    def probe(self, bert: Bert) -> dict[str, Any]:
        return self.judge(self.vectors(bert))


def fit(x: np.ndarray, y: np.ndarray, device: torch.device, c: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, K) and bias (K,) that minimise 0.5 |W|^2 + C sum of cross entropies: scikit-learn's objective.

    Newton's method in float64, with half steps where a whole one would not descend. The optimum is one point, whoever
    finds it; L-BFGS takes hundreds of steps to vectors of an untrained pooler, which hardly differ.
    """
    features = torch.from_numpy(x).to(device, torch.float64)
    features = torch.cat([features, features.new_ones(len(x), 1)], 1)  # (n, D + 1)
    wanted = torch.nn.functional.one_hot(torch.from_numpy(y).to(device)).double()  # (n, K)
    n, size, classes = len(x), features.shape[1], wanted.shape[1]
    penalty = features.new_full((size, 1), 1 / (c * n))
    penalty[-1] = 0
    found = features.new_zeros(size, classes)

    def loss_of(weights: torch.Tensor) -> float:
        likelihood = (torch.log_softmax(features @ weights, 1) * wanted).sum() / n
        return float(0.5 * (penalty * weights.square()).sum() - likelihood)

    loss = loss_of(found)
    for _ in range(MOST_STEPS):
        p = torch.softmax(features @ found, 1)
        gradient = features.t() @ (p - wanted) / n + penalty * found
        if float(gradient.abs().max()) < TOLERANCE:
            break
        curvature = features.new_zeros(classes, size, classes, size)
        for k in range(classes):
            for other in range(classes):
                weight = p[:, k] * (float(k == other) - p[:, other]) / n
                curvature[k, :, other] = features.t() @ (features * weight[:, None])
            curvature[k, :, k].diagonal().add_(penalty[:, 0] + 1e-10)  # a shift of all biases changes nothing
        step = torch.linalg.solve(curvature.view(classes * size, -1), gradient.t().reshape(-1)).view(classes, size).t()
        part = 1.0
        while part > 1e-3 and loss_of(found - part * step) > loss:
            part /= 2
        found = found - part * step
        loss = loss_of(found)
    return found[:-1].float().cpu().numpy(), found[-1].float().cpu().numpy()
