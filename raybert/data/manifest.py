"""What a shard set's manifest must look like: a file from anywhere is either this, or refused with a sentence."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raybert.errors import InputError
from raybert.tokenizer import Tokenizer

FORMAT = "raybert-shards"
VERSION = 1
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


def parse(data: bytes, path: str) -> Manifest:
    """Check the bytes of a manifest; `path` is what errors call it.

    Raises:
        InputError: it is no manifest, of another version, or of data prepared with another tokenizer.
    """
    try:
        tree = json.loads(data)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise InputError(f"{path} is not a manifest of `raybert prepare`.")
        if tree.get("version") != VERSION:
            raise InputError(
                f"{path} has format version {tree.get('version')} and this raybert reads version {VERSION}; "
                "prepare the data again, with --overwrite."
            )
        manifest = Manifest.model_validate(tree)
    except InputError:
        raise
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"{path} is not a manifest of `raybert prepare`: {place}: {fault['msg']}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, it may be cut off or damaged ({error}).") from error
    if manifest.tokenizer.hash != Tokenizer.hash:
        raise InputError(
            f"The data of {path} were prepared with another tokenizer ({manifest.tokenizer.hash[:12]}... instead of "
            f"{Tokenizer.hash[:12]}...); prepare them again."
        )
    return manifest
