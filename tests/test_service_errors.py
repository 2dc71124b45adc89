"""Every error has one form, the framework's own ones too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import MEDIA_TYPE, of_status, pointer
from service.telemetry import MAX_BODY
from tests.servers import RedisServer
from tests.serving import Running, assert_problem, json_of, serving
from tests.worlds import cyclic

JSON = {"Content-Type": "application/json"}


@pytest.fixture
async def upnext(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic()) as running:
        yield running


async def test_the_frameworks_own(upnext: Running) -> None:
    assert_problem(await upnext.http.get("/nix"), 404, "not_found")
    assert_problem(await upnext.http.get("/recommend/u/"), 404, "not_found")
    response = await upnext.http.delete("/recommend/u")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET"
    assert of_status(418, "tea").title == "I'm a Teapot"


@pytest.mark.parametrize("path", ["/events", "/recommend"])
async def test_bodies_that_are_no_json(upnext: Running, path: str) -> None:
    post = upnext.http.post
    assert_problem(await post(path, content=b"{", headers=JSON), 422, "validation", "", detail="not JSON")
    assert_problem(await post(path, content=b"\xff\xfe{", headers=JSON), 400, "malformed")
    assert_problem(await post(path, content=b"[" * 100_000, headers=JSON), 400, "malformed")
    assert_problem(await post(path, headers=JSON), 422, "validation", "")
    assert_problem(await post(path, content=b"{}", headers={"Content-Type": "text/plain"}), 422, "validation", "")


async def test_bodies_over_the_limit(upnext: Running) -> None:
    big = b" " * (MAX_BODY + 1)
    assert_problem(await upnext.http.post("/events", content=big, headers=JSON), 413, "too_large")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield big[: MAX_BODY // 4]

    assert_problem(await upnext.http.post("/events", content=chunks(), headers=JSON), 413, "too_large")
    just = b'{"history": []}'.ljust(MAX_BODY)
    assert json_of(await upnext.http.post("/recommend", content=just, headers=JSON))["strategy"] == "popular"


async def test_the_unexpected(upnext: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(upnext.services.recommender, "recommend", breaks)
    response = await upnext.http.get("/recommend/u")
    body = assert_problem(response, 500, "internal")
    assert "secret" not in str(body)


@pytest.mark.parametrize(
    ("query", "places"),
    [
        ("n=0", ["n"]),
        ("n=101", ["n"]),
        ("n=ten", ["n"]),
        ("as_of=2026-01-01T00:00:00", ["as_of"]),
        ("as_of=now", ["as_of"]),
        ("as_of=9999-12-31T23:59:59-01:00", ["as_of"]),
        ("exclude_seen=perhaps", ["exclude_seen"]),
        ("exclude=a%20b", ["exclude"]),
        ("exclude=..", ["exclude"]),
        ("&".join(["exclude=1"] * 101), ["exclude"]),
        ("filter=genre:Comedy", ["filter"]),
        ("k=5&N=5", ["k", "N"]),
        ("n=5&n=6", ["n"]),
    ],
)
async def test_parameters(upnext: Running, query: str, places: list[str]) -> None:
    assert_problem(await upnext.http.get(f"/recommend/u?{query}"), 422, "validation", *places)


async def test_a_plus_in_a_url_is_explained(upnext: Running) -> None:
    response = await upnext.http.get("/recommend/u?as_of=2026-01-01T00:00:00+01:00")
    assert_problem(response, 422, "validation", "as_of", detail="%2B")
    json_of(await upnext.http.get("/recommend/u?as_of=2026-01-01T00:00:00%2B01:00"))


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({}, ["/history"]),
        ({"history": "1"}, ["/history"]),
        ({"history": ["1", {"item_id": "2", "timestamp": "2026-01-01T00:00:00Z"}]}, ["/history"]),
        ({"history": [{"item_id": "2"}]}, ["/history/0/timestamp"]),
        ({"history": [{"item_id": "2", "timestamp": "2026"}]}, ["/history/0/timestamp"]),
        ({"history": ["a b"]}, ["/history/0"]),
        ({"history": ["1"] * 1001}, ["/history"]),
        ({"history": [], "candidates": ["1"] * 1001}, ["/candidates"]),
        ({"history": [], "candidates": ["1", ""]}, ["/candidates/1"]),
        ({"history": [], "exclude": ["1"] * 101}, ["/exclude"]),
        ({"history": [], "n": 0}, ["/n"]),
        ({"history": [], "user_id": "u"}, ["/user_id"]),
        ({"history": [], "require_seen": True}, ["/require_seen"]),
    ],
)
async def test_bodies(upnext: Running, body: dict[str, Any], places: list[str]) -> None:
    assert_problem(await upnext.http.post("/recommend", json=body), 422, "validation", *places)


@pytest.mark.parametrize("path", ["/recommend/a%20b", "/users/%2E%2E/history", "/items/%C3%A9"])
async def test_ids_in_paths(upnext: Running, path: str) -> None:
    response = await upnext.http.get(path)
    assert response.status_code in (404, 422)
    assert response.headers["content-type"] == MEDIA_TYPE


async def test_unknown_model_lists_the_names(upnext: Running) -> None:
    response = await upnext.http.get("/recommend/u?model=gpt")
    assert_problem(response, 404, "unknown_model", detail="bert4rec, sasrec")
    assert_problem(await upnext.http.post("/recommend", json={"history": [], "model": "x"}), 404, "unknown_model")


@given(st.lists(st.text() | st.integers(0, 9)))
def test_pointers_are_reversible(path: list[str | int]) -> None:
    parts = pointer(path).split("/")[1:]
    read = [part.replace("~1", "/").replace("~0", "~") for part in parts]
    assert read == [str(part).encode("utf-8", "replace").decode() for part in path]
