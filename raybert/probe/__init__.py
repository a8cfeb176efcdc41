"""Probes: how much of what a text is about can be read off an encoder's vectors."""

# How the vectors of a text's tokens become one vector; every probe record has all of them.
POOLINGS = ("pooler", "cls", "mean")
