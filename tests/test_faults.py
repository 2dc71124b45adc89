"""What callers see when something fails, with real servers that are killed, frozen, slowed down and cut off.

Each test stands for the row of the README's table that its `fault` names. It looks at three things: what is answered
meanwhile, what is counted, and that all is well again as soon as the cause is gone, without anybody doing anything.
"""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update

from service import bulkhead
from service.commit import PostgresWriter, SqliteWriter
from service.ingest import OVERDUE
from shared import times
from shared.database import cache_outbox, create_engine, events, migrate, prepare_sqlite
from tests.faults import fault
from tests.servers import PostgresServer, Proxy, RedisNodes, RedisServer, refusal
from tests.serving import Running, assert_problem, counted, json_of, serving
from tests.worlds import cyclic

QUICK = {"bundle_poll_seconds": 0.05, "catalogue_poll_seconds": 0.05}
N = 12


async def again(holds: Callable[..., Awaitable[bool]], *arguments: Any) -> None:
    """Wait until a question is answered with yes."""
    async with asyncio.timeout(60):
        while not await holds(*arguments):  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(0.02)


async def failures(upnext: Running, dependency: str) -> float:
    """How often calls to Redis or the database failed."""
    return await counted(upnext, f'upnext_dependency_failures_total{{dependency="{dependency}"}}')


async def next_of(upnext: Running, user: str, **wishes: Any) -> tuple[str, str]:
    """The first recommendation, and where the history came from."""
    answer = await upnext.ask(user, n=1, **wishes)
    return answer["items"][0]["item_id"], answer["history_source"]


def view(user: str, item: str, **fields: Any) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "event_type": "view", **fields}


async def cached(upnext: Running, user: str = "u") -> bool:
    return (await next_of(upnext, user))[1] == "cache"


# --- Redis --------------------------------------------------------------------------------------------


async def assert_served_without_redis(upnext: Running) -> None:
    """Recommendations are right, events are taken and count at once, and the failure is counted."""
    assert await next_of(upnext, "u") == ("4", "log")
    json_of(await upnext.http.post("/events", json=view("u", "7")))
    assert await next_of(upnext, "u") == ("8", "log")
    assert json_of(await upnext.http.get("/readyz"))["status"] == "degraded"
    assert await failures(upnext, "redis") > 0


async def assert_well_again(upnext: Running) -> None:
    await again(cached, upnext)
    assert await next_of(upnext, "u") == ("8", "cache")
    assert json_of(await upnext.http.get("/readyz"))["status"] == "ready"


@fault("Redis is killed")
async def test_redis_is_killed(tmp_path: Path, redis_of_test: RedisServer) -> None:
    async with serving(tmp_path, redis_of_test, cyclic(N)) as upnext:
        await upnext.view("u", "3")
        await again(cached, upnext)
        redis_of_test.kill()
        await assert_served_without_redis(upnext)
        redis_of_test.start()
        await assert_well_again(upnext)


@fault("Redis hangs")
@pytest.mark.usefixtures("impatient")
async def test_redis_hangs(tmp_path: Path, redis_of_test: RedisServer) -> None:
    async with serving(tmp_path, redis_of_test, cyclic(N)) as upnext:
        await upnext.view("u", "3")
        await again(cached, upnext)
        redis_of_test.freeze()
        await assert_served_without_redis(upnext)
        redis_of_test.thaw()
        await assert_well_again(upnext)
        redis_of_test.freeze()  # once more, on a connection that was made anew
        assert await next_of(upnext, "u") == ("8", "log")
        redis_of_test.thaw()
        await assert_well_again(upnext)


@fault("Redis turns read-only")
async def test_redis_turns_read_only(tmp_path: Path, redis_of_test: RedisServer) -> None:
    async with serving(tmp_path, redis_of_test, cyclic(N)) as upnext:
        await upnext.view("u", "3")
        await again(cached, upnext)
        redis_of_test.cli("REPLICAOF", "127.0.0.1", "1")

        async def left() -> bool:  # a connection is asked once a second whether it still leads to a master
            return not await cached(upnext)

        await again(left)
        await assert_served_without_redis(upnext)
        redis_of_test.cli("REPLICAOF", "NO", "ONE")
        await assert_well_again(upnext)


@fault("Redis is full")
async def test_redis_is_full(tmp_path: Path, redis_of_test: RedisServer) -> None:
    async with serving(tmp_path, redis_of_test, cyclic(N)) as upnext:
        await upnext.view("u", "3")
        await again(cached, upnext)
        redis_of_test.cli("CONFIG", "SET", "maxmemory", "1")
        assert await next_of(upnext, "u") == ("4", "cache")
        json_of(await upnext.http.post("/events", json=view("u", "7")))
        assert await next_of(upnext, "u") == ("8", "log")
        assert await failures(upnext, "redis") > 0
        redis_of_test.cli("CONFIG", "SET", "maxmemory", "0")
        await assert_well_again(upnext)


@fault("A master of a Redis Cluster is killed")
@pytest.mark.slow
async def test_a_master_of_a_cluster_is_killed(tmp_path: Path, redis_server: RedisServer) -> None:
    with RedisNodes(replicas=1) as nodes:
        async with serving(tmp_path, redis_server, cyclic(N), redis_url=nodes.url) as upnext:
            users = [f"u{n}" for n in range(12)]
            for user in users:
                await upnext.view(user, "3")
                await again(cached, upnext, user)
            gone = nodes.master_of("{u0}")
            theirs = [user for user in users if nodes.master_of(f"{{{user}}}") is gone]
            others = [user for user in users if user not in theirs]
            assert len(theirs) > 1
            assert len(others) > 1
            gone.kill()
            assert await next_of(upnext, theirs[0]) == ("4", "log")
            assert await next_of(upnext, others[0]) == ("4", "cache")
            for user in users:
                json_of(await upnext.http.post("/events", json=view(user, "7")))
                assert (await next_of(upnext, user))[0] == "8"
            assert await failures(upnext, "redis") > 0
            for user in users:  # nobody starts the master again
                await again(cached, upnext, user)
                assert await next_of(upnext, user) == ("8", "cache")
            assert nodes.master_of("{u0}") is not gone


@asynccontextmanager
async def behind_a_proxy(folder: Path, redis: RedisServer) -> AsyncIterator[tuple[Running, Proxy]]:
    async with Proxy(redis.socket) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        async with serving(folder, redis, cyclic(N), redis_url=url) as upnext:
            yield upnext, proxy


@fault("Redis is slow")
@pytest.mark.usefixtures("impatient")
async def test_redis_is_slow_under_load_and_nobody_gets_another_user_s_answer(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with behind_a_proxy(tmp_path, redis_server) as (upnext, proxy):
        users = [str(n) for n in range(1, N)]  # user n viewed item n, so what is next for them is n + 1
        for user in users:
            await upnext.view(user, user)
            await again(cached, upnext, user)

        async def ask(user: str, patience: float) -> str | None:
            try:
                async with asyncio.timeout(patience):
                    item, source = await next_of(upnext, user)
            except TimeoutError:
                return None
            assert item == str(int(user) + 1), source
            return source

        sources: set[str | None] = set()
        ended = time.monotonic() + 60
        for turn in itertools.count():
            if turn >= 24 and (sources == {None, "cache", "log"} or time.monotonic() > ended):
                break
            proxy.delay = (turn % 8) / 100  # up to 70 ms, beyond the 50 ms that Redis is waited for
            asked = (ask(user, (n + turn) % 8 / 100 + 0.005) for n, user in enumerate(users * 3))
            sources |= set(await asyncio.gather(*asked))
        assert sources == {None, "cache", "log"}
        assert await failures(upnext, "redis") > 0
        proxy.delay = 0.0
        for user in users:
            await again(cached, upnext, user)
            assert (await next_of(upnext, user))[0] == str(int(user) + 1)


@pytest.mark.usefixtures("impatient")
async def test_a_busy_event_loop_does_not_take_redis_for_slow(tmp_path: Path, redis_of_test: RedisServer) -> None:
    async with serving(tmp_path, redis_of_test, cyclic(N)) as upnext:
        await upnext.view("u", "3")
        await again(cached, upnext)
        for _ in range(5):
            asked = asyncio.create_task(next_of(upnext, "u"))
            for _ in range(3):
                await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251 - four times what Redis is waited for; its reply is there after one
            assert await asked == ("4", "cache")
        assert await failures(upnext, "redis") == 0


@fault("Redis breaks off in the middle of a reply")
@pytest.mark.parametrize("left", [1, 40, 90])
async def test_redis_breaks_off_in_the_middle_of_a_reply(tmp_path: Path, redis_server: RedisServer, left: int) -> None:
    async with behind_a_proxy(tmp_path, redis_server) as (upnext, proxy):
        await upnext.view("u", "3")
        await again(cached, upnext)
        for item in ("4", "5", "6"):
            broken, proxy.left = proxy.broken, left
            json_of(await upnext.http.post("/events", json=view("u", item)))
            assert (await next_of(upnext, "u"))[0] == str(int(item) + 1)
            proxy.left = left
            assert (await next_of(upnext, "u"))[0] == str(int(item) + 1)
            assert proxy.broken > broken
        proxy.left = None
        await again(cached, upnext)
        assert await next_of(upnext, "u") == ("7", "cache")
        assert await failures(upnext, "database") == 0
        assert await failures(upnext, "redis") == 0


# --- the database -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres_of_module() -> Iterator[PostgresServer]:
    """A PostgreSQL for the tests of this file, which may kill and freeze it, and which keeps what it has committed."""
    with PostgresServer(durable=True) as server:
        yield server


@asynccontextmanager
async def on_postgres(
    folder: Path, redis: RedisServer, postgres: PostgresServer, proxy: Proxy | None = None, **settings: Any
) -> AsyncIterator[Running]:
    url = await postgres.new_database()
    engine = create_engine(url)
    await migrate(engine)
    await engine.dispose()
    if proxy is not None:
        name = url.split("?")[0].rsplit("/", 1)[1]
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{name}"
    async with serving(folder, redis, cyclic(N), database_url=url, **{**QUICK, **settings}) as upnext:
        yield upnext


async def assert_served_without_the_database(upnext: Running, said: str) -> None:
    """Cached users as ever, others degraded or 503 as they wish, events refused with a time to come back and `said`."""
    assert await next_of(upnext, "u") == ("4", "cache")
    answer = await upnext.ask("v")
    assert (answer["strategy"], answer["history_source"], answer["exclusions"]) == ("degraded", "none", {"seen": False})
    assert_problem(await upnext.http.get("/recommend/v?require_seen=true"), 503, "history_unavailable")
    response = await upnext.http.post("/events", json=view("u", "7"))
    assert_problem(response, 503, "log_unavailable", detail=said)
    assert response.headers["retry-after"] == "2"
    assert_problem(await upnext.http.get("/users/u/history"), 503, "log_unavailable")
    assert_problem(await upnext.http.delete("/users/w"), 503, "log_unavailable")
    assert json_of(await upnext.http.get("/livez")) == {"status": "ok"}
    assert await failures(upnext, "database") > 0


async def takes_events(upnext: Running) -> bool:
    return (await upnext.http.post("/events", json=view("u", "7", event_id="again"))).status_code == 200


async def assert_the_database_is_back(upnext: Running, *, exactly: bool = True) -> None:
    """Events are taken and count; `exactly`: of what was refused meanwhile nothing is stored."""
    await again(takes_events, upnext)
    assert (await next_of(upnext, "u"))[0] == "8"
    assert await next_of(upnext, "v") == ("6", "log")
    history = json_of(await upnext.http.get("/users/u/history"))["events"]
    assert [e["event_id"] for e in history].count("again") == 1
    if exactly:
        assert [e["item_id"] for e in history] == ["3", "7"]

    async def ready() -> bool:
        return bool(json_of(await upnext.http.get("/readyz"))["status"] == "ready")

    await again(ready)


@fault("PostgreSQL is killed")
async def test_postgresql_is_killed(
    tmp_path: Path, redis_server: RedisServer, postgres_of_module: PostgresServer
) -> None:
    async with on_postgres(tmp_path, redis_server, postgres_of_module) as upnext:
        await upnext.view("u", "3")
        await upnext.view("v", "5")
        await again(cached, upnext)
        postgres_of_module.kill()
        try:
            await assert_served_without_the_database(upnext, "nothing was stored")
        finally:
            await asyncio.to_thread(postgres_of_module.start)
        await assert_the_database_is_back(upnext)


@fault("PostgreSQL hangs")
async def test_postgresql_hangs(
    tmp_path: Path, redis_server: RedisServer, postgres_of_module: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with on_postgres(tmp_path, redis_server, postgres_of_module) as upnext:
        await upnext.view("u", "3")
        await upnext.view("v", "5")
        await again(cached, upnext)
        postgres_of_module.freeze()
        try:
            with monkeypatch.context() as patch:  # less patience, so that the test has less to wait for
                patch.setattr("service.history.READ_SECONDS", 0.5)
                patch.setattr("service.commit.SECONDS", 0.5)
                patch.setattr("service.erasure.SECONDS", 0.5)
                async with asyncio.timeout(60):
                    await assert_served_without_the_database(upnext, "stored or not")
        finally:
            postgres_of_module.thaw()
        await assert_the_database_is_back(upnext, exactly=False)


@fault("PostgreSQL hangs")
@pytest.mark.parametrize("word", [b"BEGIN", b"\x00;", b"INSERT INTO events", b"SELECT", b"ROLLBACK", b"COMMIT"])
async def test_postgresql_says_nothing_more_after(
    tmp_path: Path, redis_server: RedisServer, postgres_of_module: PostgresServer, monkeypatch: pytest.MonkeyPatch,
    word: bytes,
) -> None:  # fmt: skip
    """Wherever in a transaction it is: nobody waits for a driver that waits for the answer to its goodbye."""
    for name in ("service.history.READ_SECONDS", "service.commit.SECONDS", "service.erasure.SECONDS"):
        monkeypatch.setattr(name, 0.2)
    async with (
        Proxy(postgres_of_module.socket) as proxy,
        on_postgres(tmp_path, redis_server, postgres_of_module, proxy) as upnext,
    ):
        await upnext.view("u", "3")
        await upnext.view("v", "5")
        await again(cached, upnext)
        proxy.last = word

        async def silent() -> bool:
            await asyncio.gather(upnext.http.post("/events", json=view("w", "9")), upnext.http.get("/users/w/history"))
            return proxy.silent

        request = upnext.http.request

        async def soon(*arguments: Any, **named: Any) -> Any:
            async with asyncio.timeout(1.5):  # a goodbye alone takes two
                return await request(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(upnext.http, "request", soon)
            await again(silent)
            await assert_served_without_the_database(upnext, "")
        proxy.cut()
        await assert_the_database_is_back(upnext, exactly=False)


@fault("PostgreSQL hangs")
async def test_those_who_wait_for_a_hanging_database_leave_places_for_others(
    tmp_path: Path, redis_server: RedisServer, postgres_of_module: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.bulkhead.FEW", 4)
    async with on_postgres(tmp_path, redis_server, postgres_of_module, max_in_flight=16) as upnext:
        await upnext.view("u", "3")
        await again(cached, upnext)
        postgres_of_module.freeze()
        try:
            held = [asyncio.create_task(upnext.http.post("/events", json=view(f"e{n}", "7"))) for n in range(4)]
            held += [asyncio.create_task(upnext.http.get(f"/recommend/r{n}")) for n in range(4)]
            await asyncio.sleep(1.2 * bulkhead.SLOW)
            more, others = [], []
            for n in range(12):  # more than there are places
                more.append(asyncio.create_task(upnext.http.post("/events", json=view(f"f{n}", "7"))))
                others.append(asyncio.create_task(upnext.ask(f"s{n}")))
                await asyncio.sleep(0.02)
                assert await next_of(upnext, "u") == ("4", "cache")
            for response in await asyncio.gather(*more):
                assert_problem(response, 503, "log_unavailable", detail="nothing was stored")
            assert {answer["strategy"] for answer in await asyncio.gather(*others)} == {"degraded"}
        finally:
            postgres_of_module.thaw()
        await asyncio.gather(*held)
        await again(takes_events, upnext)


@fault("The database refuses connections for now at the start")
async def test_postgresql_is_starting_up_itself(
    tmp_path: Path, redis_server: RedisServer, postgres_of_module: PostgresServer
) -> None:
    async with Proxy(postgres_of_module.socket) as proxy:
        proxy.refusal = refusal("57P03")
        async with on_postgres(tmp_path, redis_server, postgres_of_module, proxy) as upnext:
            assert_problem(await upnext.http.get("/recommend/u"), 503, "catalogue_unavailable")
            response = await upnext.http.post("/events", json=view("u", "7"))
            assert_problem(response, 503, "log_unavailable")
            assert response.headers["retry-after"] == "2"
            assert await failures(upnext, "database") > 0
            proxy.refusal = None
            await again(takes_events, upnext)

            async def served() -> bool:
                return (await upnext.http.get("/recommend/u")).status_code == 200

            await again(served)
            assert (await next_of(upnext, "u"))[0] == "8"


@fault("PostgreSQL is slow")
async def test_postgresql_is_slow(
    tmp_path: Path, redis_server: RedisServer, postgres_of_module: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    transactions, write = 0, PostgresWriter.write

    async def counting(*arguments: Any) -> Any:
        nonlocal transactions
        transactions += 1
        return await write(*arguments)

    monkeypatch.setattr(PostgresWriter, "write", counting)
    async with (
        Proxy(postgres_of_module.socket) as proxy,
        on_postgres(tmp_path, redis_server, postgres_of_module, proxy) as upnext,
    ):
        proxy.delay = 0.05
        bodies = [view(f"s{n}", "3", event_id=f"e{n}") for n in range(20)]
        answers = await asyncio.gather(*(upnext.http.post("/events", json=body) for body in bodies))
        assert {answer.status_code for answer in answers} == {200}
        assert transactions <= 3
        assert await next_of(upnext, "s7") == ("4", "log")
        await again(cached, upnext, "s7")
        assert await failures(upnext, "database") == 0


@fault("The connection to PostgreSQL breaks during a commit")
async def test_the_connection_to_postgresql_breaks_during_a_commit(
    tmp_path: Path, redis_server: RedisServer, postgres_of_module: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.ingest.FLUSH_SECONDS", 3_600.0)  # the commit shall be that of an event
    alone = {"catalogue_poll_seconds": 60}  # nor shall anybody else be cut off
    async with (
        Proxy(postgres_of_module.socket) as proxy,
        on_postgres(tmp_path, redis_server, postgres_of_module, proxy, **alone) as upnext,
    ):
        await upnext.view("u", "3")
        for item in ("5", "7", "9"):
            await again(cached, upnext)
            broken, proxy.trigger = proxy.broken, b"COMMIT"
            answer = json_of(await upnext.http.post("/events", json=view("u", item)))
            assert proxy.broken > broken
            assert answer["accepted"] == 1
            assert (await next_of(upnext, "u"))[0] == str(int(item) + 1)
        history = json_of(await upnext.http.get("/users/u/history"))["events"]
        assert [event["item_id"] for event in history] == ["3", "5", "7", "9"]
        assert await failures(upnext, "database") == 0


@fault("A table of PostgreSQL is locked")
async def test_a_table_of_postgresql_is_locked(
    tmp_path: Path, redis_server: RedisServer, postgres_of_module: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with on_postgres(tmp_path, redis_server, postgres_of_module) as upnext:
        await upnext.view("u", "3")
        await upnext.view("v", "5")
        await upnext.view("w", "9")
        await again(cached, upnext)
        engine = create_engine(upnext.settings.database_url)
        monkeypatch.setattr("service.commit.SECONDS", 0.5)
        async with engine.begin() as other:
            await other.execute(text("LOCK TABLE events IN EXCLUSIVE MODE"))
            response = await upnext.http.post("/events", json=view("u", "7", event_id="again"))
            assert_problem(response, 503, "log_unavailable", detail="stored or not")
            assert response.headers["retry-after"] == "2"
            assert (await next_of(upnext, "u"))[0] == "4"  # readers do not wait for writers
            assert await next_of(upnext, "w") == ("10", "log")
            assert await failures(upnext, "database") > 0
        await engine.dispose()
        await assert_the_database_is_back(upnext, exactly=False)


@fault("SQLite is locked by another program")
async def test_sqlite_is_locked_by_another_program(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(connection: sqlite3.Connection) -> None:
        prepare_sqlite(connection)
        connection.execute("PRAGMA busy_timeout = 100")

    monkeypatch.setattr("service.commit.prepare_sqlite", impatient)
    async with serving(tmp_path, redis_server, cyclic(N)) as upnext:
        await upnext.view("u", "3")
        other = sqlite3.connect(tmp_path / "service.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert_problem(await upnext.http.post("/events", json=view("u", "7")), 503, "log_unavailable", detail="nothing")
        assert await next_of(upnext, "u") == ("4", "log")  # readers do not wait for writers
        assert await failures(upnext, "database") > 0
        assert [e["item_id"] for e in json_of(await upnext.http.get("/users/u/history"))["events"]] == ["3"]
        other.execute("ROLLBACK")
        other.close()
        assert await takes_events(upnext)
        assert (await next_of(upnext, "u"))[0] == "8"


@fault("SQLite's disk is slow")
async def test_the_disk_of_sqlite_is_slow(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    transactions, transaction = 0, SqliteWriter._transaction

    @contextmanager
    def slow(writer: SqliteWriter) -> Iterator[sqlite3.Connection]:
        nonlocal transactions
        transactions += 1
        with transaction(writer) as connection:
            yield connection
            time.sleep(0.2)  # a commit ends when the disk says so

    monkeypatch.setattr("service.ingest.FLUSH_SECONDS", 3_600.0)  # the commits shall be those of events
    monkeypatch.setattr(SqliteWriter, "_transaction", slow)
    async with serving(tmp_path, redis_server, cyclic(N)) as upnext:
        posted = [asyncio.create_task(upnext.http.post("/events", json=view(f"s{n}", "3"))) for n in range(40)]
        await asyncio.sleep(0.1)
        assert await next_of(upnext, "nobody") == ("1", "log")  # nobody waits who only reads
        assert not any(task.done() for task in posted)
        for n, task in enumerate(posted):
            assert json_of(await task)["accepted"] == 1
            assert (await next_of(upnext, f"s{n}"))[0] == "4"
        assert transactions <= 4
        assert await failures(upnext, "database") == 0


@fault("The disk is full")
async def test_the_disk_is_full(tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, redis_server, cyclic(N)) as upnext:
        await upnext.view("u", "3")
        batch = {"events": [view("w", "5", session_id=f"{n:0>200}") for n in range(500)]}
        await upnext.services.log.engine.dispose()  # the writer connects anew, with less room
        with monkeypatch.context() as patch:
            patch.setattr("service.commit.prepare_sqlite", small)
            response = await upnext.http.post("/events", json=batch)
            assert_problem(response, 503, "log_unavailable", detail="nothing was stored")
            assert await next_of(upnext, "u") == ("4", "log")
            assert await failures(upnext, "database") > 0
        assert json_of(await upnext.http.get("/users/w/history"))["events"] == []
        await upnext.services.log.engine.dispose()
        assert json_of(await upnext.http.post("/events", json=batch))["accepted"] == 500


@fault("The disk is full")
async def test_the_disk_of_postgresql_is_full(
    tmp_path: Path, redis_server: RedisServer, postgres_of_module: PostgresServer
) -> None:
    """PostgreSQL's own answer, from a trigger: a disk of its own that is full takes a privilege."""
    async with on_postgres(tmp_path, redis_server, postgres_of_module) as upnext:
        await upnext.view("u", "3")
        await upnext.view("v", "5")
        await upnext.view("w", "9")
        await again(cached, upnext)
        engine = create_engine(upnext.settings.database_url)
        async with engine.begin() as other:
            await other.execute(text(FULL))
            await other.execute(text("CREATE TRIGGER no_space BEFORE INSERT ON events EXECUTE FUNCTION no_space()"))
        response = await upnext.http.post("/events", json=view("u", "7", event_id="again"))
        assert_problem(response, 503, "log_unavailable", detail="nothing was stored")
        assert await next_of(upnext, "u") == ("4", "cache")
        assert await next_of(upnext, "w") == ("10", "log")
        assert [e["item_id"] for e in json_of(await upnext.http.get("/users/u/history"))["events"]] == ["3"]
        assert await failures(upnext, "database") > 0
        async with engine.begin() as other:
            await other.execute(text("DROP TRIGGER no_space ON events"))
        await engine.dispose()
        await assert_the_database_is_back(upnext)


FULL = """
CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$
"""


def small(connection: sqlite3.Connection) -> None:
    """A disk with no room for another page."""
    prepare_sqlite(connection)
    connection.execute("PRAGMA max_page_count = 1")


# --- time ---------------------------------------------------------------------------------------------


@fault("The clock jumps")
@pytest.mark.parametrize("hours", [-2, 2])
async def test_the_clock_jumps(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    async with serving(tmp_path, redis_server, cyclic(N)) as upnext:
        await upnext.view("u", "3")
        await again(cached, upnext)
        shift, now = hours * 3600 * times.SECOND, times.now
        for place in ("shared.times.now", "service.routes.events.now", "service.recommend.now"):
            monkeypatch.setattr(place, lambda: now() + shift)
        # Order is that of the clock, as it is: the log and the cache agree on it.
        await upnext.view("u", "7")
        newest = "8" if hours > 0 else "4"
        assert (await next_of(upnext, "u"))[0] == newest
        here = now() + shift
        json_of(await upnext.http.post("/events", json=view("w", "3", timestamp=times.render(here + 3 * times.SECOND))))
        early = view("w", "3", timestamp=times.render(here + 60 * times.SECOND))
        assert_problem(await upnext.http.post("/events", json=early), 422, "validation", "/timestamp")
        redis_server.cli("FLUSHALL")
        assert (await next_of(upnext, "u"))[0] == newest
        # An event that another worker could not bring to the cache before it died is found on either side of the jump.
        engine = upnext.services.log.engine
        async with engine.begin() as connection:
            await connection.execute(update(cache_outbox).values(written=now()))
            (seq,) = (await connection.execute(select(events.c.seq).order_by(events.c.seq.desc()).limit(1))).one()
            mark = {"seq": seq + 1_000, "user_id": "u", "written": now()}
            await connection.execute(cache_outbox.insert(), mark)
        assert abs(shift) > OVERDUE

        async def swept() -> bool:
            await upnext.services.log.settle()
            async with engine.connect() as connection:
                return not (await connection.execute(select(cache_outbox.c.seq))).all()

        await again(swept)
