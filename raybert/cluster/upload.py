"""What a job uploads of a checkout, measured before it is sent."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePath

from raybert.errors import InputError
from raybert.ray_internals.core import packed_files

# Bytes of a checkout that the dashboard takes, whatever the cluster's settings are (Ray's DASHBOARD_CLIENT_MAX_SIZE).
LARGEST_UPLOAD = 100 * 2**20


def require_small(directory: str) -> None:
    """
    Raises:
        InputError: what Ray would upload of the directory is more than it takes, or a part of it cannot be read.
    """
    try:
        sizes = _upload_sizes(directory)
    except OSError as error:
        raise InputError(
            f"{error.filename or directory} cannot be packed for the job: {error.strerror or error}; make it "
            "readable, or list it in .rayignore."
        ) from error
    total = sum(sizes.values())
    if total > LARGEST_UPLOAD:
        largest = [f"{path} ({_megabytes(size)})" for path, size in _largest(sizes, 3)]
        raise InputError(
            f"The job would upload {_megabytes(total)} of {Path(directory).absolute()}, but Ray accepts at most "
            f"{_megabytes(LARGEST_UPLOAD)}. The largest are {', '.join(largest)}: list what the job does not need "
            "in .rayignore, which has the syntax of .gitignore."
        )


def _upload_sizes(directory: str) -> dict[PurePath, int]:
    """Bytes that each file takes in Ray's package of a directory: a zip archive without compression."""
    root = Path(directory).absolute()
    # The name stands in two headers, of 30 and 46 bytes: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
    return {
        path.relative_to(root): path.stat().st_size + 2 * len(os.fsencode(path.relative_to(root))) + 76
        for path in packed_files(root)
    }


def _largest(sizes: Mapping[PurePath, int], count: int) -> list[tuple[str, int]]:
    """The files and directories to look at first. One that is nearly all of its directory is named instead of it."""
    totals: Counter[PurePath] = Counter()
    for path, size in sizes.items():
        for place in (path, *path.parents):
            totals[place] += size
    children: dict[PurePath, list[PurePath]] = defaultdict(list)
    for place in totals:
        if place != place.parent:
            children[place.parent].append(place)
    found = []
    for place in sorted(children[PurePath()], key=lambda place: -totals[place])[:count]:
        while (inner := max(children[place], key=totals.__getitem__, default=place)) != place:
            if totals[inner] < 0.8 * totals[place]:
                break
            place = inner
        found.append((f"{place}/" if children[place] else str(place), totals[place]))
    return found


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
