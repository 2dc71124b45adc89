"""`python -m service` as a person starts it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from service.__main__ import migrate_if_there, misspelt
from service.redis_child import RedisMissing, _answers, find_redis, start_redis
from service.settings import Settings
from shared.database import create_engine, events
from tests.faults import fault
from tests.servers import PostgresServer, RedisServer, free_port, refusal
from tests.serving import ids_of, running, value_of
from tests.worlds import cyclic, write_bundle

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service", *arguments]


def environment(folder: Path, **settings: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UPNEXT_", "PROMETHEUS_"))}
    chosen = {f"UPNEXT_{name.upper()}": str(value) for name, value in settings.items()}
    return kept | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)} | chosen


@contextmanager
def launched(folder: Path, port: int, **settings: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(), cwd=folder, env=environment(folder, port=port, **settings), stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        left = descendants(process.pid)  # a launcher that is killed cannot stop its workers
        process.kill()
        process.wait()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.stderr:
            process.stderr.close()


def workers_of(pid: int) -> list[int]:
    """The worker processes of a launcher."""
    return [p for p in descendants(pid) if b"spawn_main" in (Path(f"/proc/{p}/cmdline").read_bytes())]


def until_alive(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if client.get("/livez").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("not alive after 60 s")


def wait_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("not ready after 60 s")


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc."""
    children = [int(p) for f in Path(f"/proc/{pid}/task").glob("*/children") for p in f.read_text().split()]
    return [pid for child in children for pid in (child, *descendants(child))]


def gone(pids: list[int], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")  # short: the path of a unix socket has 107 bytes at most


def answers_counted(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("upnext_recommendations_total{"))


def extra_arenas(pid: int) -> int:
    """How many arenas glibc has in a process beside the first: 64 MiB at a multiple of that, part of them in use."""
    maps, whole = Path(f"/proc/{pid}/maps"), 64 << 20
    if not maps.exists():
        return 0
    regions = [re.split(r"[- ]", line, maxsplit=2) for line in maps.read_text().splitlines()]
    found = [(int(start, 16), int(end, 16), kind[:4]) for start, end, kind in regions]
    return sum(
        (used, free) == ("rw-p", "---p") and start % whole == 0 and (middle, end) == (below, start + whole)
        for (start, middle, used), (below, end, free) in pairwise(found)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "how"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_starts_serves_and_stops_everything(folder: Path, workers: int, how: signal.Signals) -> None:
    write_bundle(folder / "bundles", cyclic())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    one_each = httpx.Limits(max_keepalive_connections=0)  # so that requests spread over the workers
    with launched(folder, port, workers=workers) as process, httpx.Client(base_url=url, limits=one_each) as client:
        wait_ready(client)
        event = {"user_id": "u", "item_id": "3", "event_type": "view"}
        assert client.post("/events", json=event).status_code == 200
        for _ in range(6):
            answer = client.get("/recommend/u?n=1").json()
            assert answer["items"][0]["item_id"] == "4"
        deadline = time.monotonic() + 60
        while answers_counted(client) < 6:  # of all workers together, once each has told
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert answers_counted(client) == 6
        taken = subprocess.run(
            command(), cwd=folder, env=environment(folder, port=port), capture_output=True, text=True, check=False
        )
        assert taken.returncode == 1
        assert "UPNEXT_PORT" in taken.stderr
        assert "Traceback" not in taken.stderr
        below = descendants(process.pid)
        assert len(below) >= 3  # the keeper, its loop and its Redis
        for worker in [process.pid] if workers == 1 else workers_of(process.pid):
            assert extra_arenas(worker) == 0
        process.send_signal(how)
        assert process.wait(timeout=120) == 0
        assert gone(below)
        assert process.stderr is not None
        said = process.stderr.read()
    assert f"{url}/docs" in said
    assert "2000-03-01T00-00-00Z-test" in said
    assert said.splitlines()[-1] == "Stopped."
    assert list(folder.glob("upnext-*")) == []


@pytest.mark.slow
def test_sigterm_lets_requests_end_and_waits_no_longer_than_it_was_told(folder: Path) -> None:
    write_bundle(folder / "bundles", cyclic())
    port = free_port()
    body = b'{"user_id": "u", "item_id": "3", "event_type": "view"}'
    head = "POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    here = ("127.0.0.1", port)
    with launched(folder, port, drain_seconds=5) as process:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_ready(client)
        with socket.create_connection(here, 60) as ending, socket.create_connection(here, 60) as endless:
            for connection in (ending, endless):
                connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:9])
            time.sleep(0.5)  # both are in hand
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            ending.sendall(body[9:])
            assert ending.recv(65536).startswith(b"HTTP/1.1 200")
            assert process.wait(timeout=60) == 0  # though the other request never ends


@fault("The launcher is killed")
@pytest.mark.slow
def test_workers_stop_in_order_when_the_launcher_is_killed(folder: Path) -> None:
    write_bundle(folder / "bundles", cyclic())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    body = b'{"user_id": "u", "item_id": "4", "event_type": "view"}'
    head = f"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with launched(folder, port, workers=2) as process, httpx.Client(base_url=url) as client:
        wait_ready(client)
        assert client.post("/events", json={"user_id": "u", "item_id": "3", "event_type": "view"}).status_code == 200
        below = descendants(process.pid)
        assert len(workers_of(process.pid)) == 2
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            connection.sendall(f"{head}\r\n\r\n".encode() + body[:9])
            time.sleep(0.5)  # it is in hand
            process.kill()
            process.wait()
            time.sleep(0.5)
            connection.sendall(body[9:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert gone(below)
    with launched(folder, port), httpx.Client(base_url=url) as client:  # on the same port
        wait_ready(client)
        assert [event["item_id"] for event in client.get("/users/u/history").json()["events"]] == ["3", "4"]


@pytest.mark.slow
def test_a_worker_whose_requests_never_end_outlives_its_launcher_by_a_set_time(folder: Path) -> None:
    write_bundle(folder / "bundles", cyclic())
    port = free_port()
    with launched(folder, port, workers=2, drain_seconds=1) as process:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_ready(client)
        below = descendants(process.pid)
        with socket.create_connection(("127.0.0.1", port), 60) as endless:
            endless.sendall(b"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.5)
            process.kill()
            process.wait()
            assert gone(below)


def connections_of(pid: int, port: int) -> int:
    """How many connections to `port` a process has accepted."""
    here = f":{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(here) and row[3] == "01"}
    found = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found += str(file.readlink()) in established
    return found


def spread(launcher: int, port: int) -> list[int]:
    return [connections_of(pid, port) for pid in workers_of(launcher)]


def connect(stack: ExitStack, port: int, count: int) -> list[socket.socket]:
    """So many connections at once."""
    clients = []
    for _ in range(count):
        client = stack.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        clients.append(client)
    return clients


def until_spread(launcher: int, port: int, count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while sum(found := spread(launcher, port)) != count:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def until_both_listen(launcher: int, port: int) -> None:
    deadline = time.monotonic() + 60
    before = sum(spread(launcher, port))
    with ExitStack() as stack:
        while len(found := spread(launcher, port)) < 2 or not min(found):
            assert time.monotonic() < deadline, found
            connect(stack, port, 1)
            time.sleep(0.1)
    until_spread(launcher, port, before)


def answers(client: socket.socket) -> bool:
    client.settimeout(60)
    client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client.recv(65536).startswith(b"HTTP/1.1 200")


def answers_or_ends(client: socket.socket) -> bool:
    with suppress(ConnectionError):
        return answers(client)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks into /proc")
def test_workers_take_equal_shares_of_the_connections(folder: Path) -> None:
    write_bundle(folder / "bundles", cyclic())
    port = free_port()
    with (
        launched(folder, port, workers=2) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Connection": "close"}) as client,
    ):
        wait_ready(client)
        until_both_listen(process.pid, port)
        rounds = []
        for _ in range(5):
            until_spread(process.pid, port, 0)
            with ExitStack() as stack:
                clients = connect(stack, port, 16)
                rounds.append(min(until_spread(process.pid, port, 16)))
                assert all(map(answers, clients))
        assert sorted(rounds)[2] >= 6, rounds  # a busy machine may hold one worker up for a while
        # One by one they are shared as well, though each time the same worker might wake first.
        with ExitStack() as stack:
            for count in range(1, 9):
                connect(stack, port, 1)
                found = until_spread(process.pid, port, count)
            assert min(found) >= 3, found


def client_of_each(stack: ExitStack, launcher: int, port: int) -> list[httpx.Client]:
    """For each of two workers a client with a connection to it."""
    until_both_listen(launcher, port)
    found: dict[int, httpx.Client] = {}
    deadline = time.monotonic() + 60
    while len(found) < 2:
        assert time.monotonic() < deadline, found
        before = {pid: connections_of(pid, port) for pid in workers_of(launcher)}
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}"))
        assert client.get("/livez").status_code == 200
        (pid,) = (pid for pid, count in before.items() if connections_of(pid, port) > count)
        found.setdefault(pid, client)
    return list(found.values())


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks into /proc")
def test_items_in_answers_are_counted_over_all_workers(folder: Path) -> None:
    write_bundle(folder / "bundles", cyclic(10))
    port = free_port()
    with launched(folder, port, workers=2, bundle_poll_seconds=0.1) as process, ExitStack() as stack:
        one, other = client_of_each(stack, process.pid, port)
        wait_ready(one)
        wait_ready(other)

        def covered() -> set[float]:
            return {counted(client, "upnext_answer_coverage_ratio") for client in (one, other)}

        assert ids_of(one.get("/items/1/similar?n=2").json()) == ["2", "3"]
        until(lambda: covered() == {0.2})
        assert ids_of(other.post("/recommend", json={"history": ["2"], "n": 3}).json()) == ["3", "4", "5"]
        until(lambda: covered() == {0.4})
        write_bundle(folder / "bundles", cyclic(10), version="2000-03-02")
        until(lambda: covered() == {0.0})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks into /proc")
def test_all_workers_and_replicas_follow_a_change_of_the_catalogue(folder: Path, redis_server: RedisServer) -> None:
    write_bundle(folder / "bundles", cyclic())
    port, another = free_port(), free_port()
    shared = {"redis_url": redis_server.url, "database_url": f"sqlite:///{folder / 'log.db'}"}
    with (
        launched(folder, port, workers=2, **shared) as process,
        ExitStack() as stack,
    ):
        one, other = client_of_each(stack, process.pid, port)
        stack.enter_context(launched(folder, another, **shared))
        replica = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{another}"))
        everybody = (one, other, replica)
        for client in everybody:
            wait_ready(client)

        def best() -> set[str]:
            question = {"history": ["3"], "n": 1}
            return {i for c in everybody for i in ids_of(c.post("/recommend", json=question).json())}

        assert best() == {"4"}
        for step, client in enumerate(everybody):
            item = str(4 + step)
            assert client.delete(f"/items/{item}").status_code == 200
            until(lambda: best() == {str(5 + step)})  # noqa: B023 - called before the next step
        for step, client in enumerate(everybody):
            item = str(6 - step)
            assert client.put(f"/items/{item}", json={"withdrawn": False}).status_code == 200
            until(lambda: best() == {item})  # noqa: B023


@fault("A worker hangs")
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks into /proc")
def test_a_worker_that_hangs_keeps_nobody_waiting_and_is_replaced(folder: Path) -> None:
    write_bundle(folder / "bundles", cyclic())
    port = free_port()
    with (
        launched(folder, port, workers=2) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Connection": "close"}) as client,
        ExitStack() as stack,
    ):
        wait_ready(client)
        until_both_listen(process.pid, port)
        idle = connect(stack, port, 8)
        shares = until_spread(process.pid, port, 8)
        assert min(shares) >= 2, shares
        hung, other = workers_of(process.pid)
        os.kill(hung, signal.SIGSTOP)
        assert all(map(answers, connect(stack, port, 12)))
        assert gone([hung])
        deadline = time.monotonic() + 60
        while len(workers_of(process.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # The new worker has no connections yet: it gets more of what comes, until it has as many as the other.
        until_both_listen(process.pid, port)
        (new,) = set(workers_of(process.pid)) - {other}
        until_spread(process.pid, port, shares[1])
        clients = connect(stack, port, 8 + shares[1])
        until_spread(process.pid, port, 8 + 2 * shares[1])
        assert connections_of(new, port) >= 2 + shares[1]
        assert all(map(answers, clients))
        assert sum(map(answers_or_ends, idle)) == shares[1]
        assert counted(client, "upnext_worker_starts_total") == 3


DATABASE_FAILURES = 'upnext_dependency_failures_total{dependency="database"}'


def counted(client: httpx.Client, series: str) -> float:
    """What all workers together say of a series now."""
    return value_of(client.get("/metrics").text, series)


BROKEN = """
import sys
sys.modules["service.recommend"] = None  # whoever imports it, and only workers do, gets an ImportError
"""


@fault("A worker cannot start")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_cannot_start_ends_the_launcher_with_an_error(folder: Path, workers: int) -> None:
    """Not a loop of starts: whoever runs the service must see it."""
    (folder / "sitecustomize.py").write_text(BROKEN)
    done = subprocess.run(
        command(),
        cwd=folder,
        env=environment(folder, port=free_port(), workers=workers) | {"PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0, done.stderr
    assert "this worker cannot start" in done.stderr
    assert "service.recommend" in done.stderr


@fault("The database cannot be reached at the start")
@pytest.mark.slow
def test_starts_without_its_database_and_serves_when_it_comes(folder: Path, postgresql: PostgresServer) -> None:
    write_bundle(folder / "bundles", cyclic())
    url = asyncio.run(postgresql.new_database())
    port, there = free_port(), folder / ".s.PGSQL.5432"
    elsewhere = re.sub(r"host=[^&]*", f"host={folder}", url)
    with (
        launched(folder, port, database_url=elsewhere) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        until_alive(client)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["catalogue"]) == (503, "the database cannot be read")
        event = {"user_id": "u", "item_id": "3", "event_type": "view"}
        refused = client.post("/events", json=event)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        asked = client.get("/recommend/u")
        assert (asked.status_code, asked.json()["type"].rsplit(":", 1)[1]) == (503, "catalogue_unavailable")
        assert counted(client, DATABASE_FAILURES) > 0
        done = subprocess.run(
            command("migrate"), cwd=folder, env=environment(folder, database_url=url), capture_output=True, check=False
        )
        assert done.returncode == 0
        there.symlink_to(postgresql.socket)
        wait_ready(client)
        assert client.post("/events", json=event).status_code == 200
        assert client.get("/recommend/u?n=1").json()["items"][0]["item_id"] == "4"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server to which one can connect, and which never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:  # the kernel accepts
        yield f"postgresql://user:word@127.0.0.1:{listening.getsockname()[1]}/base"


@fault("The database hangs at the start")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_starts_though_its_database_says_nothing(folder: Path, silent: str, workers: int) -> None:
    write_bundle(folder / "bundles", cyclic())
    port = free_port()
    with (
        launched(folder, port, database_url=silent, workers=workers) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        until_alive(client)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["catalogue"]) == (503, "the database cannot be read")
        assert client.get("/recommend/u").status_code == 503
        event = {"user_id": "u", "item_id": "3", "event_type": "view"}
        refused = client.post("/events", json=event)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert counted(client, DATABASE_FAILURES) > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert "Database cannot be reached (no answer" in process.stderr.read()


async def test_a_worker_by_itself_starts_though_its_database_says_nothing(
    tmp_path: Path, redis_server: RedisServer, silent: str
) -> None:
    async with asyncio.timeout(30):
        async with running(Settings(redis_url=redis_server.url, database_url=silent, bundles=tmp_path)) as upnext:
            assert (await upnext.http.get("/livez")).status_code == 200
            assert (await upnext.http.get("/readyz")).status_code == 503


@contextmanager
def refusing(state: str) -> Iterator[str]:
    """The URL of a PostgreSQL that refuses every connection with this SQLSTATE."""
    reply = refusal(state)

    class Refusal(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(8)  # asks for TLS first
            self.request.sendall(b"N")
            self.request.recv(4096)
            self.request.sendall(reply)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield f"postgresql://user:word@127.0.0.1:{server.server_address[1]}/base"
        server.shutdown()


@pytest.mark.parametrize("state", ["57P03", "53300"])  # it is starting up; it has no connection left
def test_a_database_that_refuses_for_now_does_not_stop_the_start(
    state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with refusing(state) as url:
        migrate_if_there(Settings(database_url=url))
    assert "Database cannot be reached (" in capsys.readouterr().err


def test_a_locked_sqlite_does_not_stop_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = sqlite3.connect(tmp_path / "here.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    migrate_if_there(Settings(database_url=f"sqlite:///{tmp_path / 'here.db'}?timeout=0.1"))
    other.close()
    assert "Database cannot be reached (database is locked)" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["28P01", "3D000"])  # a wrong password; no such database
def test_a_database_that_refuses_for_good_stops_the_start(state: str) -> None:
    with refusing(state) as url, pytest.raises(DBAPIError):
        migrate_if_there(Settings(database_url=url))


def test_a_database_of_a_newer_release_stops_the_start(folder: Path) -> None:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        settings = environment(folder, port=free_port(), database_url="sqlite:///here.db")
        return subprocess.run(
            command(*arguments), cwd=folder, env=settings, capture_output=True, text=True, timeout=60, check=False
        )

    assert start("migrate").returncode == 0
    with closing(sqlite3.connect(folder / "here.db", isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    for done in (start(), start("migrate")):
        assert done.returncode == 1
        assert "9999" in done.stderr
        assert "Traceback" not in done.stderr


@fault("PostgreSQL hangs at SIGTERM")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_stops_though_its_database_hangs(folder: Path, postgresql: PostgresServer, workers: int) -> None:
    write_bundle(folder / "bundles", cyclic())
    url, port = asyncio.run(postgresql.new_database()), free_port()
    body = b'{"user_id": "u", "item_id": "4", "event_type": "view"}'
    head = f"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with (
        launched(folder, port, database_url=url, workers=workers, drain_seconds=1) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        wait_ready(client)
        event = {"user_id": "u", "item_id": "3", "event_type": "view"}
        assert client.post("/events", json=event).status_code == 200
        with ThreadPoolExecutor(16) as threads:  # at once, so that the pools have connections which nobody uses then
            assert {r.status_code for r in threads.map(client.get, ["/users/u/history"] * 64)} == {200}
        below = descendants(process.pid)
        postgresql.freeze()
        try:
            with socket.create_connection(("127.0.0.1", port), 60) as waiting:
                waiting.sendall(f"{head}\r\n\r\n".encode() + body)
                time.sleep(0.5)  # it is in hand
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=60)
            assert gone(below)
        finally:
            postgresql.thaw()
    engine = create_engine(url)

    async def stored() -> list[str]:
        async with engine.connect() as connection:
            found = list(await connection.scalars(select(events.c.item_id).order_by(events.c.seq)))
        await engine.dispose()
        return found

    assert asyncio.run(stored())[:1] == ["3"]  # the other one was never acknowledged


STUCK = """
import asyncio, sys, time
import uvicorn.lifespan.on
async def shutdown(self):
    print("stuck", file=sys.stderr, flush=True)
    time.sleep(3600)  # as a call does into a file system that is gone
uvicorn.lifespan.on.LifespanOn.shutdown = shutdown
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_stops_whatever_hangs(folder: Path, workers: int) -> None:
    (folder / "sitecustomize.py").write_text(STUCK)
    port = free_port()
    chosen = environment(folder, port=port, workers=workers, drain_seconds=1) | {"PYTHONPATH": f"{folder}:{ROOT}"}
    process = subprocess.Popen(command(), cwd=folder, env=chosen, stderr=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            until_alive(client)
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert gone(below)
    assert said.count("stuck") == workers
    assert said.count("something still hangs") == workers


@fault("A worker hangs at SIGTERM")
@pytest.mark.slow
def test_the_launcher_kills_a_worker_that_does_not_hear_it(folder: Path) -> None:
    write_bundle(folder / "bundles", cyclic())
    port = free_port()
    with (
        launched(folder, port, workers=2, drain_seconds=1) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        wait_ready(client)
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        os.kill(workers_of(process.pid)[0], signal.SIGSTOP)
        assert process.wait(timeout=60) == 0
        assert gone(below)


@pytest.mark.slow
def test_redis_does_not_outlive_a_killed_launcher(folder: Path) -> None:
    port = free_port()
    with launched(folder, port) as process:
        until_redis(process.pid)
        below = descendants(process.pid)
        process.kill()
        process.wait()
        assert gone(below)


@fault("The Redis that the launcher started is killed")
@pytest.mark.slow
def test_redis_of_the_launcher_comes_back(folder: Path) -> None:
    write_bundle(folder / "bundles", cyclic())
    port = free_port()
    with launched(folder, port) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        wait_ready(client)
        for item in ("3", "5"):
            event = {"user_id": "u", "item_id": item, "event_type": "view"}
            assert client.post("/events", json=event).status_code == 200
            killed = until_redis(process.pid)
            os.kill(killed, signal.SIGKILL)
            sources: list[str] = []
            deadline = time.monotonic() + 60
            while sources[-2:] != ["cache"] * 2 or until_redis(process.pid) == killed:
                assert time.monotonic() < deadline, sources
                answer = client.get("/recommend/u?n=1").json()
                assert answer["items"][0]["item_id"] == str(int(item) + 1)
                sources.append(answer["history_source"])
                time.sleep(0.05)  # nobody reads the log here, and a pipe does not take much of it
            assert "log" in sources
        assert counted(client, 'upnext_dependency_failures_total{dependency="redis"}') > 0
        below = descendants(process.pid)
        process.kill()
        process.wait()
        assert gone(below)


def until_redis(pid: int) -> int:
    """The process id of the one redis-server below a launcher or a keeper, once it runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            found = [p for p in descendants(pid) if b"redis-server" in Path(f"/proc/{p}/comm").read_bytes()]
            if found:
                assert len(found) == 1
                return found[0]
        time.sleep(0.02)
    raise AssertionError("no redis-server after 60 s")


def until_pong(url: str) -> None:
    deadline = time.monotonic() + 60
    while not _answers(Path(url.removeprefix("unix://"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def keepers() -> list[int]:
    """The shells around a redis-server that this process started: each keeper, and then its loop."""
    return [p for p in descendants(os.getpid()) if b"another one is started" in Path(f"/proc/{p}/cmdline").read_bytes()]


def test_own_redis_comes_back_and_leaves_nothing() -> None:
    with start_redis() as url:
        keeper = keepers()[0]
        for _ in range(2):
            os.kill(killed := until_redis(keeper), signal.SIGKILL)
            until_pong(url)
            assert until_redis(keeper) != killed
        os.kill(until_redis(keeper), signal.SIGKILL)  # and the block ends while another one is about to be started
        below = [keeper, *descendants(keeper)]
    assert gone(below)
    assert keepers() == []


def test_own_redis_does_not_outlive_its_keeper() -> None:
    with start_redis():
        keeper = keepers()[0]
        below = [keeper, *descendants(keeper)]
        os.kill(keeper, signal.SIGKILL)
    assert gone(below)


def test_a_redis_that_cannot_start_is_told_and_not_tried_without_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    binary = folder / "redis-server"
    binary.write_text(f"#!/bin/sh\necho >> {folder}/tries\nexit 3\n")
    binary.chmod(0o700)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr("service.redis_child.START_SECONDS", 1.5)
    with pytest.raises(RedisMissing, match="does not answer"), start_redis():
        pass
    assert keepers() == []
    assert 1 <= len((folder / "tries").read_text()) <= 3
    assert "redis-server ended (status 3)" in capfd.readouterr().err


def test_own_redis_starts_and_ends() -> None:
    with start_redis() as url:
        path = Path(url.removeprefix("unix://"))
        assert path.is_socket()
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.parent.exists()


def test_no_redis_binary_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RedisMissing, match="UPNEXT_REDIS_URL"):
        find_redis()


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "said"),
    [
        (["settings"], {}, 0, "| `UPNEXT_PORT` | `8000` |"),
        (["openapi"], {}, 0, '"/recommend/{user_id}"'),
        (["migrate"], {"database_url": "sqlite:///here.db"}, 0, "has the schema"),
        (["migrate"], {"database_url": "mysql://x/y"}, 1, "is not supported"),
        (["settings"], {"port": "zero"}, 1, "UPNEXT_PORT: "),
        (["dance"], {}, 2, "invalid choice"),
    ],
)
def test_commands(folder: Path, arguments: list[str], settings: dict[str, str], code: int, said: str) -> None:
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_variable_that_is_almost_a_setting_is_told() -> None:
    names = ["UPNEXT_RATELIMIT", "UPNEXT_PORT", "UPNEXT_SERVICE_HOST", "UPNEXT_PORT_8000_TCP", "PATH", "UPNEXT_URL"]
    assert misspelt(names) == ["UPNEXT_RATELIMIT is no setting; did you mean UPNEXT_RATE_LIMIT?"]
