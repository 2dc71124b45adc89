"""The service as tests talk to it: `create_app` on real files, a real Redis and a real database, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.dependencies import models

from service.answers import Problem
from service.catalogue import Fields, LiveCatalogue
from service.errors import MEDIA_TYPE, TYPE_PREFIX
from service.main import create_app
from service.routes.dependencies import Services
from service.settings import Settings
from shared.catalogue import ItemChange
from shared.database import create_engine, migrate
from tests.servers import RedisServer
from tests.worlds import World, write_bundle


@dataclass
class Running:
    """A running service."""

    app: FastAPI
    http: httpx.AsyncClient
    settings: Settings

    def peer(self, address: str = "127.0.0.1", key: str | None = None, **headers: str) -> httpx.AsyncClient:
        """A client that the service sees at `address`, and that sends `key`."""
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        transport = httpx.ASGITransport(self.app, client=(address, 50_000))
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)

    @property
    def services(self) -> Services:
        """What the lifespan built."""
        services = self.app.state.services
        assert isinstance(services, Services)
        return services

    async def ask(self, user: str, **parameters: Any) -> dict[str, Any]:
        """GET /recommend/{user}, which must succeed."""
        return json_of(await self.http.get(f"/recommend/{user}", params=parameters))

    async def ids(self, user: str, **parameters: Any) -> list[str]:
        """The ids that GET /recommend/{user} returns."""
        return ids_of(await self.ask(user, **parameters))

    async def bring(self, history: list[Any], **fields: Any) -> dict[str, Any]:
        """POST /recommend, which must succeed."""
        return json_of(await self.http.post("/recommend", json={"history": history, **fields}))

    async def send(self, method: str, path: str, body: Any) -> httpx.Response:
        """`body` as ASCII JSON, in which anything can be written that JSON can."""
        return await self.http.request(
            method, path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )

    async def view(self, user: str, *items: str, at: str | None = None, **fields: Any) -> None:
        """One event for each item."""
        events = [{"user_id": user, "item_id": i, "event_type": "view", **fields} for i in items]
        events = [e | {"timestamp": at} for e in events] if at else events
        json_of(await self.http.post("/events", json={"events": events}))

    async def put(self, item: str, **fields: Any) -> dict[str, Any]:
        """PUT /items/{item}, which must succeed."""
        return json_of(await self.http.put(f"/items/{item}", json=fields))


@asynccontextmanager
async def serving(folder: Path, redis: RedisServer, world: World | None, **settings: Any) -> AsyncIterator[Running]:
    """Run the service on a bundle of `world` (on none with None); state lies in `folder`."""
    if world is not None:
        write_bundle(folder / "bundles", world)
    values = {
        "redis_url": redis.url,
        "database_url": f"sqlite:///{folder / 'service.db'}",
        "bundles": folder / "bundles",
    }
    chosen = Settings(**{**values, **settings})
    await fresh_database(folder / "service.db")
    async with running(chosen) as found:
        yield found


async def put_row(catalogue: LiveCatalogue, item_id: str, **fields: Any) -> ItemChange:
    """A row of the live catalogue as it shall be, whatever it was."""
    return await catalogue.put(item_id, lambda _row: Fields(**fields))


_migrated: list[bytes] = []


async def fresh_database(file: Path) -> None:
    """An empty SQLite database with the current schema; migrations run once a process."""
    if not _migrated:
        engine = create_engine(f"sqlite:///{file}")
        await migrate(engine)
        await engine.dispose()
        _migrated.append(file.read_bytes())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_migrated[0])


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Running]:
    """Run the service with `settings`, on what is there."""
    app = create_app(settings)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield Running(app, client, settings)
    _forget_functions()


def _forget_functions() -> None:
    """Let FastAPI forget the functions of an app that is no more: they would hold all of it in memory."""
    for function in vars(models).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


async def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that happens in the background."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(0.01)


def json_of(response: httpx.Response) -> dict[str, Any]:
    """The body of a 200."""
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def ids_of(answer: dict[str, Any]) -> list[str]:
    """The item ids of a recommendation, which must be well-formed."""
    items = answer["items"]
    assert answer["returned"] == len(items) <= answer["requested"]
    assert [item["rank"] for item in items] == list(range(1, len(items) + 1))
    return [item["item_id"] for item in items]


def assert_problem(response: httpx.Response, status: int, code: str, *places: str, detail: str = "") -> dict[str, Any]:
    """The response is the one form of all errors; `places` are the pointers and parameters that it names."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    body: dict[str, Any] = response.json()
    Problem.model_validate(body, strict=True, extra="forbid")  # as it is described, and nothing besides
    assert body["type"] == TYPE_PREFIX + code
    assert body["status"] == status
    assert body["title"]
    assert body["instance"] == response.request.url.path
    assert detail in body["detail"]
    found = [fault.get("pointer", fault.get("parameter")) for fault in body.get("errors", [])]
    assert found == list(places)
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert response.headers["x-request-id"]
    return body


def value_of(metrics: str, series: str) -> float:
    """What the text of /metrics says of a series, named as it stands there; 0 before anything was counted."""
    lines = metrics.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{series} ")), 0.0)


async def counted(upnext: Running, series: str) -> float:
    """What the service says of a series now."""
    return value_of((await upnext.http.get("/metrics")).text, series)
