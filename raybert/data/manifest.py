"""What a shard set's manifest must look like: a file from anywhere is either this, or refused with a sentence."""

import json
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raybert.errors import InputError
from raybert.tokenizer import GPT2, Tokenizer, Vocabulary

FORMAT = "raybert-shards"
VERSION = 1  # of a set with raybert's own tokenizer
VERSION_ANY = 2  # of a set with any other, whose ids it tells
SHORTEST, LONGEST = 16, 65_535  # of seq_len: room for two sentences; offsets are uint16

Count = Annotated[int, Field(ge=0, lt=2**53)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    # Unknown keys are refused: a manifest that says more than is read here is of another version.
    model_config = ConfigDict(extra="forbid", strict=True)


class ShardEntry(Part):
    # A name, not a path: nothing outside the set's own directory is ever opened.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.parquet$")]
    rows: Count
    tokens: Count
    bytes: Count
    sha256: Digest


class Splits(Part):
    train: list[ShardEntry]
    validation: list[ShardEntry]


class TokenizerEntry(Part):
    name: str
    hash: str


class Ids(Part):
    cls: Count
    sep: Count
    mask: Count
    pad: Count
    unk: Count | None
    drawn: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]


class AnyTokenizer(TokenizerEntry):
    """Of version 2: what batches need to know of the tokenizer, so that they can be made without it."""

    hash: Digest
    size: Annotated[int, Field(ge=5, lt=2**31)]
    ids: Ids

    @model_validator(mode="after")
    def _check(self) -> Self:
        specials = {getattr(self.ids, role) for role in ("cls", "sep", "mask", "pad")}
        ranges = [0, *(edge for pair in self.ids.drawn for edge in pair), self.size]
        empty = any(first >= stop for first, stop in self.ids.drawn)
        drawn = any(first <= special < stop for special in specials for first, stop in self.ids.drawn)
        wrong = not self.ids.drawn or ranges != sorted(ranges) or empty or drawn
        if len(specials) < 4 or max(specials) >= self.size or wrong:
            raise ValueError("the token ids are inconsistent with each other")
        return self


class Manifest(Part):
    format: str
    version: int
    tokenizer: TokenizerEntry
    seq_len: Annotated[int, Field(ge=SHORTEST, le=LONGEST)]
    unit_rows: Annotated[int, Field(ge=1, lt=2**31)]
    settings: dict[str, Any]
    inputs: dict[str, Any]
    counts: dict[str, Any]
    splits: Splits

    def vocabulary(self) -> Vocabulary:
        """The ids of the set's tokenizer."""
        return GPT2


class AnyManifest(Manifest):
    tokenizer: AnyTokenizer

    def vocabulary(self) -> Vocabulary:
        ids = self.tokenizer.ids.model_dump()
        drawn = tuple((first, stop) for first, stop in ids.pop("drawn"))
        return Vocabulary(hash=self.tokenizer.hash, size=self.tokenizer.size, drawn=drawn, **ids)


KINDS: dict[int, type[Manifest]] = {VERSION: Manifest, VERSION_ANY: AnyManifest}


def describe(name: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """The version and the tokenizer as a manifest has them."""
    entry: dict[str, Any] = {"name": name, "hash": vocabulary.hash}
    if vocabulary == GPT2:
        return {"version": VERSION, "tokenizer": entry}
    ids = {role: getattr(vocabulary, role) for role in ("cls", "sep", "mask", "pad", "unk")}
    drawn = [list(part) for part in vocabulary.drawn]
    return {"version": VERSION_ANY, "tokenizer": entry | {"size": vocabulary.size, "ids": {**ids, "drawn": drawn}}}


def parse(data: bytes, path: str) -> Manifest:
    """Check the bytes of a manifest; `path` is what errors call it.

    Raises:
        InputError: it is not a manifest, has another version, or its data was prepared with an older tokenizer.
    """
    try:
        tree = json.loads(data)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise InputError(f"{path} is not a manifest of `raybert prepare`.")
        kind = next((kind for number, kind in KINDS.items() if tree.get("version") == number), None)
        if kind is None:
            raise InputError(
                f"{path} has format version {tree.get('version')}, but this raybert reads versions {VERSION} and "
                f"{VERSION_ANY}; prepare the data again, with --overwrite."
            )
        manifest = kind.model_validate(tree)
    except InputError:
        raise
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"{path} is not a manifest of `raybert prepare`: {place}: {fault['msg']}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); it may be truncated or damaged.") from error
    if manifest.version == VERSION and manifest.tokenizer.hash != Tokenizer.hash:
        raise InputError(
            f"The data of {path} was prepared with another tokenizer ({manifest.tokenizer.hash[:12]}... instead "
            f"of {Tokenizer.hash[:12]}...); prepare it again."
        )
    return manifest
