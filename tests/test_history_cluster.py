"""Histories in a Redis Cluster of three masters: every user's entry where its slot is, wherever that goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from service.history import HistoryStore, create_cluster
from service.ingest import EventLog
from service.rates import RateLimit, parse_rate
from service.redis_cluster import nodes_of, slots_of, url_of
from service.redis_line import PAUSE, key_of
from tests.servers import RedisNodes
from tests.test_history import NOW, POLICY, event, keys

USERS = [f"u{n}" for n in range(60)] + ["}", "}u", "{}", "{u}v", "a}b{c}", "ä}{", "{", "0}x"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[RedisNodes]:
    with RedisNodes() as cluster:
        yield cluster


@asynccontextmanager
async def store_on(nodes: RedisNodes, engine: AsyncEngine, *, patience: float = 5) -> AsyncIterator[HistoryStore]:
    cluster = create_cluster(nodes.url, timeout=patience)
    try:
        yield HistoryStore(cluster, engine)
    finally:
        await cluster.aclose()


async def test_entries_are_where_their_slots_are(nodes: RedisNodes, sqlite_engine: AsyncEngine) -> None:
    async with store_on(nodes, sqlite_engine) as histories:
        log = EventLog(sqlite_engine, histories)
        for item in ("a", "b"):
            await log.append([event(item, user_id=u) for u in USERS], POLICY, NOW)
            found = await asyncio.gather(*(histories.read(u, POLICY) for u in USERS))
        assert {tuple(h.items) for h in found} == {tuple(keys("a", "b"))}
        assert {h.source for h in found} == {"cache"}
        assert await histories.ping()
        held = [set(node.keys()) for node in nodes.nodes]
        assert all(held)
        assert sum(len(names) for names in held) == len(USERS)
        assert await histories.drop(USERS[:30])
        assert sum(len(node.keys()) for node in nodes.nodes) == len(USERS) - 30
        assert await histories.drop_all()
        assert not any(node.keys() for node in nodes.nodes)


def test_the_user_alone_decides_on_the_slot(nodes: RedisNodes) -> None:
    slot = [{nodes.nodes[0].cli("CLUSTER", "KEYSLOT", key_of(epoch, user)) for epoch in ("", "01234567", "89abcdef")}
            for user in USERS]  # fmt: skip
    assert [len(s) for s in slot] == [1] * len(USERS)
    assert len({key_of("01234567", user) for user in USERS}) == len(USERS)


async def test_a_slot_that_moves_and_comes_back_finds_nothing_old(
    nodes: RedisNodes, sqlite_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events on both masters in turn, each in the next read; what the first one held is never read again."""
    monkeypatch.setattr("service.redis_line.GREETING_SECONDS", 60.0)
    home = nodes.master_of("{mover}")
    away = next(node for node in nodes.nodes if node is not home)
    async with store_on(nodes, sqlite_engine) as mine, store_on(nodes, sqlite_engine) as others:
        log = EventLog(sqlite_engine, mine)
        items: list[str] = []
        for item, target in (("a", None), ("b", away), ("c", home), ("d", away), ("e", home)):
            if target is not None:
                nodes.move("{mover}", target)
                await asyncio.sleep(PAUSE)  # who serves what is asked that often at most; until then the log answers
            items.append(item)
            await log.append([event(item, user_id="mover")], POLICY, NOW)
            for histories in (mine, others, mine):
                found = await histories.read("mover", POLICY)
                assert list(found.items) == keys(*items)
            assert found.source == "cache"


async def test_a_master_that_is_gone_costs_its_users_the_cache_and_nobody_else(sqlite_engine: AsyncEngine) -> None:
    with RedisNodes() as nodes:
        async with store_on(nodes, sqlite_engine, patience=0.5) as histories:
            log = EventLog(sqlite_engine, histories)
            users = USERS[:40]
            await log.append([event("a", user_id=u) for u in users], POLICY, NOW)
            await asyncio.gather(*(histories.read(u, POLICY) for u in users))
            gone = nodes.master_of("{u0}")
            theirs = {u for u in users if nodes.master_of(f"{{{u}}}") is gone}
            assert 0 < len(theirs) < len(users)
            gone.kill()
            # A cluster that lacks a master serves its other slots only for as long as it has not noticed.
            found = {u: await histories.read(u, POLICY) for u in users}
            assert {tuple(h.items) for h in found.values()} == {tuple(keys("a"))}
            assert {u for u, h in found.items() if h.source == "log"} >= theirs
            assert not await histories.ping()
            await log.append([event("b", user_id=u) for u in users], POLICY, NOW)
            gone.start()
            nodes.settle()
            await asyncio.sleep(PAUSE)
            for _ in range(2):
                found = {u: await histories.read(u, POLICY) for u in users}
                assert {tuple(h.items) for h in found.values()} == {tuple(keys("a", "b"))}
            assert {h.source for h in found.values()} == {"cache"}


async def test_rates_are_counted_in_a_cluster(nodes: RedisNodes) -> None:
    from service.errors import RateLimited

    limit = RateLimit(parse_rate("2/hour"), nodes.url, timeout=5)
    try:
        for caller in ("one", "two", "three", "four"):
            await limit.admit(caller)
            await limit.admit(caller)
            with pytest.raises(RateLimited):
                await limit.admit(caller)
    finally:
        await limit.aclose()


async def test_rates_refuse_nobody_while_a_cluster_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """In part and as a whole; afterwards they are counted again."""
    from service.errors import RateLimited

    monkeypatch.setattr("service.rates.PAUSE", 0.0)
    monkeypatch.setattr("service.rates.BELIEVED", 0.0)
    with RedisNodes() as nodes:
        limit = RateLimit(parse_rate("1/hour"), nodes.url, timeout=5)
        callers = [f"c{n}" for n in range(12)]
        try:
            for caller in callers:
                await limit.admit(caller)
                with pytest.raises(RateLimited):
                    await limit.admit(caller)
            nodes.nodes[0].kill()
            for caller in callers:
                with suppress(RateLimited):  # the other masters serve their slots until they have noticed
                    await limit.admit(caller)
            for node in nodes.nodes[1:]:
                node.kill()
            for _ in range(2):
                for caller in callers:
                    await limit.admit(caller)
            for node in nodes.nodes:
                node.start()
            nodes.settle()
            async with asyncio.timeout(60):
                for caller in callers:
                    with suppress(RateLimited):
                        while True:
                            await limit.admit(caller)
        finally:
            await limit.aclose()


def test_urls_of_a_cluster() -> None:
    url = "rediss+cluster://me:p%40ss@one:7000,[::1]:7001,three?ssl_ca_certs=/ca.pem"
    assert nodes_of(url) == [("one", 7000), ("::1", 7001), ("three", 6379)]
    assert url_of(url, ("::1", 7001)) == "rediss://me:p%40ss@[::1]:7001?ssl_ca_certs=/ca.pem"
    with pytest.raises(ValueError, match="does not name nodes"):
        create_cluster("redis+cluster://")


def test_a_node_without_an_address_is_the_one_that_was_asked() -> None:
    slots = slots_of([[0, 8_000, [b"", 7000, b"id"]], [8_001, 16_382, [b"other", 7001, b"id"], [b"r", 1, b"x"]]], "me")
    assert (slots[0], slots[8_000], slots[8_001]) == (("me", 7000), ("me", 7000), ("other", 7001))
    assert slots[16_383] is None
