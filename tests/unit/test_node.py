"""A node that leaves in good order, without a cluster."""

from raybert.node import _joined


def test_both_spellings_of_an_option_are_read():
    given = ["--address", "10.0.0.1:6379", "--num-cpus", "4", "--labels", "a=b", "--block"]
    assert _joined(given) == ["--address=10.0.0.1:6379", "--num-cpus", "4", "--labels=a=b", "--block"]
    assert _joined(["--address=x:1", "--labels=a=b"]) == ["--address=x:1", "--labels=a=b"]
