"""What decides how text becomes shards, checked before anything is read."""

from dataclasses import dataclass
from typing import Any

from raybert.data.manifest import LONGEST, SHORTEST
from raybert.data.text.documents import SPLIT_TXT
from raybert.data.text.held_out import fingerprint
from raybert.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a shard set.

    Args:
        seq_len: tokens of a training sample; a window holds at most ``seq_len - 3``.
        text_column: column or key that holds a document's text.
        validation_fraction: share of the documents that go, by their hash, to the validation split.
        shard_tokens: a shard holds at most about this many tokens, and a task in the second phase a shard.
        unit_rows: windows that are read, and shuffled, together.
        max_bad_fraction: share of documents that may be undecodable, empty or of a wrong type.
        held_out: digests of documents to leave out (`raybert.data.text.held_out`), such as a probe's test texts.
        split_txt: where a document of a text file ends: ``blank-lines`` or ``lines``; by default with the file.

    Raises:
        InputError: a value is out of its range.
    """

    seq_len: int
    text_column: str = "text"
    validation_fraction: float = 0.01
    shard_tokens: int = 32 << 20
    unit_rows: int = 512
    max_bad_fraction: float = 0.01
    split_txt: str = ""
    held_out: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not SHORTEST <= self.seq_len <= LONGEST:
            raise InputError(f"--seq-len must be between {SHORTEST} and {LONGEST}, not {self.seq_len}.")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(
                f"--validation-fraction must be at least 0 and less than 1, not {self.validation_fraction}."
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise InputError(f"--max-bad-fraction must be between 0 and 1, not {self.max_bad_fraction}.")
        if self.split_txt not in ("", *SPLIT_TXT):
            raise InputError(f"--split-txt must be one of {', '.join(SPLIT_TXT)}, not {self.split_txt}.")
        if self.unit_rows < 2 or self.shard_tokens < 1:
            raise InputError("A unit must have at least 2 rows and a shard at least 1 token.")

    def in_manifest(self) -> dict[str, Any]:
        """What the manifest records, and what a set that is already there is compared by."""
        # What came later is left out where it is not used: sets that were made before lack it.
        held_out = {"texts": len(self.held_out), "hash": fingerprint(self.held_out)}
        settings = {
            "text_column": self.text_column,
            "validation_fraction": self.validation_fraction,
            "shard_tokens": self.shard_tokens,
            **({"split_txt": self.split_txt} if self.split_txt else {}),
            **({"held_out": held_out} if self.held_out else {}),
        }
        return {"seq_len": self.seq_len, "unit_rows": self.unit_rows, "settings": settings}
