"""Who gets in: keys and their scopes, how often, and what is written of it in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from service import keys as keys_module
from service import rates
from service.access import OPEN, is_local_name, is_loopback, needed
from service.errors import RateLimited
from service.keys import KeyRing, KeysError, Scope, new_key, parse_keys
from service.main import create_app
from service.settings import Settings
from service.telemetry import JsonLines
from shared.database import create_engine, migrate
from tests.servers import RedisServer, free_port
from tests.serving import Running, assert_problem, json_of, running, serving, until
from tests.worlds import cyclic, write_bundle

EVENT = {"user_id": "u", "item_id": "3", "event_type": "view"}


class Keys:
    """A file of keys, and the keys themselves."""

    def __init__(self, folder: Path, **scopes: Iterable[Scope]) -> None:
        self.file, self.of = folder / "keys", {}
        lines = []
        for name, listed in scopes.items():
            self.of[name], line = new_key(name, listed)
            lines.append(line)
        self.write("# made by a test\n\n" + "\n".join(lines) + "\n")

    def write(self, text: str) -> None:
        """Replace the file, as a rename or the update of a mounted secret does."""
        aside = self.file.with_suffix(".new")
        aside.write_text(text)
        aside.replace(self.file)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path, reader=[Scope.READ], writer=[Scope.WRITE], admin=[Scope.ADMIN], all=list(Scope))


@pytest.fixture
async def closed(tmp_path: Path, redis_server: RedisServer, keys: Keys) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic(), api_keys_file=keys.file) as running:
        yield running


@pytest.fixture
async def keyless(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic()) as running:
        yield running


# --- without keys -------------------------------------------------------------------------------------


async def test_without_keys_this_machine_alone_is_answered(keyless: Running) -> None:
    for address in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        json_of(await keyless.peer(address).get("/recommend/u"))
    for address in ("10.0.0.7", "192.168.1.2", "2001:db8::1", "::ffff:10.0.0.7", "testclient", ""):
        stranger = keyless.peer(address)
        response = await stranger.get("/recommend/u")
        assert_problem(response, 401, "unauthorized", detail="python -m service key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert (await stranger.post("/events", json=EVENT)).status_code == 401
        for path in OPEN:
            assert (await stranger.get(path)).status_code == 200
    assert json_of(await keyless.http.get("/users/u/history"))["events"] == []


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "Via"])
async def test_without_keys_a_proxy_on_this_machine_lets_nobody_in(keyless: Running, header: str) -> None:
    response = await keyless.http.get("/recommend/u", headers={header: "127.0.0.1"})
    assert_problem(response, 401, "unauthorized")


async def test_without_keys_a_name_from_the_internet_is_refused(keyless: Running) -> None:
    """A page at a name that its owner points at 127.0.0.1 could otherwise read every history."""
    assert_problem(await keyless.http.get("/recommend/u", headers={"Host": "evil.example:8000"}), 401, "unauthorized")


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost:8000", True), ("127.0.0.1", True), ("[::1]:8000", True), ("upnext:8000", True), ("a.b", False),
     ("10.0.0.1", False), ("[2001:db8::1]", False), ("127.0.0.1.evil.example", False), ("localhost.", False)],
)  # fmt: skip
def test_local_names(host: str, local: bool) -> None:
    assert is_local_name(host) is local


@given(st.text())
def test_any_text_is_judged(text: str) -> None:
    is_local_name(text)
    assert not is_loopback(text) or text.startswith("127.") or ":" in text


# --- keys and scopes ----------------------------------------------------------------------------------


async def test_a_key_is_asked_of_everybody(closed: Running, keys: Keys) -> None:
    for peer in (closed.peer(), closed.peer("10.0.0.7")):
        response = await peer.get("/recommend/u")
        assert_problem(response, 401, "unauthorized", detail="Authorization: Bearer")
        for path in OPEN:
            assert (await peer.get(path)).status_code == 200
    json_of(await closed.peer("10.0.0.7", keys.of["reader"]).get("/recommend/u"))
    json_of(await closed.peer(key=keys.of["reader"], Via="1.1 proxy").get("/recommend/u"))


@pytest.mark.parametrize(
    "sent", ["{}", "Bearer", "Bearer ", "Basic {}", "Bearer {}x", "Bearer x{}", "Bearer \xff", "bearer  {} {}"]
)
async def test_what_is_no_key(closed: Running, keys: Keys, sent: str) -> None:
    value = sent.replace("{}", keys.of["all"]).encode("latin-1")
    transport = httpx.ASGITransport(closed.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await client.get("/recommend/u", headers={b"Authorization": value})
    assert_problem(response, 401, "unauthorized")


async def test_the_scheme_s_case_does_not_count(closed: Running, keys: Keys) -> None:
    sent = {"Authorization": f"bearer {keys.of['reader']}"}
    json_of(await closed.http.get("/recommend/u", headers=sent))


EXPECTED = {
    ("GET", "/recommend/{user_id}"): "read",
    ("POST", "/recommend"): "read",
    ("POST", "/recommend/batch"): "read",
    ("POST", "/api/recommend/"): "read",
    ("GET", "/users/{user_id}/history"): "read",
    ("DELETE", "/users/{user_id}"): "admin",
    ("POST", "/events"): "write",
    ("GET", "/items"): "read",
    ("GET", "/items/{item_id}"): "read",
    ("PUT", "/items/{item_id}"): "write",
    ("DELETE", "/items/{item_id}"): "write",
    ("GET", "/items/{item_id}/similar"): "read",
    ("GET", "/models"): "read",
    ("GET", "/metrics"): None,
    ("GET", "/info"): None,
    ("GET", "/livez"): "open",
    ("GET", "/readyz"): "open",
}


def described() -> dict[tuple[str, str], dict[str, Any]]:
    paths = create_app(Settings()).openapi()["paths"]
    found = ((m.upper(), path, operation) for path, methods in paths.items() for m, operation in methods.items())
    return {(method, path): operation for method, path, operation in found}


async def test_each_route_needs_its_scope(closed: Running, keys: Keys) -> None:
    assert set(described()) == set(EXPECTED)
    for (method, path), scope in EXPECTED.items():
        concrete = path.replace("{user_id}", "u").replace("{item_id}", "3")
        for name in ("reader", "writer", "admin"):
            response = await closed.peer("10.0.0.7", keys.of[name]).request(method, concrete)
            may = scope in (None, "open") or scope == {"reader": "read", "writer": "write", "admin": "admin"}[name]
            assert (response.status_code == 403) is not may, (method, path, name)
            if not may:
                assert_problem(response, 403, "forbidden", detail=f"`{scope}`")
                assert 'error="insufficient_scope"' in response.headers["www-authenticate"]


@given(st.sampled_from(["POST", "PUT", "PATCH", "DELETE", "TRACE", "X"]), st.text())
def test_what_is_not_known_needs_admin(method: str, rest: str) -> None:
    assert needed(method, "/unheard-of/" + rest) is Scope.ADMIN
    assert needed("GET", "/unheard-of/" + rest) is Scope.READ


def test_the_description_says_it(tmp_path: Path) -> None:
    document = create_app(Settings()).openapi()
    (name,) = document["components"]["securitySchemes"]
    assert document["components"]["securitySchemes"][name]["scheme"] == "bearer"
    for (method, path), operation in described().items():
        scope = EXPECTED[method, path]
        if scope == "open":
            assert operation["security"] == []
            continue
        assert operation["security"] == [{name: [scope] if scope else []}]
        for status in ("401", "429", *(["403"] if scope else [])):
            (example,) = operation["responses"][status]["content"]["application/problem+json"]["examples"].values()
            assert example["value"]["status"] == int(status)
        assert "Retry-After" in operation["responses"]["429"]["headers"]


async def test_docs_need_a_key_too(closed: Running, keys: Keys) -> None:
    for path in PAGES:
        assert (await closed.http.get(path)).status_code == 401
        assert (await closed.peer(key=keys.of["writer"]).get(path)).status_code == 200


PAGES = ("/docs", "/redoc", "/openapi.json", "/static-offline-docs/swagger-ui.css")


async def test_a_browser_asks_its_reader_for_a_key_and_sends_it_as_a_password(closed: Running, keys: Keys) -> None:
    key = keys.of["reader"]
    for path in PAGES:
        refused = await closed.http.get(path)
        assert_problem(refused, 401, "unauthorized")
        # One scheme alone: Chromium does not ask where a second one stands on the same line.
        assert re.fullmatch(r"Basic realm=\"[^\"]+\"", refused.headers["www-authenticate"])
        for name in ("", "anybody"):
            assert (await closed.http.get(path, auth=(name, key))).status_code == 200
        for wrong in (("reader", "reader"), (key, ""), ("reader", key + ":")):
            assert_problem(await closed.http.get(path, auth=wrong), 401, "unauthorized")
    for garbage in ("Basic", "Basic !", "Basic YQ", "Basic \xe9"):
        headers = {b"Authorization": garbage.encode("latin-1")}
        assert_problem(await closed.http.get("/docs", headers=headers), 401, "unauthorized")


async def test_a_password_opens_no_more_than_the_pages(closed: Running, keys: Keys) -> None:
    """A browser sends it by itself wherever a foreign page leads it."""
    auth = ("anybody", keys.of["all"])
    for method, path in (("GET", "/recommend/u"), ("GET", "/metrics"), ("DELETE", "/users/u"), ("POST", "/events")):
        refused = await closed.http.request(method, path, auth=auth)
        assert_problem(refused, 401, "unauthorized")
        assert refused.headers["www-authenticate"] == "Bearer"


async def test_a_key_from_the_environment(tmp_path: Path, redis_server: RedisServer, monkeypatch: Any) -> None:
    monkeypatch.setenv("UPNEXT_API_KEY", "0123456789abcdef01234567")
    async with serving(tmp_path, redis_server, cyclic()) as upnext:
        assert_problem(await upnext.http.get("/recommend/u"), 401, "unauthorized")
        json_of(await upnext.peer(key="0123456789abcdef01234567").post("/events", json=EVENT))
        assert "0123456789abcdef01234567" not in repr(upnext.settings)
    with pytest.raises(ValidationError, match="24"):
        Settings(api_key=SecretStr("short"))


# --- the file -----------------------------------------------------------------------------------------


async def test_keys_change_without_a_restart(closed: Running, keys: Keys) -> None:
    old = keys.of["all"]
    key, line = new_key("fresh", [Scope.READ])

    async def answers(with_key: str, status: int) -> None:
        async with asyncio.timeout(60):
            while (await closed.peer(key=with_key).get("/recommend/u")).status_code != status:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    await answers(old, 200)
    keys.write(keys.file.read_text() + line + "\n")
    await answers(key, 200)
    await answers(old, 200)
    keys.write(line + "\n")
    await answers(old, 401)
    await answers(key, 200)


async def test_a_broken_file_leaves_the_keys_in_force(keys: Keys, caplog: pytest.LogCaptureFixture,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(keys_module, "POLL_SECONDS", 0.01)
    async with KeyRing(keys.file, None) as ring:
        for broken in ("reader read 123\n", None):
            caplog.clear()
            keys.write(broken) if broken else keys.file.unlink()
            await until(lambda: "stay in force" in caplog.text)
            found = ring.find(keys.of["reader"])
            assert found is not None
            assert found.name == "reader"
        assert ring.find("upnext_") is None
        keys.write("")
        await until(lambda: ring.find(keys.of["reader"]) is None)
        assert ring.required


async def test_a_file_that_cannot_be_read_stops_the_start(tmp_path: Path, redis_server: RedisServer) -> None:
    for text in (None, "shop read\n", "shop fly " + "0" * 64, "shop read," + " " + "0" * 64, "\xff"):
        if text is not None:
            (tmp_path / "keys").write_bytes(text.encode("latin-1"))
        with pytest.raises(KeysError, match="keys"):
            async with running(Settings(redis_url=redis_server.url, api_keys_file=tmp_path / "keys")):
                pass


def test_only_a_hash_is_kept() -> None:
    key, line = new_key("shop", [Scope.READ, Scope.WRITE])
    assert key not in line
    assert len(key) > 40
    assert line.startswith("shop read,write ")
    assert new_key("shop", [Scope.READ])[0] != key
    assert parse_keys(line)[0].scopes == {Scope.READ, Scope.WRITE}
    for name in ("", "a b", "#shop", "ü", "x" * 65, "a\nb read " + "0" * 64):
        with pytest.raises(KeysError, match="no name"):
            new_key(name, [Scope.READ])


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with suppress(KeysError):
        parse_keys(text)


# --- how often ----------------------------------------------------------------------------------------


async def test_a_key_that_asks_too_often_is_refused(tmp_path: Path, redis_server: RedisServer, keys: Keys) -> None:
    settings = {"api_keys_file": keys.file, "rate_limit": "3/hour"}
    async with serving(tmp_path, redis_server, cyclic(), **settings) as upnext, running(upnext.settings) as other:
        reader = upnext.peer(key=keys.of["reader"])
        for worker in (upnext, other, upnext):
            json_of(await worker.peer(key=keys.of["reader"]).get("/recommend/u"))
        for worker in (upnext, other, upnext):
            response = await worker.peer(key=keys.of["reader"]).get("/recommend/u")
            assert_problem(response, 429, "rate_limited", detail="3 per 1 hour")
            assert 3500 < int(response.headers["retry-after"]) <= 3600
        json_of(await upnext.peer(key=keys.of["all"]).get("/recommend/u"))
        assert (await reader.get("/livez")).status_code == 200
        # What is refused for another reason is not counted: it costs no round trip.
        assert (await upnext.peer(key="x").get("/recommend/u")).status_code == 401


async def test_a_used_up_window_costs_no_round_trip_and_ends(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "BELIEVED", 3600.0)
    limit = rates.RateLimit(rates.parse_rate("1/hour"), redis_server.url, timeout=5)
    await limit.admit("a")
    with pytest.raises(RateLimited):
        await limit.admit("a")
    before = asked(redis_server)
    with pytest.raises(RateLimited):
        await limit.admit("a")
    assert asked(redis_server) == before
    limit._used_up["a"] = (0.0, 0.0)  # its end has come
    redis_server.cli("FLUSHALL")
    await limit.admit("a")
    await limit.aclose()


@pytest.mark.parametrize("jump", [-7200, 7200])
async def test_a_clock_that_jumps_makes_no_window_longer(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    limit = rates.RateLimit(rates.parse_rate("1/minute"), redis_server.url, timeout=5)
    await limit.admit("a")
    with pytest.raises(RateLimited):
        await limit.admit("a")
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + jump)
    for _ in range(2):
        with pytest.raises(RateLimited) as refused:
            await limit.admit("a")
        assert 1 <= refused.value.retry_after <= 60
        limit._used_up["a"] = (0.0, limit._used_up["a"][1])  # Redis is asked again
    await limit.aclose()


async def test_a_window_that_the_clock_of_redis_made_longer_is_begun_anew(redis_server: RedisServer) -> None:
    limit = rates.RateLimit(rates.parse_rate("2/minute"), redis_server.url, timeout=5)
    for _ in range(2):
        await limit.admit("a")
    (key,) = redis_server.keys()
    redis_server.cli("EXPIRE", key, "7260")  # as its clock that is set back by two hours makes it
    for _ in range(2):
        await limit.admit("a")
    with pytest.raises(RateLimited) as refused:
        await limit.admit("a")
    assert 1 <= refused.value.retry_after <= 60
    await limit.aclose()


def asked(server: RedisServer) -> dict[str, int]:
    """How often each command came from outside a script."""
    found = re.findall(r"'cmdstat_([\w|]+)': {'calls': (\d+)", server.cli("INFO", "commandstats"))
    return {
        name: int(calls)
        for name, calls in found
        if name not in ("info", "incrby", "expire", "client", "hello", "client", "hello")
    }


@pytest.mark.usefixtures("impatient")
async def test_nobody_is_refused_while_redis_is_down(tmp_path: Path, redis_of_test: RedisServer, keys: Keys) -> None:
    async with serving(tmp_path, redis_of_test, cyclic(), api_keys_file=keys.file, rate_limit="1/hour") as upnext:
        reader = upnext.peer(key=keys.of["reader"])
        json_of(await reader.get("/recommend/u"))
        redis_of_test.freeze()
        assert (await upnext.peer(key=keys.of["all"]).get("/recommend/u")).status_code == 200
        redis_of_test.thaw()
        redis_of_test.kill()
        for _ in range(5):
            json_of(await reader.get("/recommend/u"))


@pytest.mark.parametrize("found_by", ["itself", "another"])
async def test_a_key_that_was_used_up_is_let_in_while_redis_is_down(
    redis_of_test: RedisServer, monkeypatch: pytest.MonkeyPatch, found_by: str
) -> None:
    monkeypatch.setattr(rates, "BELIEVED", 0.0 if found_by == "itself" else 3600.0)
    monkeypatch.setattr(rates, "PAUSE", 0.0)
    limit = rates.RateLimit(rates.parse_rate("1/hour"), redis_of_test.url, timeout=5)
    await limit.admit("a")
    with pytest.raises(RateLimited):
        await limit.admit("a")
    redis_of_test.kill()
    if found_by == "another":
        await limit.admit("b")
    for _ in range(5):
        await limit.admit("a")
    redis_of_test.start()
    await limit.admit("a")
    with pytest.raises(RateLimited):
        await limit.admit("a")
    await limit.aclose()


async def test_nobody_is_refused_while_no_node_of_a_cluster_can_be_reached(tmp_path: Path, keys: Keys) -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    write_bundle(tmp_path / "bundles", cyclic())
    database = f"sqlite:///{tmp_path}/upnext.db"
    engine = create_engine(database)
    await migrate(engine)
    await engine.dispose()
    settings = Settings(
        redis_url=url, database_url=database, bundles=tmp_path / "bundles", api_keys_file=keys.file, rate_limit="1/hour"
    )
    async with running(settings) as upnext:
        for _ in range(5):
            json_of(await upnext.peer(key=keys.of["all"]).get("/recommend/u"))


async def test_one_count_waits_no_longer_than_its_patience(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = rates.RateLimit(rates.parse_rate("1/hour"), redis_server.url)

    async def endless(*_: object) -> bool:
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(limit._windows, "hit", endless)
    async with asyncio.timeout(60):
        await limit.admit("a")
    await limit.aclose()


async def test_one_round_trip_a_request(redis_server: RedisServer) -> None:
    limit = rates.RateLimit(rates.parse_rate("1000000/hour"), redis_server.url, timeout=5)
    await limit.admit("a")  # connects, and loads the script
    before = asked(redis_server)
    for _ in range(20):
        await limit.admit("a")
    assert asked(redis_server) == before | {"evalsha": before["evalsha"] + 20}
    await limit.aclose()


def test_a_limit_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValidationError, match="rate_limit"):
        Settings(rate_limit="often")


# --- the log ------------------------------------------------------------------------------------------


@asynccontextmanager
async def log_lines() -> AsyncIterator[list[str]]:
    """Everything that is logged, as it would be written, down to the most talkative level."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, root = Handler(), logging.getLogger()
    handler.setFormatter(JsonLines())
    levels = {name: logging.getLogger(name).level for name in ("service", "shared", "uvicorn", "sqlalchemy", "redis")}
    root.addHandler(handler)
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG if name in ("service", "shared") else logging.WARNING)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


async def test_the_log_shows_no_secret_and_no_history(closed: Running, keys: Keys) -> None:
    async with log_lines() as lines:
        for name, key in keys.of.items():
            peer = closed.peer(key=key)
            await peer.post("/events", json=EVENT | {"user_id": "secret-user", "item_id": "secret-item"})
            await peer.get("/recommend/secret-user")
            await peer.get("/users/secret-user/history")
            await peer.post("/recommend", json={"history": ["secret-item"], "n": f"secret-{name}"})
        await closed.peer(key="secret-guess").get("/recommend/secret-user")
    assert [json.loads(line).get("caller") for line in lines if json.loads(line)["message"] == "request"][:4] == [
        "reader"] * 4  # fmt: skip
    assert "secret" not in "\n".join(lines)
    assert not any(key in line for key in keys.of.values() for line in lines)


async def test_the_log_shows_no_row_of_a_database_that_fails(closed: Running, keys: Keys) -> None:
    async with closed.services.log.engine.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE events RENAME COLUMN session_id TO gone")
    async with log_lines() as lines:
        response = await closed.peer(key=keys.of["all"]).post("/events", json=EVENT | {"user_id": "secret-user"})
        assert response.status_code in (500, 503)
    assert lines
    assert "secret-user" not in "\n".join(lines)


FORGED = 'x\n{"time": "2026-01-01T00:00:00.000Z", "level": "error", "message": "forged"}\r\x1b[31m\u2028'


@pytest.mark.parametrize("place", ["path", "query", "id", "request-id", "key", "body"])
async def test_nothing_that_is_sent_forges_a_line(closed: Running, keys: Keys, place: str) -> None:
    header = FORGED.replace("\n", " ").replace("\r", " ").encode("utf-8")
    quoted = httpx.QueryParams({"model": FORGED})
    async with log_lines() as lines:
        peer = closed.peer(key=keys.of["all"])
        match place:
            case "path":
                await peer.get(f"/{quote(FORGED)}")
            case "query":
                await peer.get("/recommend/u", params=quoted)
            case "id":
                await peer.get(f"/recommend/{quote(FORGED)}")
            case "request-id":
                answer = await peer.get("/recommend/u", headers={b"X-Request-Id": header})
                assert "forged" not in answer.headers["x-request-id"]
            case "key":
                await peer.get("/recommend/u", headers={b"Authorization": b"Bearer " + header})
            case _:
                await closed.send("POST", "/events", {"user_id": FORGED, "item_id": FORGED, "event_type": FORGED})
                await peer.post("/events", content=json.dumps(EVENT | {"user_id": FORGED}))
    assert lines
    for line in lines:
        assert "\n" not in line
        assert "\r" not in line
        assert "\x1b" not in line
        assert json.loads(line)["message"] != "forged"


def test_a_line_of_the_log_is_one_line_whatever_it_says() -> None:
    record = logging.LogRecord("service", logging.ERROR, __file__, 1, FORGED + "\ud800", None, None)
    record.fields = {"user": FORGED}
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["user"] == FORGED


def test_settings_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "UPNEXT_API_KEY", "a" * 40)
    assert "a" * 40 not in repr(Settings())


def test_settings_show_no_password() -> None:
    settings = Settings(
        database_url="postgresql://upnext:hush@db/upnext", redis_url="rediss://:hush@cache:6379", api_key="hush" * 6
    )
    assert "hush" not in repr(settings) + str(settings)
