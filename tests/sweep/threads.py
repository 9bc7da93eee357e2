"""How many threads the server of a process has; a module of its own, which costs nothing to import."""

import os
from pathlib import Path


def count(sender):
    sender.send(len(list(Path(f"/proc/{os.getppid()}/task").iterdir())))
