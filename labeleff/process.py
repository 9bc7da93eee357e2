"""How a process that trains is set up: threads, exact repetition, and the memory it keeps."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Numbers of glibc's ``mallopt``."""
LARGEST = 32 << 20
"""Bytes; glibc takes no larger threshold for blocks with a mapping of their own."""


def set_up_process(threads: int) -> None:
    """Set the threads of torch, ask it for algorithms that repeat, and keep freed memory.

    Fresh tensors are not filled first, as torch does beside such algorithms by default (2 % of a step on a CPU): nothing
    here reads what it has not written.
    """
    torch.set_num_threads(threads)
    # read when a GPU is first used; without it matrix products differ from run to run
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system, to ask for it again at the next step.

    Maps of a network are large and freed at every step; new pages are zeroed by the kernel, which took 5 to 10 % of a step on
    a CPU. The most that a process holds stays what it was at its peak. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
