"""The bound on requests in flight."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from service.overload import RefusingProtocol, plain_path
from tests.faults import fault
from tests.servers import RedisServer, free_port
from tests.serving import Running, assert_problem, counted, json_of, serving, until
from tests.worlds import cyclic

LIMIT = 3


@fault("More requests at a time than a worker may have")
async def test_above_the_bound_is_503_at_once(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, redis_server, cyclic(), max_in_flight=LIMIT) as upnext:
        go_on, inside = asyncio.Event(), 0
        recommend = upnext.services.recommender.recommend

        async def slow(*arguments: object) -> object:
            nonlocal inside
            inside += 1
            await go_on.wait()
            return await recommend(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(upnext.services.recommender, "recommend", slow)
        held = [asyncio.create_task(upnext.http.get("/recommend/u")) for _ in range(LIMIT)]
        await until(lambda: inside == LIMIT)
        for method, path in (("GET", "/recommend/u"), ("POST", "/events"), ("GET", "/info"), ("GET", "/nix")):
            response = await upnext.http.request(method, path)
            assert_problem(response, 503, "overloaded")
            assert response.headers["retry-after"] == "1"
        for path in ("/livez", "/readyz"):
            json_of(await upnext.http.get(path))
        assert await counted(upnext, "upnext_refused_requests_total") == 4
        assert inside == LIMIT
        go_on.set()
        assert {response.status_code for response in await asyncio.gather(*held)} == {200}
        json_of(await upnext.http.get("/recommend/u"))
        text = (await upnext.http.get("/metrics")).text
        assert 'upnext_request_seconds_count{method="-",route="unmatched",status="503"} 4.0' in text.splitlines()


async def test_places_come_back_after_errors_and_cancellation(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, redis_server, cyclic(), max_in_flight=1) as upnext:

        async def breaks(*_: object) -> None:
            raise ZeroDivisionError

        async def hangs(*_: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(upnext.services.recommender, "recommend", breaks)
        assert_problem(await upnext.http.get("/recommend/u"), 500, "internal")
        monkeypatch.setattr(upnext.services.recommender, "recommend", hangs)
        gone = asyncio.create_task(upnext.http.get("/recommend/u"))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        json_of(await upnext.http.get("/info"))


@asynccontextmanager
async def over_http(upnext: Running) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """One connection to the application as uvicorn serves it."""
    config = uvicorn.Config(upnext.app, port=free_port(), http=RefusingProtocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    reader, writer = await asyncio.open_connection("127.0.0.1", config.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await running


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: str, body: str = ""
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and JSON of the answer to one request of a connection that stays open."""
    length = f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n" if body else ""
    writer.write(f"{request} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}".encode())
    return await answer_on(reader)


async def answer_on(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], dict[str, Any]]:
    """The next answer of a connection."""
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(status.split()[1]), headers, json.loads(await reader.readexactly(int(headers["content-length"])))


@pytest.mark.parametrize(
    ("head", "is_plain"),
    [
        ("GET /recommend/u?n=3 HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", True),
        ("GET /recommend/u HTTP/1.1\r\n\r\n", True),
        ("GET /recommend/u HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\n\r\n", False),
        ("GET /recommend/u HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", False),
        ("GET /recommend/u HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: x\r\n\r\n", False),
        ("GET /recommend/u HTTP/1.1\r\nContent-Length: 3\r\n\r\n", False),
        ("GET /recommend/u HTTP/1.1\r\ncontent-length : 3\r\n\r\n", False),
        ("GET /recommend/u HTTP/1.1\r\na: b\r\n Transfer-Encoding: chunked\r\n\r\n", False),
        ("GET /recommend/u HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", False),
        ("GET /recommend/u HTTP/1.1\r\nExpect: 100-continue\r\n\r\n", False),
        ("GET /recommend/u HTTP/1.1\r\nHost: a\n\nHost: b\r\n\r\n", False),
        ("GET /recommend/u HTTP/1.1\r\nHost: a\r\n", False),
        ("GET /recommend/u HTTP/1.0\r\n\r\n", False),
        ("HEAD /recommend/u HTTP/1.1\r\n\r\n", False),
        ("GET http://a/recommend/u HTTP/1.1\r\n\r\n", False),
        ("GET /recommend/u v HTTP/1.1\r\n\r\n", False),
    ],
)
def test_only_what_is_plain_is_refused_unparsed(head: str, is_plain: bool) -> None:
    assert plain_path(head.encode()) == ("/recommend/u" if is_plain else None)


async def test_a_refusal_unparsed_is_the_middleware_s(
    tmp_path: Path, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, redis_server, cyclic(), max_in_flight=1) as upnext, over_http(upnext) as line:
        bound = upnext.app.state.bound
        assert (await exchange(*line, "GET /recommend/u%2Dv?n=3"))[0] == 200
        bound.count = 1  # somebody is being answered
        before, passed = await counted(upnext, "upnext_refused_requests_total"), caplog.records.copy()
        middleware = await upnext.http.get("/recommend/u-v")
        for target in ("/recommend/u%2Dv?n=3", "/recommend/u-v", "/recommend/u-v"):
            status, headers, body = await exchange(*line, f"GET {target}")
            assert (status, body) == (503, middleware.json())
            assert {n: headers[n] for n in ("content-type", "retry-after")} == {
                n: middleware.headers[n] for n in ("content-type", "retry-after")
            }
            assert headers["x-request-id"] != middleware.headers["x-request-id"]
        assert (await exchange(*line, "POST /recommend", '{"history": ["1"]}'))[0] == 503
        assert await counted(upnext, "upnext_refused_requests_total") == before + 5
        assert (await exchange(*line, "GET /readyz"))[0] == 200
        told = [r.getMessage() for r in caplog.records if r not in passed and r.name == "service.overload"]
        assert told == ["more requests at a time than 1: 1 refused since the last such line"]
        line[1].write(b"POST /recommend HTTP/1.1\r\nHost: a\r\nContent-Length: 39\r\n\r\n")
        assert (await answer_on(line[0]))[0] == 503
        line[1].write(b"GET /recommend/u HTTP/1.1\r\nHost: ab\r\n\r\n")  # the body of the refused one, no request
        await asyncio.sleep(0.05)
        bound.count = 0
        assert (await exchange(*line, "GET /recommend/u-v"))[2]["user_id"] == "u-v"
        assert bound.count == 0
