"""Models on the Hugging Face Hub: files of one, by its name, where there is a network."""

import os
import re
from collections.abc import Sequence

from raybert.errors import InputError, one_line

# What a name may be: bert-base-uncased, or USER/NAME.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_name(where: str) -> bool:
    """Whether it can only be a name on the Hub: no file or directory lies there."""
    return bool(_NAME.fullmatch(where)) and not os.path.exists(where)


def local(where: str, files: Sequence[str]) -> str:
    """A local directory with these files of the model (those that it has); any other place as it is.

    Raises:
        InputError: there is no such directory, and the Hub has no such model or cannot be reached.
    """
    if not is_name(where):
        return where
    none = f"There is no directory {where}, and a model of that name on the Hugging Face Hub"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(f"{none} needs: pip install 'raybert[hub]'.") from error
    try:
        return str(snapshot_download(where, allow_patterns=list(files)))
    except Exception as error:  # of the network, of the Hub, of a wrong name
        raise InputError(
            f"{none} cannot be fetched ({one_line(error)[:200]}); give a directory that exists, or connect to the "
            "network."
        ) from error
