"""Workers take equal shares of the connections.

All workers accept from one socket. Left alone, the first that wakes takes everything that waits there: a client with a
pool of eight connections then talks to one worker, and the other cores idle for as long as the pool lives.

So each worker tells in a small shared file how many connections it has, and one that has more than another leaves the
socket alone for a millisecond, now and then. Nothing depends on the others' doing their part: what still waits after a
few times is taken by whoever is there, so no connection waits for a worker that has died, hangs or is being replaced.
(Sockets with SO_REUSEPORT, one for each worker, do not give that: the kernel deals connections by a hash of their
addresses, and those that it has dealt to a worker that hangs wait until it is replaced.)

The price: a connection taken here costs 60 to 100 us more than one that uvloop takes by itself, which only clients
notice that open one for each request.

uvicorn takes both halves by name: `SharingLoop` as its loop, `SharingProtocol` as its HTTP protocol.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvloop

from service.overload import RefusingProtocol

log = logging.getLogger(__name__)

FILE: Final = "UPNEXT_SHARES_FILE"
"""Environment variable by which the launcher tells its workers of the shared file."""
STEP: Final = 0.001
PATIENCE: Final = 10
"""How often in a row a worker leaves what waits to others, `STEP` seconds each time."""
PASSES: Final = 50
"""How often a second it does so at all. With clients that open a connection for each request there is always somebody
who has more; sharing is not worth the waiting there, and this many steps are at most a twentieth of the time."""
BEAT: Final = 0.1
ABSENT: Final = 0.5
"""Seconds after which a worker that has said nothing counts no more; it says something each `BEAT`."""
OUT_OF_FILES: Final = 1.0
"""Seconds without a new connection, when the process may not open more files."""
NOT_YET: Final = -1.0
_ROWS: Final = 256  # four times as many as there can be workers
_ROW: Final = 16  # bytes


class Shares:
    """How many connections each worker has: rows of (when it last said something, connections) in a file they map."""

    def __init__(self, path: Path) -> None:
        # Kept open: a worker owns its row by a lock, which the kernel takes back however the worker ends.
        self._file = path.open("r+b")
        self._file.truncate(_ROWS * _ROW)
        self._cells = memoryview(mmap.mmap(self._file.fileno(), _ROWS * _ROW)).cast("d")
        self._mine = next(row for row in range(0, len(self._cells), 2) if self._own(row))
        self._cells[self._mine], self._cells[self._mine + 1] = NOT_YET, 0

    def _own(self, row: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, _ROW, row * _ROW // 2)
        except OSError:
            return False
        return True

    def beat(self) -> None:
        """Say that this worker is there."""
        self._cells[self._mine] = time.monotonic()

    def add(self, count: int) -> None:
        """Count connections that came, or (below 0) went."""
        self._cells[self._mine + 1] += count

    def due(self, opening: int) -> bool:
        """Whether the next connection is this worker's: no other has fewer, or not by much where there are many.

        `opening`: connections that it has taken and not counted yet.
        """
        mine = self._cells[self._mine + 1] + opening
        fewest = mine
        for row in range(0, len(self._cells), 2):
            if not self._cells[row]:
                break  # no row behind was ever taken
            if row != self._mine and not self._absent(row):
                fewest = min(fewest, self._cells[row + 1])
        return mine - mine // 8 <= fewest

    def _absent(self, row: int) -> bool:
        return self._cells[row] < time.monotonic() - ABSENT


class SharingLoop(uvloop.Loop):
    """An event loop whose servers on a given socket take their share of its connections, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = Shares(Path(os.environ[FILE]))

    async def create_server(  # type: ignore[override]  # of its many forms, the one that uvicorn uses for workers
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        *,
        sock: socket.socket,
        backlog: int,
        ssl: ssl.SSLContext | None = None,
    ) -> asyncio.AbstractServer:
        """Accept connections on `sock`, which other processes listen on too."""
        return Listener(self, protocol_factory, sock, backlog, ssl)


class Listener(asyncio.AbstractServer):
    """Takes connections one by one, each when it is this worker's turn."""

    def __init__(
        self,
        loop: SharingLoop,
        factory: Callable[[], asyncio.BaseProtocol],
        sock: socket.socket,
        backlog: int,
        tls: ssl.SSLContext | None,
    ) -> None:
        self.loop, self.factory, self.sock, self.tls = loop, factory, sock, tls
        self.shares = loop.shares
        self.passes, self.passes_at = float(PASSES), loop.time()
        self.passed = 0  # times in a row that a connection was left to others
        self.opening: set[asyncio.Task[Any]] = set()  # connections that were taken and have no protocol yet
        self.timer: asyncio.TimerHandle | None = None  # set while the socket is left alone
        self.waiting = select.poll()
        self.waiting.register(sock, select.POLLIN)
        sock.setblocking(False)
        sock.listen(backlog)
        self._beat()
        loop.add_reader(sock, self._take)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that it runs on."""
        return self.loop

    def is_serving(self) -> bool:
        """Whether it takes connections."""
        return not self.beating.cancelled()

    async def start_serving(self) -> None:
        """Nothing to do: it serves from the first moment on."""

    async def serve_forever(self) -> None:
        """Serve until this is cancelled."""
        await self.loop.create_future()

    def close(self) -> None:
        """Take no more connections."""
        self.loop.remove_reader(self.sock)
        self.beating.cancel()
        if self.timer is not None:
            self.timer.cancel()

    async def wait_closed(self) -> None:
        """Nothing is left to wait for: uvicorn waits for the connections itself."""

    def _beat(self) -> None:
        self.shares.beat()
        self.beating = self.loop.call_later(BEAT, self._beat)

    def _take(self) -> None:
        """Connections wait: take them one by one, until it is the turn of a worker that has fewer."""
        while self.passed == PATIENCE or self.shares.due(len(self.opening)) or not self._may_pass():
            self.passed = 0
            try:
                connection, _ = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return  # somebody else took it, or its client has gone
            except OSError as error:
                log.error("no connection can be accepted: %s", error)
                self._pause(OUT_OF_FILES)
                return
            connection.setblocking(False)
            task = self.loop.create_task(self._open(connection))
            self.opening.add(task)
            task.add_done_callback(self.opening.discard)
        self.passed += 1
        self._pause(STEP)

    def _may_pass(self) -> bool:
        """Take one of the passes that this worker has left, if there is one."""
        now = self.loop.time()
        self.passes = min(PASSES, self.passes + (now - self.passes_at) * PASSES)
        self.passes_at = now
        if self.passes < 1:
            return False
        self.passes -= 1
        return True

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(self.factory, connection, ssl=self.tls)
        except OSError as error:  # with TLS: no handshake
            log.info("a connection came to nothing: %s", error)
            connection.close()

    def _pause(self, seconds: float) -> None:
        self.loop.remove_reader(self.sock)
        self.timer = self.loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self.timer = None
        if not self.waiting.poll(0):
            self.passed = 0  # somebody took it; the next one is another
        self.loop.add_reader(self.sock, self._take)


class SharingProtocol(RefusingProtocol):
    """The HTTP protocol, on a `SharingLoop`; its connections count."""

    loop: SharingLoop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        self.loop.shares.add(1)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """A client is gone."""
        self.loop.shares.add(-1)
        super().connection_lost(exc)
