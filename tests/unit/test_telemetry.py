import json
from pathlib import Path

from raybert.records import format_line, format_seconds, read_metrics
from raybert.telemetry import MetricsLog, tags_of


def test_a_restarted_run_goes_on_in_the_same_file_and_the_last_line_of_a_step_counts(tmp_path):
    run = str(tmp_path / "run")
    log = MetricsLog(run)
    log.write({"step": 10, "loss": 1.0})
    log.write({"step": 20, "loss": 0.9})
    log.close()
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')  # the process was killed here
    assert [record["step"] for record in read_metrics(run)] == [10, 20]
    log = MetricsLog(run)
    log.write({"step": 20, "loss": 0.8})
    log.close()
    assert read_metrics(run) == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.8}]
    for line in Path(run, "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_remote_file_is_whole_at_the_end():
    log = MetricsLog("memory://telemetry/run")
    for step in range(5):
        log.write({"step": step})
    log.close()
    log = MetricsLog("memory://telemetry/run")
    log.write({"step": 5})
    log.close()
    assert [record["step"] for record in read_metrics("memory://telemetry/run")] == list(range(6))


def test_the_log_line_names_every_figure():
    record = {
        "step": 10,
        "loss": 9.5,
        "mlm_loss": 8.9,
        "nsp_loss": 0.6,
        "mlm_accuracy": 0.1,
        "nsp_accuracy": 0.6,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "tokens_per_second": 12345.6,
        "mfu": 0.25,
        "wait_data": 0.01,
        "eta_seconds": 3723,
        "validation": {"loss": 9.0, "mlm_loss": 8.4, "nsp_loss": 0.6, "mlm_accuracy": 0.1, "nsp_accuracy": 0.6},
    }
    line = format_line(record, 100)
    for piece in ("10/100", "9.5000", "1.00e-03", "12,346 tok/s", "25.0%", "1.0%", "1:02:03", "validation loss 9.0000"):
        assert piece in line
    assert format_seconds(61) == "1:01"


def test_a_trial_is_tagged_with_its_sweep():
    assert tags_of("gs://bucket/runs/compact") == {"run": "compact", "trial": ""}
    assert tags_of("/data/runs/lr-by-size/trials/trial-0003/") == {"run": "lr-by-size", "trial": "trial-0003"}


def test_a_remote_log_is_in_storage_once_it_is_synced(tmp_path):
    run = f"memory://{tmp_path.name}"
    log = MetricsLog(run)
    for step in (1, 2, 3):
        log.write({"step": step})
        if step == 2:
            assert read_metrics(run) == []
            log.sync()
    assert [record["step"] for record in read_metrics(run)] == [1, 2]
    log.close()
    assert [record["step"] for record in read_metrics(run)] == [1, 2, 3]
    log.sync()  # a checkpoint's upload may end after the loop
    again = MetricsLog(run)
    again.write({"step": 4})
    again.close()
    assert [record["step"] for record in read_metrics(run)] == [1, 2, 3, 4]
