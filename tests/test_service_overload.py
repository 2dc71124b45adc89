"""The bound on requests in flight."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults import fault
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, json_of, serving, until
from tests.worlds import cyclic

LIMIT = 3


async def refused(upnext: Running) -> float:
    lines = (await upnext.http.get("/metrics")).text.splitlines()
    return next(float(li.split()[1]) for li in lines if li.startswith("upnext_refused_requests_total "))


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
        assert await refused(upnext) == 4
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
