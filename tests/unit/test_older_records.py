"""A probe record of 0.1.0, as that version wrote it, is read by everything that reads records."""

import io
import shutil
from pathlib import Path

from rich.console import Console

from raybert.probe import kinds, metrics
from raybert.probe.compare import compare
from raybert.probe.evaluate import add_start
from raybert.probe.service import queue
from raybert.probe.show import comparison_table, format_block, result_table, results_table
from raybert.report.page import render
from raybert.report.read import read_run
from raybert.report.terminal import closing_table
from raybert.report.trackers import probe_figures
from tests.runs import make_run

STORED = Path(__file__).parents[1] / "records" / "0.1.0.json"


def test_a_record_of_the_first_version_is_read_by_all(tmp_path):
    run = make_run(tmp_path, steps=200, probe_every=200, tasks=())
    (Path(run) / "probes").mkdir()
    shutil.copyfile(STORED, Path(run) / "probes" / "mine-00000200.json")
    found = queue.read_records(run)
    assert not found.damaged
    (record,) = found.good.values()
    accuracy = record["mean"]["test_accuracy"]
    assert "kind" not in record
    assert kinds.of_record(record) is kinds.KINDS["classification"]
    assert metrics.value("mine.mean.test_accuracy", record) == accuracy
    names = {name for name, _, _ in kinds.baselines(record)}
    assert names == {"majority", "tfidf", "untrained"}
    assert set(probe_figures(record)) >= {"probe/mine/mean", "probe/mine/tfidf", "probe/mine/mean_untrained"}
    for shown in (result_table(record), results_table([record]), comparison_table(compare(record, record))):
        assert shown.row_count
    assert "untrained" in format_block(record)
    data = read_run(run)
    (probe,) = data.probes
    assert probe.scores["mean"].value == accuracy
    assert (probe.baselines.untrained_absent, probe.baselines.start_absent) == ("", "")
    assert f"{100 * accuracy:.1f} %" in render(data)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(closing_table(run))
    assert f"{100 * accuracy:.1f}" in console.export_text()
    # A run that goes on with this version has it as its start.
    now = {**record, "baselines": dict(record["baselines"])}
    add_start(now, record)
    assert now["baselines"]["start"]["mean"] == record["mean"]
    assert now["beyond_start"]["mean"]["difference"] == 0.0
