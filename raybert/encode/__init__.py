"""Texts to vectors, for probes, `Bert.embed` and the embed job alike."""

# How the vectors of a text's tokens become one vector; every probe record has all of them.
POOLINGS = ("pooler", "cls", "mean")
Text = str | tuple[str, str]  # a text, or a pair of them
