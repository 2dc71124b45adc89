"""What a worker process is beyond the application: it stops when its launcher is gone, and says when it cannot start.

A launcher that is killed with -9 stops nobody. Its workers would go on, hold the port against the next launcher, and
nobody would replace them when they die. A worker that dies of an error in what it is made of would die of it again: the
launcher stops instead of starting it for ever.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from typing import Final

from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from service.memory import settle_allocator
from service.settings import Settings

log = logging.getLogger(__name__)

GRACE_SECONDS: Final = 5
"""Beyond `drain_seconds`, for what comes after the last request: the workers' tasks, and closing connections."""


def create_app() -> FastAPI:
    """The application, for uvicorn to call in each worker."""
    settle_allocator()
    settings = Settings()
    launcher = multiprocessing.parent_process()
    if launcher is not None:  # a single worker has no process of its own: it is the launcher
        wait = threading.Thread(target=_outlive, args=(launcher, settings.drain_seconds), daemon=True)
        wait.start()
    try:
        from service import main  # noqa: PLC0415 - an import that fails is such an error, too

        return main.create_app(settings)
    except Exception:
        log.exception("this worker cannot start")
        sys.exit(STARTUP_FAILURE)


def _outlive(launcher: BaseProcess, drain_seconds: int) -> None:
    """Wait for the launcher's end, then end in order, as after SIGTERM; at once when that does not work.

    Unlike PR_SET_PDEATHSIG, the pipe that `join` waits for cannot miss a launcher that died before anybody asked.
    """
    launcher.join()
    log.error("the launcher is gone, so this worker stops")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(drain_seconds + GRACE_SECONDS)
    os._exit(1)
