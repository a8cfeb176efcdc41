"""Probes: what an encoder's vectors say about texts. `run` probes one model; the service probes checkpoints of runs."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raybert.model.bert import Bert
    from raybert.probe.kind import ProbeTask


def run(
    model: "Bert | str",
    task: "ProbeTask | str | Mapping[str, Any]",
    *,
    device: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Probe one model in this process.

    Args:
        model: a `raybert.Bert`, which is left in the mode that it was in and on the device where the probe runs; or a
            checkpoint at any URI, or a local transformers BERT directory.
        task: a task, or its name or YAML file as in `probe.tasks`, or what such a file would hold.
        device: where the encoder runs; by default a GPU if there is one.
        progress: called with the finished fraction of the encoding.

    Returns:
        A record as the probe service writes it (see `raybert.probe.evaluate.evaluate`), without a run and a step. What
        depends only on the texts is cached in the user's directory.

    Raises:
        InputError: there is no such model or task, or the task's texts cannot be judged.
    """
    import torch

    from raybert import storage
    from raybert.encode.encoders import RaybertEncoder, open_encoder
    from raybert.probe.baselines import local_cache
    from raybert.probe.evaluate import evaluate, prepare
    from raybert.probe.kind import ProbeTask
    from raybert.probe.tasks import check_task, load_task, parse_task

    if isinstance(task, str):
        task = load_task(task)
    elif not isinstance(task, ProbeTask):
        task = parse_task(task, str(task.get("name", "without a name")))
        check_task(task)
    training = not isinstance(model, str) and model.training
    encoder = open_encoder(model) if isinstance(model, str) else RaybertEncoder(model)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    material = prepare(task, encoder.tokenize, encoder.positions)
    record = evaluate(encoder, material, local_cache(), device=where, progress=progress)
    if not isinstance(model, str):
        model.train(training)
    about = {"checkpoint": storage.absolute(model)} if isinstance(model, str) else {}
    return {"step": None, "run": None, "status": "done", **about, **record}
