"""What a worker process is beyond the application: it stops when its launcher is gone, it stops in time whatever hangs,
and it says when it cannot start.

A launcher that is killed with -9 stops nobody. Its workers would go on, hold the port against the next launcher, and
nobody would replace them when they die. A worker that is told to stop would wait for whatever hangs, for ever: after a
set time it is gone, and nothing is lost by that, for events are acknowledged after their commit. A worker that dies of
an error in what it is made of would die of it again: the launcher stops instead of starting it for ever.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from types import FrameType
from typing import Any

from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from service.settings import GRACE_SECONDS, Settings

log = logging.getLogger(__name__)


def create_app() -> FastAPI:
    """The application, for uvicorn to call in each worker."""
    settings = Settings()
    told = _stop_in_time(settings.drain_seconds + GRACE_SECONDS)
    launcher = multiprocessing.parent_process()
    if launcher is not None:  # a single worker has no process of its own: it is the launcher
        threading.Thread(target=_outlive, args=(launcher, told), daemon=True).start()
    try:
        from service import main  # noqa: PLC0415 - an import that fails is such an error, too

        return main.create_app(settings)
    except Exception:
        log.exception("this worker cannot start")
        sys.exit(STARTUP_FAILURE)


def _stop_in_time(seconds: int) -> SimpleQueue[int]:
    """Have SIGTERM and SIGINT also start the time after which the process ends, whatever it waits for then.

    The queue that is returned takes the number of such a signal from whoever sends it.
    """
    told: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_end, args=(seconds, told), daemon=True).start()
    if threading.current_thread() is threading.main_thread():  # nobody else may handle signals
        for number in (signal.SIGTERM, signal.SIGINT):
            former = signal.getsignal(number)
            if callable(former):  # uvicorn's: the application is made after it has put in its own
                signal.signal(number, partial(_tell, told, former))
    return told


def _tell(told: SimpleQueue[int], former: Callable[[int, FrameType | None], object], number: int, frame: Any) -> None:
    told.put(number)  # of all queues and events, the one that a signal may use whatever it interrupts
    former(number, frame)


def _end(seconds: int, told: SimpleQueue[int]) -> None:
    """Not a task: it is the event loop, or what closes it, that may hang."""
    told.get()
    time.sleep(seconds)
    log.error("something still hangs %d s after this worker was told to stop, so it ends at once", seconds)
    os._exit(1)


def _outlive(launcher: BaseProcess, told: SimpleQueue[int]) -> None:
    """Wait for the launcher's end, then end in order, as after SIGTERM; in time also where no signal is heard.

    Unlike PR_SET_PDEATHSIG, the pipe that `join` waits for cannot miss a launcher that died before anybody asked.
    """
    launcher.join()
    log.error("the launcher is gone, so this worker stops")
    told.put(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
