"""Memory of a process that swaps large things for a long time: collected at the right moment, and given back.

Nothing here is needed for right answers; where the C library is not glibc, its part does nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

LARGE: Final = 1 << 18
"""Bytes from which on a block has pages of its own. Above most of what a request needs at a time, since new pages cost,
and below a small catalogue's table of vectors, which comes and goes with each bundle: 3,700 of width 64 are 947 kB."""

_NEVER: Final = 1 << 30  # collections of the middle generation
_OPTIONS: Final = (("MALLOC_ARENA_MAX", -8, 1), ("MALLOC_MMAP_THRESHOLD_", -3, LARGE))
"""As glibc's environment has it, as <malloc.h> has it for `mallopt`, and the value."""
_LIBC: Final = ctypes.CDLL(None)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector of garbage away from what is made here, now and later.

    It would look through everything again and again, each time holding up every request: 0.1 s for the application
    alone. Nothing of a bundle is in a cycle, so it goes when the bundle goes.

    What other threads make meanwhile is not kept from it: garbage that is frozen with the rest would stay for good. So
    there is a collection before, when there is little to look through, and while the block runs young objects alone
    are looked through, once or twice each.
    """
    gc.collect()
    usual = gc.get_threshold()
    gc.set_threshold(usual[0], usual[1], _NEVER)
    try:
        yield
    finally:
        gc.collect(1)
        gc.freeze()
        gc.set_threshold(*usual)


def settle_allocator() -> None:
    """Have glibc keep little of what is freed: here, where there must be no threads yet, and in processes to come.

    Those are told by their environment: in a worker uvicorn starts a thread before anything of ours runs.

    One arena: otherwise each thread has its own, what one of them frees no other one uses, and bundles are loaded on
    whichever thread is free. With the interpreter's lock there is next to nobody who would have to wait for it.

    Blocks of LARGE bytes and more go back to the system when they are freed, each by itself. Otherwise glibc, once it
    has seen such a block freed, puts the next ones among the small ones. There they leave holes: a worker that swapped
    bundles under load grew by some megabytes with each of the first ten swaps.
    """
    for variable, option, value in _OPTIONS:
        os.environ[variable] = str(value)
        if hasattr(_LIBC, "mallopt"):
            _LIBC.mallopt(option, value)


def trim() -> None:
    """Give freed memory back to the system."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
