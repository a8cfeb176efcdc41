"""The first block of a stream is asked for while its worker sets itself up."""

import gc
import threading
import weakref

import pytest

from raybert.data.stream import ahead
from tests.waiting import LONGEST


def test_the_first_block_is_asked_for_at_once_and_the_order_stays():
    asked = threading.Event()

    def blocks():
        asked.set()
        yield from range(5)

    stream = ahead(blocks)
    assert asked.wait(LONGEST)
    assert list(stream) == [0, 1, 2, 3, 4]


def test_no_block_is_kept():
    class Block:
        pass

    stream = ahead(lambda: (Block() for _ in range(3)))
    first = weakref.ref(next(stream))
    assert next(stream)
    gc.collect()
    assert first() is None


def test_a_stream_may_be_empty():
    assert list(ahead(lambda: iter(()))) == []


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_fault_comes_to_whom_reads(after):
    def blocks():
        yield from range(after)
        raise OSError("gone")

    stream, seen = ahead(blocks), []
    with pytest.raises(OSError, match="gone"):
        seen.extend(iter(stream))
    assert list(stream) == []


def test_closing_closes_what_it_reads_from():
    closed = threading.Event()

    def blocks():
        try:
            yield from range(100)
        finally:
            closed.set()

    stream = ahead(blocks)
    assert next(stream) == 0
    stream.close()
    assert closed.is_set()
