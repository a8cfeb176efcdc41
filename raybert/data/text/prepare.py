"""Raw text to a shard set, as two streaming Ray Data jobs: read and spill, then gather each shard.

Every task holds a piece of the input or one shard, never more, and the driver holds counts and offsets. Which task does
what, and in what order, leaves no trace in the output: see raybert.data.text.spill.
"""

import logging
import pickle
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import DataContext
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from raybert import storage
from raybert.data.shards import MANIFEST, SPLITS, Shard, ShardSet, open_shards, verify_shards, write_manifest
from raybert.data.text import corpus, phases
from raybert.data.text import documents as readers
from raybert.data.text.inputs import sentence
from raybert.data.text.settings import Settings
from raybert.data.text.values import TOO_LARGE
from raybert.data.text.windows import MIN_TOKENS
from raybert.errors import InputError
from raybert.ray_internals.names import PROGRESS_LOGGER
from raybert.tokenizer import TextTokenizer, Vocabulary
from raybert.tokenizer import files as tokenizers

logger = logging.getLogger(__name__)

_OURS = re.compile(rf"({'|'.join(SPLITS)})-\d+-of-\d+\.parquet(\.\w+\.tmp)?|{re.escape(MANIFEST)}|_tmp-\w+")


def prepare(
    inputs: Sequence[str],
    output: str,
    *,
    tokenizer: TextTokenizer | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> ShardSet:
    """Tokenise raw text into a shard set. Ray must be initialised.

    The same input and settings give the same bytes, on any cluster. Exact copies of a document are dropped. An existing
    set of the same input and settings is returned unchanged; an interrupted one starts over.

    Args:
        inputs: files, directories, globs or ``embedded://`` names; see raybert.data.text.inputs.
        output: directory at any URI that every node of the cluster can reach.
        tokenizer: as `raybert.tokenizer.load` opens it; raybert's own by default.
        overwrite: replace a shard set that is already there.
        progress: show a bar.
        settings: those of `raybert.data.text.settings.Settings`; ``seq_len`` must be given.

    Raises:
        InputError: a setting, the input or the output cannot be used, or too many documents are bad.
    """
    if not ray.is_initialized():
        raise RuntimeError("prepare() needs an initialised Ray: call ray.init() or raybert.cluster.connect() first")
    chosen = Settings(**settings)
    output = storage.absolute(output)
    storage.require_writable(output)
    used = tokenizers.own_or(tokenizer)
    raw = corpus.plan(inputs, chosen.text_column, lines=bool(chosen.split_txt))
    _keep_input(raw.files, output)
    about = {**chosen.in_manifest(), "inputs": raw.inputs}
    if storage.exists(storage.join(output, MANIFEST)) and not overwrite:
        there = _already_there(output, about, used.hash, progress)
        if there is not None:
            _say([sentence(raw.passed_over)], progress)
            return there
    _remove_leftovers(output)
    for name, content in tokenizers.written(used).items():
        storage.write_bytes(storage.join(output, tokenizers.DIRECTORY, name), content)
    with _bar(progress) as bar:
        shards, counts = _make(raw, output, chosen, used, bar)
    held_out = bool(chosen.held_out)
    made = write_manifest(output, splits=shards, counts=_counts(counts, held_out=held_out), tokenizer=used, **about)
    _say([*describe(made), sentence(raw.passed_over)], progress)
    return made


def _make(
    raw: corpus.Corpus, output: str, settings: Settings, tokenizer: TextTokenizer, bar: Progress
) -> tuple[dict[str, list[Shard]], Counter[str]]:
    """Both phases, with the spills between them removed at the end."""
    spills_uri = storage.join(output, f"_tmp-{uuid.uuid4().hex[:8]}")
    try:
        spills, counts = _read(raw, bar, spills_uri, settings, tokenizer)
        tokens = sum((spilled.tokens for spilled in spills), np.zeros(len(SPLITS), np.int64))
        _check(raw, counts, tokens, settings)
        jobs = [
            job
            for number, split in enumerate(SPLITS)
            for job in phases.shard_jobs(number, split, int(tokens[number]), settings.shard_tokens)
        ]
        return _gather(jobs, spills, bar, output, (settings.unit_rows, tokenizer.vocabulary), counts), counts
    finally:
        storage.remove(spills_uri)


def describe(shards: ShardSet) -> list[str]:
    """What went into a shard set and what was left out, by reason, as lines for a person."""
    documents = shards.counts["documents"]
    windows = " and ".join(f"{shards.rows(split):,} {split}" for split in SPLITS)
    tokens = sum(shards.tokens(split) for split in SPLITS)
    lines = [f"{shards.uri}: {windows} windows, {tokens:,} tokens, from {documents['read']:,} documents"]
    reasons = {
        **{f"bad ({reason.replace('_', ' ')})": number for reason, number in documents["bad_dropped"].items()},
        "too short": documents["too_short_dropped"],
        "exact copies": documents["copies_dropped"],
        "held out for probes": documents.get("held_out", 0),
        "files without a document": shards.inputs.get("empty_files", 0),
    }
    left_out = [f"{number:,} {reason}" for reason, number in reasons.items() if number]
    if left_out:
        lines.append(f"dropped: {', '.join(left_out)}")
    if (wanted := shards.settings.get("held_out")) and not documents.get("held_out"):
        lines.append(f"none of the {wanted['texts']:,} texts to hold out is a document of the input")
    fraction = shards.settings.get("validation_fraction")
    if fraction and not shards.rows("validation"):
        lines.append(
            f"no validation windows: too few documents for --validation-fraction {fraction:g}; add documents, raise "
            "the fraction, or train with every.validation=0"
        )
    return lines


def _say(lines: Iterable[str], aloud: bool) -> None:
    for line in filter(None, lines if aloud else ()):
        Console(soft_wrap=True).print(line, highlight=False, markup=False)


def _keep_input(files: Iterable[str], output: str) -> None:
    """Refuse an output whose preparation would delete files of the input."""
    for uri in files:
        folder, _, name = uri.rpartition("/")
        if folder == output and _OURS.fullmatch(name):
            raise InputError(
                f"The output {output} contains the input file {name} and would replace it; choose another output."
            )


def _read(
    raw: corpus.Corpus, bar: Progress, spills_uri: str, settings: Settings, tokenizer: TextTokenizer
) -> tuple[list[phases.Spilled], Counter[str]]:
    """Phase 1: every fragment into spills.

    Raises:
        InputError: no document of a file has a text.
    """

    def task(numbered: tuple[int, list[readers.Piece]]) -> Iterator[phases.Spilled]:
        return phases.read_fragment(*numbered, spills_uri, settings, tokenizer)

    spills: list[phases.Spilled] = []
    counts: Counter[str] = Counter()
    # Of each file: the pieces that are not known to hold a text, and the documents in the others.
    pieces = Counter(piece.uri for part in raw.fragments for piece in part)
    missing: Counter[str] = Counter()
    shown = bar.add_task("reading", total=sum(piece.size for part in raw.fragments for piece in part), note="")
    # The largest first, so that no core is left with one at the end.
    tasks = sorted(enumerate(raw.fragments), key=lambda task: -sum(piece.size for piece in task[1]))
    for spilled in _stream(task, tasks):
        counts += spilled.counts
        spills.append(spilled)
        for uri, documents in spilled.textless:
            pieces[uri] -= 1
            missing[uri] += documents
            if not pieces[uri] and missing[uri]:
                raise InputError(
                    f"{uri} contains no text: {settings.text_column} is missing or null in all of its "
                    f"{missing[uri]:,} documents; name another --text-column, or leave the file out."
                )
        note = f"{counts['read']:,} documents, {counts['tokens']:,} tokens"
        bar.update(shown, advance=spilled.size, note=note)
    return spills, counts


def _gather(
    jobs: list[phases.ShardJob],
    spills: list[phases.Spilled],
    bar: Progress,
    output: str,
    form: tuple[int, Vocabulary],
    counts: Counter[str],
) -> dict[str, list[Shard]]:
    """Phase 2: every shard from the spills; adds what it finds to ``counts``.

    Args:
        form: rows of a unit, and the vocabulary.
    """
    # Fetched once a task from the object store instead of being sent with each.
    sources = ray.put(sorted(((spilled.uri, spilled.offsets) for spilled in spills if spilled.uri), key=lambda s: s[0]))

    def task(job: phases.ShardJob) -> Iterator[phases.Gathered]:
        yield phases.gather_shard(job, ray.get(sources), output, *form)

    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    shown = bar.add_task("writing shards", total=len(jobs), note="")
    for gathered in _stream(task, jobs):
        shards[gathered.split].append(gathered.shard)
        counts[gathered.split] += gathered.documents
        counts["copies"] += gathered.copies
        bar.update(shown, advance=1)
    return {split: sorted(found, key=lambda shard: shard.name) for split, found in shards.items()}


def _already_there(output: str, about: dict[str, Any], tokenizer_hash: str, progress: bool) -> ShardSet | None:
    """The finished shard set at ``output``, when it is what was asked for; None when it is damaged."""
    there = open_shards(output)
    if {key: getattr(there, key) for key in about} != about or there.tokenizer_hash != tokenizer_hash:
        raise InputError(
            f"{output} contains a shard set made with other settings, another tokenizer or other input; choose "
            "another output, or replace it with --overwrite."
        )
    message, whole = f"{output} is already prepared from this input with these settings; nothing to do.", True
    try:
        verify_shards(there)
    except InputError as fault:
        message, whole = f"{fault} Preparing it again now.", False
    logger.info(message)
    if progress:
        Console().print(message, highlight=False)
    return there if whole else None


def _remove_leftovers(output: str) -> None:
    """Clear what an interrupted or an older prepare left; the manifest first, so that no half set is ever valid."""
    names = [uri for uri in storage.list_dir(output) if _OURS.fullmatch(uri.rpartition("/")[2])]
    if names:  # of a shard set; else whatever lies in tokenizer/ is somebody else's
        names += [storage.join(output, tokenizers.DIRECTORY, name) for name in tokenizers.WRITTEN]
    for uri in sorted(names, key=lambda uri: not uri.endswith(MANIFEST)):
        storage.remove(uri)


def _stream(function: Callable[[Any], Iterator[Any]], tasks: Sequence[Any]) -> Iterator[Any]:
    """Run ``function`` on each task, one Ray task each, and yield what they yield as it comes, in no order.

    Raises:
        InputError: the first that a task raised.
    """

    def run(row: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
        try:
            for result in function(pickle.loads(row["task"])):
                yield {"result": pickle.dumps(result)}
        except InputError as error:  # as a value: an exception would come back wrapped in Ray's
            yield {"result": pickle.dumps(error)}

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    with DataContext.current(context), _quiet("ray.data", logging.WARNING), _quiet(PROGRESS_LOGGER, logging.ERROR):
        rows = ray.data.from_items([{"task": pickle.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
        for row in rows.flat_map(run).iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, InputError):
                raise result
            yield result


@contextmanager
def _quiet(name: str, level: int) -> Iterator[None]:
    """Keep a logger to what matters for a while: its plans and timings would run through the progress bar."""
    target = logging.getLogger(name)
    before = target.level
    target.setLevel(level)
    try:
        yield
    finally:
        target.setLevel(before)


def _check(raw: corpus.Corpus, counts: Counter[str], tokens: np.ndarray, settings: Settings) -> None:
    """Refuse input that is empty or bad, before a shard is written."""
    read, reasons = counts["read"], _bad(counts)
    bad = sum(reasons.values())
    whole = [] if settings.split_txt else [piece.uri for part in raw.fragments for piece in part if piece.kind == "txt"]
    remedy = ""
    if whole and TOO_LARGE.reason in reasons:
        remedy = (
            f"A .txt file, such as {whole[0]}, is read as one document of at most "
            f"{readers.MAX_DOCUMENT_BYTES >> 20} MB; split it into documents with --split-txt "
            f"{' or --split-txt '.join(readers.SPLIT_TXT)}."
        )
    if read == 0:
        raise InputError("The input contains no documents.")
    if bad > settings.max_bad_fraction * read:
        raise InputError(
            f"{bad:,} of {read:,} documents cannot be used ({', '.join(f'{r}: {n:,}' for r, n in reasons.items())}), "
            f"more than {settings.max_bad_fraction:.2%}. "
            + (remedy or "Clean the input, or allow more with --max-bad-fraction.")
        )
    if tokens[0] == 0:
        raise InputError(
            f"None of the {read:,} documents gave a training window of at least {MIN_TOKENS} tokens "
            f"({counts['too_short']:,} are too short). " + (remedy or "Add documents, or lower --validation-fraction.")
        )


def _bad(counts: Counter[str]) -> dict[str, int]:
    return {key.removeprefix("bad:"): counts[key] for key in sorted(counts) if key.startswith("bad:")}


def _counts(counts: Counter[str], *, held_out: bool) -> dict[str, Any]:
    """The counts as the manifest has them; `held_out`: whether documents were to be left out.

    ``read`` is the sum of the other numbers of documents.
    """
    return {
        "documents": {
            "read": counts["read"],
            **{split: counts[split] for split in SPLITS},
            "copies_dropped": counts["copies"],
            "too_short_dropped": counts["too_short"],
            "bad_dropped": _bad(counts),
            **({"held_out": counts["held_out"]} if held_out else {}),
        },
        "short_windows_dropped": counts["short_windows"],
        "short_tokens_dropped": counts["short_tokens"],
    }


def _bar(show: bool) -> Progress:
    """A progress bar with a note beside it; nothing at all unless ``show``."""
    return Progress(
        TextColumn("{task.description:>14}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not show,
    )
