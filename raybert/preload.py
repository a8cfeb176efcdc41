"""Importing what is needed next in a thread, while the main thread waits for something else."""

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def preloaded(*modules: str) -> Iterator[None]:
    """Import the modules while the ``with`` block runs; its end waits for them."""

    def work() -> None:
        with suppress(Exception):  # whoever needs the module imports it again, and reports the error
            for module in modules:
                importlib.import_module(module)

    thread = threading.Thread(target=work, name="imports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
