"""Texts that must not be trained on, since a probe will judge by them: known by hash, whatever their white space."""

import hashlib
from collections.abc import Iterable


def digest(text: str) -> int:
    """64 bits of a text; runs of white space count as one space."""
    words = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def digests(texts: Iterable[str]) -> frozenset[int]:
    return frozenset(map(digest, texts))


def fingerprint(held_out: frozenset[int]) -> str:
    """Of a whole set, whatever its order."""
    return hashlib.sha256(repr(sorted(held_out)).encode()).hexdigest()
