"""The model card of an export: what was trained, on what, how far, and how good it is beside simple baselines."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from raybert import storage
from raybert.config import look_up, warmup_steps
from raybert.config_sections import VALIDATION_LOSS
from raybert.errors import InputError
from raybert.model.bert import Bert
from raybert.model.objective import TITLES
from raybert.probe import kinds
from raybert.probe.service import best
from raybert.records import format_seconds
from raybert.report.beyond import gains
from raybert.report.figure import learning_figure
from raybert.report.read import Probe, RunData, Score, read_run
from raybert.tokenizer import files as tokenizers

FIGURE = "learning.png"
# What the hub calls a kind and its headline; others go by their own names.
TASK_TYPES = {"classification": "text-classification", "similarity": "sentence-similarity"}
METRIC_TYPES = {"test_accuracy": "accuracy", "spearman": "spearmanr"}


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: its run and its step; `best` says by what it is the run's best, if it is."""

    run: RunData
    step: int
    best: str


def origin(checkpoint: str) -> Origin | None:
    """The run that the checkpoint lies in; None for one that lies elsewhere."""
    directory, _, name = storage.absolute(checkpoint).rpartition("/")
    run_uri, _, parent = directory.rpartition("/")
    if parent != "checkpoints" or not storage.exists(storage.join(run_uri, "config.yaml")):
        return None
    run = read_run(run_uri)
    if name == "best":
        return _best(run)
    step = name.removeprefix("step-")
    return Origin(run, int(step), "") if step.isdecimal() else None


def _best(run: RunData) -> Origin | None:
    """Where the best weights come from, as `Saver` and the probe service choose them."""
    metric = run.setting("checkpoint.best", VALIDATION_LOSS)
    if metric == VALIDATION_LOSS:
        steps, losses = run.series("validation.loss")
        return Origin(run, steps[losses.index(min(losses))], "the lowest validation loss") if steps else None
    found = best.read(run.uri, metric)
    return Origin(run, found[0], f"the highest {metric}") if found else None


def write_card(checkpoint: str, model: Bert, directory: Path, *, repository: str = "", revision: str = "main") -> None:
    """Write README.md, and the run's figure where there is a run, into an export directory.

    Args:
        repository: where the directory is to be pushed, if it is, and its `revision` there.
    """
    found = origin(checkpoint)
    if found is not None and found.run.records:
        (directory / FIGURE).write_bytes(learning_figure(found.run))
    name = repository or directory.resolve().name
    text = render(model, found, name, revision if repository else "main")
    (directory / "README.md").write_text(text, encoding="utf-8")


def render(model: Bert, found: Origin | None, name: str, revision: str = "main") -> str:
    """The card in Markdown with the header that the Hugging Face Hub reads.

    Args:
        name: what the snippets open: the export's directory, or a repository at its `revision`.
    """
    title = f"{found.run.name}, step {found.step:,}" if found else name
    probes = _probes(found) if found else []
    parts = [
        f"---\n{yaml.safe_dump(_header(title, probes), sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        _objective(found) if found else "A BERT encoder, exported by raybert.",
        *(_of_run(found, probes) if found else ()),
        "## The model",
        _table(("", ""), _model_rows(model)),
        "## Use it",
        _snippets(model, name, revision),
    ]
    if tokenizers.is_own(tokenizers.own_or(model.tokenizer)):
        parts.append(
            "The tokenizer is GPT-2's byte-pair encoding with `[CLS]`, `[SEP]`, `[MASK]` and `[PAD]`. It is case "
            "sensitive, and a word has different tokens after a space and at the start of a text. In the "
            "training text, a written-out `[MASK]` was plain text; this tokenizer reads it as the special token."
        )
    elif model.tokenizer is not None:
        parts.append(f"The tokenizer is a {model.tokenizer.name} of {model.tokenizer.size:,} tokens.")
    return "\n\n".join(parts) + "\n"


def _header(title: str, probes: list[Probe]) -> dict[str, Any]:
    """Metadata: https://huggingface.co/docs/hub/model-cards"""
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["bert", "fill-mask", "sentence-transformers", "feature-extraction", "raybert"],
    }
    results = [
        {
            "task": {"type": TASK_TYPES.get(probe.kind.name, probe.kind.name), "name": probe.kind.headline.method},
            "dataset": {"type": probe.task, "name": str(probe.raw.get("title", probe.task))},
            "metrics": [
                {
                    "type": METRIC_TYPES.get(probe.kind.headline.key, probe.kind.headline.key),
                    "name": f"{probe.kind.headline.title}, {pooling} pooling",
                    "value": round(score.value, 4),
                }
                for pooling, score in probe.scores.items()
            ],
        }
        for probe in probes
    ]
    return header | ({"model-index": [{"name": title, "results": results}]} if results else {})


def _of_run(found: Origin, probes: list[Probe]) -> Iterator[str]:
    run = found.run
    yield "## Training"
    yield _table(("", ""), _training_rows(found))
    yield _losses(found)
    if run.records:
        yield f"![Losses and probe accuracy against tokens]({FIGURE})"
    yield "## Probes"
    if not probes:
        yield f"No probe has a result at step {found.step:,}."
    for probe in probes:
        headline = probe.kind.headline
        yield (
            f"**{probe.raw.get('title', probe.task)}**, step {probe.step:,}: {probe.kind.summary(probe.raw)}. "
            f"{headline.label[0].upper()}{headline.label[1:]} with its 95 % interval:"
        )
        start = ("the start of training", "gain over it, points") if probe.baselines.start else ()
        yield _table(("", "this model", "the same, untrained", *start), _probe_rows(probe))


def _objective(found: Origin) -> str:
    learned = " and ".join(title for name, title in TITLES.items() if found.run.series(f"{name}_loss")[0])
    text = f"A BERT encoder, pre-trained from scratch with raybert on {learned or 'nothing yet'}."
    if "nsp_loss" not in (record := found.run.records[-1] if found.run.records else {}) and "mlm_loss" in record:
        text += " Its next-sentence head was not trained."
    return text


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _training_rows(found: Origin) -> Iterator[tuple[str, ...]]:
    run = found.run
    batch, seq_len = run.setting("train.global_batch", 0), run.seq_len
    record: Mapping[str, Any] = next((r for r in reversed(run.records) if r["step"] <= found.step and "loss" in r), {})
    yield from _data_rows(run)
    planned = f"{found.step:,} of {run.steps_planned:,}"
    yield "steps", planned + (f" ({found.best})" if found.best else "")
    yield "samples", f"{found.step * batch:,} ({batch} per step)"
    if seq_len:
        yield "tokens", f"{found.step * batch * seq_len:,} positions ({seq_len} per sample), padding included"
    if "epoch" in record:
        yield "passes over the data", f"{record['epoch'] * found.step / max(1, record['step']):.2f}"
    if "elapsed_seconds" in record:
        rate = f", {record['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in record else ""
        yield "time", f"{format_seconds(record['elapsed_seconds'])} on {record.get('workers', '?')} workers{rate}"
    yield (
        "optimizer",
        f"AdamW, lr {run.shown('optimizer.lr')}, weight decay {run.shown('optimizer.weight_decay')}",
    )
    if isinstance(objective := look_up(run.settings, "objective"), dict):
        yield "objective", ", ".join(f"{key} {value}" for key, value in objective.items() if value is not None)
    given = run.shown("schedule.warmup_steps")
    warmup = given if isinstance(given, str) else warmup_steps(given, run.steps_planned)
    yield "schedule", f"{run.shown('schedule.decay')}, {warmup} warm-up steps"
    yield "seeds", f"data {run.shown('data.seed')}, training {run.shown('train.seed')}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "not recorded"


def _data_rows(run: RunData) -> Iterator[tuple[str, ...]]:
    """The shard set as its manifest tells of it, as far as it can still be read."""
    from raybert.data.shards import open_shards

    manifest = str(run.about.get("manifest", ""))
    try:
        shards = open_shards(run.setting("data.shards", ""))
    except (InputError, OSError):
        shards = None
    if shards is not None and shards.manifest_hash == manifest:
        documents = shards.counts.get("documents", {}).get("read")
        of = f" from {documents:,} documents" if isinstance(documents, int) else ""
        yield "data", f"{shards.tokens('train'):,} tokens in {shards.rows('train'):,} windows{of}"
        yield "held out", f"{shards.tokens('validation'):,} tokens in {shards.rows('validation'):,} windows"
    yield "SHA-256 of the data's manifest", f"`{manifest}`"


def _losses(found: Origin) -> str:
    """A table of the losses that were on."""
    on = {f"{name}_loss": title for name, title in TITLES.items() if found.run.series(f"{name}_loss")[0]}
    head = " | ".join(("loss (nats)", *on.values(), "weighted sum"))
    rule = "|".join(("---", *("---:" for _ in range(len(on) + 1))))
    return "\n".join((f"| {head} |", f"|{rule}|", *_loss_rows(found, (*on, "loss"))))


def _loss_rows(found: Origin, keys: Sequence[str]) -> Iterator[str]:
    for name, prefix in (("training", ""), ("validation", "validation.")):
        cells, at = [], None
        for key in keys:
            points = [(s, v) for s, v in zip(*found.run.series(prefix + key), strict=True) if s <= found.step]
            at, value = points[-1] if points else (None, None)
            cells.append("" if value is None else f"{value:.4f}")
        if at is not None:
            yield f"| {name}, step {at:,} | {' | '.join(cells)} |"


def _probes(found: Origin) -> list[Probe]:
    """Of each task the newest result that is not of a later step."""
    newest = []
    for task in found.run.tasks:
        done = [probe for probe in found.run.trained(task) if probe.step <= found.step]
        newest += done[-1:]
    return newest


def _probe_rows(probe: Probe) -> Iterator[tuple[str, ...]]:
    def cell(score: Score | None) -> str:
        return "" if score is None else str(score)

    baselines = probe.baselines
    gained = gains(probe)
    for pooling, score in probe.scores.items():
        start = (cell(baselines.start.get(pooling)), gained.get(pooling, "")) if baselines.start else ()
        yield f"{pooling} pooling", cell(score), cell(baselines.untrained.get(pooling)), *start
    empty = ("",) * (3 if baselines.start else 1)
    for name, score in baselines.plain.items():
        yield kinds.BASELINES[name], cell(score), *empty


def _model_rows(model: Bert) -> Iterator[tuple[str, ...]]:
    parameters = sum(p.numel() for name, p in model.named_parameters() if name != "word_embeddings.weight")
    parameters += model.config.vocab_size * model.config.hidden_size  # without the spare rows
    yield "parameters", f"{parameters:,}"
    for name, value in asdict(model.config).items():
        yield name, f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _snippets(model: Bert, name: str, revision: str) -> str:
    opened = json.dumps(name) + (f", revision={json.dumps(revision)}" if revision != "main" else "")
    own = tokenizers.own_or(model.tokenizer)
    mask = own.decode([own.roles["mask"]]) if "mask" in own.roles else "[MASK]"
    return f"""```python
from transformers import AutoModel, AutoTokenizer, pipeline

model, tokenizer = AutoModel.from_pretrained({opened}), AutoTokenizer.from_pretrained({opened})
pipeline("fill-mask", {opened})("The government said on {mask} that it would cut taxes.")
```

```python
from sentence_transformers import SentenceTransformer

SentenceTransformer({opened}).encode(["a text", "another text"])  # mean pooling
```"""
