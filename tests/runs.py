"""A run directory made for a test: what raybert writes while it trains, without any training."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from raybert.config import from_mapping

LABELS = ["business", "entertainment", "politics", "sport", "tech"]


def make_run(
    directory: Path,
    *,
    name: str = "bbc-tiny",
    steps: int = 2000,
    done: int | None = None,
    log_every: int = 10,
    validation_every: int = 200,
    probe_every: int = 200,
    restart_at: int = 0,
    tasks: tuple[str, ...] = ("bbc_news",),
    seed: int = 0,
) -> str:
    """Write a run that has come to step `done` of `steps`; with `restart_at` it fell back 70 steps there."""
    done = steps if done is None else done
    run = directory / name
    run.mkdir(parents=True)
    config = from_mapping(
        {
            "run": {"name": name, "storage": str(directory)},
            "model": {"size": "tiny"},
            "train": {"steps": steps, "global_batch": 32, "micro_batch": 16, "workers": 2},
            "every": {"log": log_every, "validation": validation_every, "probe": probe_every},
            "probe": {"tasks": list(tasks)},
        }
    )
    about = {
        "about": {
            "versions": {"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0"},
            "manifest": "5f" * 32,
            "seq_len": 128,
        }
    }
    (run / "config.yaml").write_text(config.to_yaml() + yaml.safe_dump(about))
    rng = random.Random(seed)
    lines = [{"step": 0, "validation": losses(0, steps, rng, 0.0)}] if validation_every else []
    for step in range(log_every, done + 1, log_every):
        lines.append(record(step, steps, rng))
        if validation_every and step % validation_every == 0:
            lines[-1]["validation"] = losses(step, steps, rng, 0.01)
        if step == restart_at:
            lines += [record(again, steps, rng) for again in range(step - 70, step + 1, log_every)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for task in tasks:
        for step in range(probe_every, done + 1, probe_every) if probe_every else ():
            write_probe(run, probe(task, step, steps))
    return str(run)


def losses(step: int, steps: int, rng: random.Random, noise: float) -> dict[str, float]:
    progress = step / steps
    mlm = 6.9 + 3.9 * math.exp(-7 * progress) + rng.gauss(0, noise)
    nsp = 0.45 + 0.245 * math.exp(-3 * progress) + rng.gauss(0, noise / 2)
    return {
        "loss": mlm + nsp,
        "mlm_loss": mlm,
        "nsp_loss": nsp,
        "mlm_accuracy": max(0.0, 0.14 * (1 - math.exp(-6 * progress)) + rng.gauss(0, noise / 12)),
        "nsp_accuracy": min(1.0, 0.5 + 0.3 * (1 - math.exp(-3 * progress)) + rng.gauss(0, noise / 5)),
    }


def record(step: int, steps: int, rng: random.Random) -> dict[str, Any]:
    rate = 21_000 + rng.gauss(0, 700) - (6_000 if step % 400 == 0 else 0)
    return {
        "step": step,
        **losses(step, steps, rng, 0.12),
        "lr": 4e-3 * min(step / (0.1 * steps), (steps - step) / (0.9 * steps)),
        "grad_norm": 0.8 + abs(rng.gauss(0, 0.2)) + 4 * math.exp(-20 * step / steps),
        "tokens_per_second": rate,
        "mfu": rate / 21_000 * 0.31,
        "samples": step * 32,
        "epoch": step * 32 / 9000,
        "elapsed_seconds": step * 0.1,
        "eta_seconds": (steps - step) * 0.1,
        "workers": 2,
        "wait_data": 0.006 + abs(rng.gauss(0, 0.002)),
        "wait_checkpoint": 0.02 if step % 500 == 0 else 0.0,
        "wait_report": 0.015 if step % 200 == 0 else 0.0,
        "wait_validation": 0.08 if step % 200 == 0 else 0.0,
    }


def probe(task: str, step: int, steps: int) -> dict[str, Any]:
    """A result as the probe service writes it."""
    progress = min(1.0, step / steps)
    test = {"pooler": 0.22 + 0.35 * progress, "cls": 0.30 + 0.30 * progress, "mean": 0.68 + 0.06 * progress}
    return {
        "step": step,
        "task": task,
        "status": "done",
        **{pooling: score(accuracy) for pooling, accuracy in test.items()},
        "baselines": {
            "majority": score(0.231),
            "untrained": {"pooler": score(0.222), "cls": score(0.305), "mean": score(0.684)},
            "tfidf": score(0.962),
        },
        "labels": LABELS,
        "seconds": 3.2,
        "n_train": 1700,
        "n_test": 425,
    }


def tuned(result: dict[str, Any]) -> dict[str, Any]:
    """The result as a version writes it that tunes C and measures the spread: two points more at C = 0.1."""

    def better(entry: dict[str, Any]) -> dict[str, Any]:
        more = entry["test_accuracy"] + 0.02
        return {**entry, "tuned_accuracy": more, "tuned_c": 0.1, "tuned_interval": [more - 0.04, more + 0.04]}

    spread = {"deviation": 0.08, "effective_rank": 42.0}
    baselines = result["baselines"]
    return {
        **result,
        **{pooling: better(result[pooling]) | spread for pooling in baselines["untrained"]},
        "tuning": "C chosen from 0.001 to 100 on 340 held-out training texts",
        "baselines": baselines
        | {
            "tfidf": better(baselines["tfidf"]),
            "untrained": {name: better(entry) | spread for name, entry in baselines["untrained"].items()},
        },
    }


def started(result: dict[str, Any], *, gain: float = 0.0) -> dict[str, Any]:
    """The tuned result of a run whose start is known: `gain` above it in the pooler, and as good in the others."""
    result = tuned(result)
    poolings = list(result["baselines"]["untrained"])

    def difference(pooling: str) -> dict[str, Any]:
        value = gain if pooling == "pooler" else 0.0
        return {"difference": value, "interval": [value - 0.01, value + 0.01], "p_value": 0.5}

    start = {
        pooling: score(result[pooling]["test_accuracy"] - difference(pooling)["difference"])
        | {"tuned_accuracy": 0.777, "tuned_c": 10.0}
        for pooling in poolings
    }
    beyond = {pooling: difference(pooling) | {"tuned": difference("mean")} for pooling in poolings}
    return {**result, "baselines": result["baselines"] | {"start": start}, "beyond_start": beyond}


def score(accuracy: float, n: int = 425) -> dict[str, Any]:
    """Wilson's 95 % interval, and a matrix whose diagonal has that share."""
    z = 1.96
    centre = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    each = n // len(LABELS)
    right = round(accuracy * each)
    confusion = [[right if i == j else (each - right) // 4 for j in range(len(LABELS))] for i in range(len(LABELS))]
    return {
        "train_accuracy": min(1.0, accuracy + 0.05),
        "test_accuracy": accuracy,
        "macro_f1": accuracy - 0.01,
        "interval": [centre - half, centre + half],
        "confusion": confusion,
    }


def write_probe(run: Path | str, result: dict[str, Any]) -> None:
    path = Path(run) / "probes" / f"{result['task']}-{result['step']:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
