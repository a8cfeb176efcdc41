"""The Ray cluster: reaching it, what it can grow to, and how its CPUs are shared."""

from raybert.cluster.connection import (
    LIMITS,
    MARKET_TYPE,
    OFF_SPOT,
    connect,
    find,
    largest_resources,
    launch,
    limits_of,
    start,
    stated_limits,
)
from raybert.cluster.shares import SMALL_SHARE, Shares, plan_shares

__all__ = [
    "LIMITS",
    "MARKET_TYPE",
    "OFF_SPOT",
    "SMALL_SHARE",
    "Shares",
    "connect",
    "find",
    "largest_resources",
    "launch",
    "limits_of",
    "plan_shares",
    "start",
    "stated_limits",
]
