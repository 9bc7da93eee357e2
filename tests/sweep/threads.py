"""What the server of a process is; a module of its own, which costs nothing to import."""

import os
import sys
from pathlib import Path


def count(sender):
    """Send how many threads the server has, and whether it has imported what a run needs."""
    sender.send((len(list(Path(f"/proc/{os.getppid()}/task").iterdir())), "labeleff.runner" in sys.modules))
