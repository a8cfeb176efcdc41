"""Probes: how much of what a text is about can be read off an encoder's vectors."""
