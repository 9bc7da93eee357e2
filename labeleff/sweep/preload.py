"""Imported once by the server that runs are forked from: everything slow, nothing that starts a thread."""

__all__: list[str] = []
