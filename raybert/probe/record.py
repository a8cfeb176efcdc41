"""Probe records as they are read back: JSON objects whose known parts are what the probe service writes.

A record may lack any part, and hold others; it is damaged when a part that is there is wrong.
"""

import re
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from raybert.probe import kinds
from raybert.records import LARGEST, parse_object

Record = dict[str, Any]
NAME = re.compile(r"(?P<task>[A-Za-z0-9][A-Za-z0-9._-]*)-(?P<step>\d{8,15})\.json")  # of a record's file

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Figure = Annotated[float, Field(ge=-1, le=1)]
Bits = Annotated[str, Field(pattern=r"^(?:[0-9a-f]{2})*$")]


_FIGURE: TypeAdapter[float] = TypeAdapter(Figure, config=ConfigDict(strict=True))


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Score(_Part):
    train_accuracy: Share | None = None
    test_accuracy: Share = 0.0  # only looked at where it is given
    macro_f1: Share | None = None
    interval: Annotated[list[Figure], Field(min_length=2, max_length=2)] | None = None
    confusion: list[list[Count]] | None = None
    tuned_accuracy: Share | None = None
    tuned_c: Annotated[float, Field(gt=0)] | None = None
    warnings: list[str] = []
    collapsed: str = ""
    absent: str = ""

    @model_validator(mode="after")
    def _square(self) -> Self:
        if any(len(row) != len(self.confusion or ()) for row in self.confusion or ()):
            raise ValueError("the confusion matrix is not square")
        return self


class _Difference(_Part):
    difference: float
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    tuned: "_Difference | None" = None


class _Baselines(_Part):
    majority: _Score | Share | None = None
    # Of each pooling; or "absent", with the reason.
    untrained: dict[str, _Score | Share | str] = {}
    start: dict[str, _Score | Share | str] = {}  # of a run
    tfidf: _Score | Share | None = None
    bm25: _Score | Share | None = None


class _Record(_Part):
    __pydantic_extra__: dict[str, Any]
    step: Count | None
    task: str
    title: str = ""
    kind: str = kinds.DEFAULT
    status: Annotated[str, Field(min_length=1)] = "done"
    reason: str = ""
    run: str | None = None
    checkpoint: str = ""
    labels: list[str | int] = []
    texts: str = ""
    baselines: _Baselines = _Baselines()
    beyond_start: dict[str, _Difference] = {}
    evidence: dict[str, Bits] = {}
    correct: dict[str, Bits] = {}
    tuned_correct: dict[str, Bits] = {}
    confusion: list[list[Count]] | None = None
    n_train: Count | None = None
    n_test: Count | None = None
    seconds: float | None = None

    @model_validator(mode="after")
    def _scores(self) -> Self:
        for name, value in self.__pydantic_extra__.items():
            if isinstance(value, dict) and self._headline in value:
                if not name.isidentifier():
                    raise ValueError(f"{name!r} is not a pooling")
                _Score.model_validate(value)
                _FIGURE.validate_python(value[self._headline])
        return self

    @property
    def _headline(self) -> str:
        kind = kinds.KINDS.get(self.kind)
        return kind.headline.key if kind else ""


def parse(content: bytes, name: str = "") -> Record:
    """A record from its file's content; its `status`, and the `reason` of one without a result, are filled in.

    Args:
        name: of the file, which says the task and the step.

    Raises:
        ValueError: it is damaged; the message says how.
    """
    found = parse_object(content)
    try:
        checked = _Record.model_validate(found)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ValueError(f"{place}: {fault['msg']}" if place else fault["msg"]) from error
    if name and (match := NAME.fullmatch(name)) and (checked.task, checked.step) != (match["task"], int(match["step"])):
        raise ValueError(f"it is of task {checked.task} and step {checked.step}")
    return found | {"status": checked.status} | ({"reason": checked.reason} if checked.status != "done" else {})
