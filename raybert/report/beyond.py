"""What training added beyond the run's start, in words: from the paired differences that a probe's record holds."""

from collections.abc import Mapping
from typing import Any

from raybert.probe.show import times_100
from raybert.report.read import Probe

Differences = Mapping[str, Mapping[str, Any]]  # by pooling: difference, interval


def verdict(probe: Probe) -> str:
    """One clause for the last result of a task, also when training added nothing; empty where no start is recorded."""
    if probe.baselines.start_absent:
        return f"gain over the start on {probe.task} unknown: the start has no result ({probe.baselines.start_absent})"
    return _in_words(
        probe,
        "on {task}, step {step:,} {judged} ({figures})",
        tuned="; with C tuned, it {judged} ({figures})",
    )


def against_start(probe: Probe) -> str:
    """The differences with their intervals as a sentence; empty where no start is recorded."""
    return _in_words(
        probe,
        "Step {step:,} compared with the run's start, text by text: {figures}.",
        tuned=" C tuned: {figures}.",
    )


def gains(probe: Probe) -> dict[str, str]:
    """The differences with C = 1, times 100 with their intervals, for tables: ``+3.1 [1.2, 5.0]`` by pooling."""
    found: Differences = probe.raw.get("beyond_start", {})
    return {pooling: times_100(entry, "{:+.1f} [{:.1f}, {:.1f}]") for pooling, entry in found.items()}


def _in_words(probe: Probe, usual: str, *, tuned: str) -> str:
    """The differences with C = 1 in one form and those with C tuned in the other, as far as the record has them."""
    found: Differences = probe.raw.get("beyond_start", {})
    chosen: Differences = {pooling: entry["tuned"] for pooling, entry in found.items() if entry.get("tuned")}
    another_c = {pooling: _another_c(probe, pooling) for pooling in chosen}
    return "".join(
        form.format(task=probe.task, step=probe.step, judged=_judge(differences), figures=_figures(differences, notes))
        for form, differences, notes in ((usual, found, {}), (tuned, chosen, another_c))
        if differences
    )


def _another_c(probe: Probe, pooling: str) -> str:
    """Both values of C where they differ: the held-out texts are few, so the difference may be their choice alone."""
    now, start = (scores.get(pooling) for scores in (probe.scores, probe.baselines.start))
    if now is None or start is None or None in (now.tuned_c, start.tuned_c) or now.tuned_c == start.tuned_c:
        return ""
    return f" with C = {now.tuned_c:g}, the start's {start.tuned_c:g}"


def _figures(differences: Differences, notes: Mapping[str, str]) -> str:
    """``pooler +3.1 points [+1.2, +5.0], ...``, each with its note."""
    form = "{:+.1f} points [{:+.1f}, {:+.1f}]"
    return ", ".join(
        f"{pooling} {times_100(found, form)}{notes.get(pooling, '')}" for pooling, found in differences.items()
    )


def _judge(differences: Differences) -> str:
    """By intervals of 95 %: where they hold zero, the difference can be chance."""
    gained = [pooling for pooling, found in differences.items() if found["interval"][0] > 0]
    lost = [pooling for pooling, found in differences.items() if found["interval"][1] < 0]
    parts = [f"improves on the start in {_listed(gained)}"] if gained else []
    parts += [f"falls below the start in {_listed(lost)}"] if lost else []
    return " and ".join(parts) or "does not differ significantly from the start"


def _listed(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
