"""Kind finetune: how good is the encoder after it was trained, with a linear head, on the task's own texts?

Three times, from three seeds of the head and of the order of the texts, within a budget of seconds.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from raybert.encode import Text
from raybert.errors import InputError, RunFailed
from raybert.probe import statistics, tables
from raybert.probe.kind import (
    FEWEST,
    Headline,
    Record,
    TrainedKind,
    check_files,
    digest,
    lacks_evidence,
    pack_floats,
    unpack_floats,
)
from raybert.probe.similarity import number
from raybert.probe.texts import LabelledTask, full_text, load_texts, test_texts

SEEDS = (0, 1, 2)
CONSTANT = (
    "seed {seed} predicts the same score for all texts, so its Spearman's correlation is not defined; it counts as 0"
)


class FinetuneTask(LabelledTask):
    """Texts, or pairs of texts, with classes or with scores."""

    kind: Literal["finetune"] = "finetune"
    target: Literal["classes", "scores"] = Field(default="classes", description="what the label column holds")
    pooling: Literal["pooler", "cls", "mean"] = Field(default="pooler", description="vector that the head reads")
    n_train: int | None = Field(default=2000, gt=1, description="training rows to use; null for all")
    max_seconds: float = Field(default=600, gt=0, description="time limit in seconds, a third of it for each seed")
    epochs: int = Field(default=3, ge=1, description="passes over the training rows")
    batch_size: int = Field(default=16, ge=1, description="rows of a step")
    lr: float = Field(default=5e-5, gt=0, description="peak learning rate of AdamW")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="fraction of the steps used for warm-up")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="dropout before the head")

    @model_validator(mode="after")
    def _scores_have_a_test_file(self) -> Self:
        if self.target == "scores" and self.test is None:
            raise ValueError("target=scores needs a test file; texts are held out of train only for classes")
        return self


@dataclass(frozen=True)
class Labelled:
    """The first `n_train` texts are for training. `targets` are class numbers int64, or scores float32."""

    texts: list[Text]
    targets: np.ndarray
    names: list[str]  # of the classes; none for scores
    n_train: int
    task: FinetuneTask
    hash: str

    @property
    def n_test(self) -> int:
        return len(self.texts) - self.n_train


class Finetune(TrainedKind):
    name = "finetune"
    settings = FinetuneTask
    counted = "test texts"
    trainings = len(SEEDS)
    headline: ClassVar[Headline] = Headline(
        key="score",
        title="accuracy or Spearman after fine-tuning",
        short="score",
        share=False,
        others={"spread": "spread over seeds"},
        method="the encoder fine-tuned with a linear head",
    )

    def poolings(self, task: FinetuneTask) -> Sequence[str]:
        return (task.pooling,)

    def check(self, task: Any) -> None:
        check_files(task)
        self.read(task)

    def read(self, task: FinetuneTask) -> Labelled:
        """
        Raises:
            InputError: as `load_texts`; a score is not a number, or all of a file are the same.
        """
        settings = task.model_dump(mode="json", exclude={"name", "title", "train", "test"})
        if task.target == "classes":
            found = load_texts(task)
            return Labelled(
                found.texts, found.labels, found.names, found.n_train, task, digest(self.name, found.hash, settings)
            )
        train, train_y = _scored(task, task.train, task.n_train)
        test, test_y = _scored(task, str(task.test), task.n_test)
        texts, scores = [*train, *test], np.array([*train_y, *test_y], dtype=np.float32)
        return Labelled(texts, scores, [], len(train), task, digest(self.name, texts, scores.tolist(), settings))

    def about(self, data: Labelled) -> Record:
        names = {"labels": data.names} if data.names else {}
        return {**names, "n_train": data.n_train, "n_test": data.n_test}

    def train(self, number: int, encoder: Any, data: Labelled, sequences: Any, device: Any, progress: Any) -> Record:
        """
        Returns:
            outputs: of the head for the test texts, float32 (N, C) as hexadecimal digits; steps that were done, of
            how many planned ones.

        Raises:
            RunFailed: the seed's time limit was reached in the first epoch, or the training diverged.
        """
        import torch

        from raybert.encode.vectors import part
        from raybert.model.precision import pick_dtype
        from raybert.probe.training import Head, Plan, predict, train

        task, seed = data.task, SEEDS[number]
        plan = Plan(task.epochs, task.batch_size, task.lr, task.warmup, task.pooling, task.dropout)
        where = device or torch.device("cpu")
        dtype = pick_dtype("auto", where)
        of_train, of_test = part(sequences, 0, data.n_train), part(sequences, data.n_train, len(data.texts))
        of_epoch, planned, steps = -(-data.n_train // task.batch_size), plan.steps(data.n_train), 0
        own = copy.deepcopy(encoder)
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            torch.manual_seed(seed)
            head = Head(encoder.hidden_size, max(1, len(data.names)), task.dropout)
            options: dict[str, Any] = {"rng": np.random.default_rng(seed), "device": where, "dtype": dtype}
            options["seconds"] = task.max_seconds / len(SEEDS)
            for _ in train(own, head, of_train, data.targets[: data.n_train], plan, **options):
                steps += 1
                if progress is not None:
                    progress(steps / planned)
        if steps < of_epoch:
            raise RunFailed(
                f"The time limit max_seconds={task.max_seconds:g} was reached after {steps} of the {of_epoch} "
                f"steps of the first epoch, at seed {number + 1} of {len(SEEDS)}; raise it, or lower n_train."
            )
        outputs = predict(own, head, of_test, plan, device=where, dtype=dtype)
        if not np.isfinite(outputs).all():
            raise RunFailed(
                f"Fine-tuning with lr={task.lr:g} diverged at seed {number + 1} of {len(SEEDS)}: its predictions "
                "are not finite; lower lr."
            )
        return {"outputs": pack_floats(outputs.ravel()), "steps": steps, "planned": planned}

    def join(self, data: Labelled, trained: Sequence[Record]) -> Record:
        outputs = [unpack_floats(each["outputs"]).reshape(data.n_test, -1) for each in trained]
        entry, evidence = _judge(data, outputs)
        notes = [
            f"seed {seed} stopped after {each['steps']} of {each['planned']} steps, at its time limit"
            for seed, each in zip(SEEDS, trained, strict=True)
            if self.cut_short(each)
        ]
        if not data.names:
            notes += [CONSTANT.format(seed=seed) for seed, out in zip(SEEDS, outputs, strict=True) if not np.ptp(out)]
        return {data.task.pooling: entry | ({"warnings": notes} if notes else {}), "evidence": evidence}

    def cut_short(self, trained: Record) -> bool:
        return bool(trained["steps"] < trained["planned"])

    def baselines(self, data: Labelled) -> Mapping[str, Callable[[], Record]]:
        if not data.names:
            return {}

        def majority() -> Record:
            train, test = data.targets[: data.n_train], data.targets[data.n_train :]
            return {"score": float((test == np.bincount(train).argmax()).mean())}

        return {"majority": majority}

    def difference(self, a: Record, b: Record, pooling: str) -> Record:
        if "scores" not in a["evidence"]:
            return statistics.mean_difference(*(unpack_floats(record["evidence"][pooling]) for record in (a, b)))
        before, now = (_of_seeds(record["evidence"]) for record in (a, b))
        scores = unpack_floats(a["evidence"]["scores"])
        draws = statistics.bootstrap(
            lambda rows: _spearman(now, scores, rows) - _spearman(before, scores, rows), len(scores)
        )
        every = np.arange(len(scores))[None]
        return statistics.difference(
            float(_spearman(before, scores, every)[0]), float(_spearman(now, scores, every)[0]), draws
        )

    def lacks(self, record: Record) -> str:
        return lacks_evidence(record, list(record.get("evidence", {})))

    def summary(self, record: Mapping[str, Any]) -> str:
        what = "accuracy" if record.get("labels") else "Spearman's correlation"
        return (
            f"the encoder fine-tuned on {record.get('n_train', '?')} texts, {what} on {record.get('n_test', '?')}, "
            f"mean of {len(SEEDS)} seeds"
        )

    def held_out(self, task: FinetuneTask) -> Iterable[str]:
        if task.target == "classes":
            yield from test_texts(task)
            return
        for text in _scored(task, str(task.test), None)[0]:
            yield from [text] if isinstance(text, str) else text


def _judge(data: Labelled, outputs: list[np.ndarray]) -> tuple[Record, Record]:
    """A pooling's entry and the evidence, from the outputs of each seed for the test texts."""
    wanted = data.targets[data.n_train :]
    pooling: str = data.task.pooling
    evidence: Record
    if data.names:
        from sklearn.metrics import f1_score

        guesses = [out.argmax(axis=1) for out in outputs]
        right = np.mean([guess == wanted for guess in guesses], axis=0)  # of each text, over seeds
        of_seeds = [float((guess == wanted).mean()) for guess in guesses]
        classes = np.arange(len(data.names))
        f1 = [f1_score(wanted, guess, labels=classes, average="macro", zero_division=0.0) for guess in guesses]
        more = {"test_accuracy": float(np.mean(of_seeds)), "macro_f1": float(np.mean(f1))}
        evidence, interval = {pooling: pack_floats(right)}, statistics.mean_interval(right)
    else:
        scores, guesses = wanted.astype(np.float64), [out[:, 0] for out in outputs]
        every = np.arange(len(scores))[None]
        of_seeds = [float(_spearman([guess], scores, every)[0]) for guess in guesses]
        more = {"spearman": float(np.mean(of_seeds))}
        evidence = {"scores": pack_floats(scores)} | {f"seed{i}": pack_floats(g) for i, g in enumerate(guesses)}
        draws = statistics.bootstrap(lambda rows: _spearman(guesses, scores, rows), len(scores))
        interval = statistics.interval(draws)
    spread = float(np.std(of_seeds, ddof=1))
    entry = {"score": float(np.mean(of_seeds)), "interval": interval, "seeds": of_seeds, "spread": spread}
    return entry | more, evidence


def _of_seeds(evidence: Mapping[str, str]) -> list[np.ndarray]:
    return [unpack_floats(digits) for name, digits in evidence.items() if name.startswith("seed")]


def _spearman(guesses: list[np.ndarray], scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The mean over seeds of Spearman's correlation in each sample of rows (K, N): (K,)."""
    found: np.ndarray = np.mean([statistics.spearman_of_samples(guess, scores, rows) for guess in guesses], axis=0)
    return found


def _scored(task: FinetuneTask, uri: str, size: int | None) -> tuple[list[Text], list[float]]:
    """Texts with their scores: the first rows, or random ones where the task has a seed.

    Raises:
        InputError: a text is empty, a score is not a number, all are the same, or there are too few.
    """
    texts: list[Text] = []
    scores = []
    for row in tables.rows(uri, [*task.columns, task.label]):
        parts = [full_text(row.values[i], row, column) for i, column in enumerate(task.columns)]
        texts.append(parts[0] if len(parts) == 1 else (parts[0], parts[1]))
        scores.append(number(row.values[-1], row, task.label))
        if task.seed is None and len(texts) == size:
            break
    if len(texts) < FEWEST:
        raise InputError(f"The probe task {task.name} has {len(texts)} texts in {uri}; it needs at least {FEWEST}.")
    if np.ptp(scores) == 0:
        raise InputError(
            f"All {len(scores)} texts in {uri} of the probe task {task.name} have the score {scores[0]:g}."
        )
    if task.seed is not None:
        order = np.random.default_rng(task.seed).permutation(len(texts))[:size]
        texts, scores = [texts[i] for i in order], [scores[i] for i in order]
    return texts, scores
