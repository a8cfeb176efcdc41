"""Suites: named lists of probe tasks with an average, which is shown beside its members.

A suite is a packaged one by its name, or a YAML file with the keys `name` and `tasks`; paths in it are taken from its
directory.
"""

from importlib import resources
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raybert import storage
from raybert.config_text import read_overridden, typed
from raybert.errors import InputError
from raybert.probe.kind import TASK_NAME


class Suite(BaseModel):
    """`tasks` are named as in `probe.tasks`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=TASK_NAME)]
    tasks: list[str] = Field(min_length=2)


def suite_names() -> list[str]:
    """The packaged suites."""
    folder = resources.files("raybert.probe") / "suite_files"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_suite(spec: str) -> Suite:
    """
    Raises:
        InputError: there is no such suite, or its file is none.
    """
    path = spec
    if not spec.endswith((".yaml", ".yml")):
        if spec not in suite_names():
            raise InputError(
                f"There is no probe suite {spec}; the packaged ones are {', '.join(suite_names())}, or give the "
                "path of a YAML file with the keys name and tasks."
            )
        path = str(resources.files("raybert.probe") / "suite_files" / f"{spec}.yaml")
    elif not storage.exists(spec):
        raise InputError(f"There is no probe suite file {spec}.")
    try:
        found = Suite.model_validate(typed(read_overridden(path), Suite))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise InputError(f"The probe suite {spec}: {key}: {fault['msg']}.") from error
    folder = storage.absolute(path).rpartition("/")[0]
    return found.model_copy(update={"tasks": [_with_folder(task, folder) for task in found.tasks]})


def _with_folder(task: str, folder: str) -> str:
    """A task whose file or directory is taken from the suite's directory."""
    name, at, place = task.partition("@")
    if task.endswith((".yaml", ".yml")):
        return storage.absolute(task, folder)
    return f"{name}@{storage.absolute(place, folder)}" if at and place else task
