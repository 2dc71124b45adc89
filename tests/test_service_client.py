"""A client that openapi-python-client makes from the API description works: its types are those of real answers."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.main import create_app
from service.settings import Settings
from tests.servers import RedisServer
from tests.serving import Running, serving
from tests.worlds import cyclic

PACKAGE = "upnext_generated"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openapi_python_client") is None, reason="openapi-python-client is not installed"
)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of the package with the client."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "openapi.json").write_text(json.dumps(create_app(Settings()).openapi()))
    (folder / "config.json").write_text('{"post_hooks": []}')
    options = {"path": "openapi.json", "config": "config.json", "meta": "none", "output-path": PACKAGE}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arning" not in done.stdout
    sys.path.insert(0, str(folder))
    try:
        yield PACKAGE
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
async def upnext(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic()) as running:
        yield running


class Calls:
    """The generated functions by name, with a client that reaches the running service."""

    def __init__(self, package: str, upnext: Running) -> None:
        self.package = package
        self.models = importlib.import_module(f"{package}.models")
        transport = httpx.ASGITransport(upnext.app)
        client = importlib.import_module(f"{package}.client").Client
        self.client = client("http://test", httpx_args={"transport": transport}, raise_on_unexpected_status=True)

    async def __call__(self, name: str, *arguments: Any, **fields: Any) -> Any:
        tag, _, function = name.partition(".")
        module = importlib.import_module(f"{self.package}.api.{tag}.{function}")
        return await module.asyncio(*arguments, client=self.client, **fields)


@pytest.fixture
def call(generated: str, upnext: Running) -> Calls:
    return Calls(generated, upnext)


async def test_tell_and_ask(call: Calls) -> None:
    when = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    event = call.models.EventBody(user_id="u", item_id="3", event_type="view", event_id="e1", timestamp=when)
    stored = await call("events.take_events", body=event)
    assert (stored.accepted, stored.events[0].status) == (1, "accepted")
    found = await call("recommendations.recommend_for_user", "u", n=2, exclude=["4"], filter_=["parity:even"])
    assert (found.strategy, [item.item_id for item in found.items]) == ("sequence", ["6", "8"])
    assert isinstance(found, call.models.RecommendationAnswer)
    history = await call("events.show_history", "u")
    assert [e.item_id for e in history.events] == ["3"]


async def test_bring_and_batch_and_similar(call: Calls) -> None:
    models = call.models
    brought = models.RecommendBody(history=["1", "5"], n=3, candidates=["6", "2"])
    found = await call("recommendations.recommend_for_history", body=brought)
    assert [item.item_id for item in found.items] == ["6", "2"]
    assert (found.user_id, found.items[0].score) == (None, 12.0)
    entry = models.HistoryEntry(item_id="5", timestamp=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    found = await call("recommendations.recommend_for_history", body=models.RecommendBody(history=[entry], n=1))
    assert found.items[0].item_id == "6"
    batch = await call("recommendations.recommend_for_users", body=models.BatchBody(users=["a", "b"], n=1))
    assert [(r.user_id, r.items[0].item_id, r.items[0].score) for r in batch.results] == [
        ("a", "1", None),
        ("b", "1", None),
    ]
    older = await call("recommendations.recommend_as_before", body=models.OlderBody(user_id=7))
    assert older.recommendations[0].id == 1
    similar = await call("catalogue.similar_items", "1", n=1)
    assert (similar.strategy, similar.returned) == ("similar", 1)


async def test_catalogue_and_operations(call: Calls) -> None:
    body = call.models.ItemBody(title="New", categories=["parity:odd"])
    assert (await call("catalogue.put_item", "new", body=body)).title == "New"
    page = await call("catalogue.list_items", limit=2)
    assert [item.item_id for item in page.items] == ["1", "10"]
    page = await call("catalogue.list_items", cursor="9")
    assert ([item.item_id for item in page.items], page.next_cursor) == (["new"], None)
    assert (await call("catalogue.withdraw_item", "new")).withdrawn
    assert (await call("operations.readyz")).status == "ready"
    assert (await call("operations.models")).models[0].name == "sasrec"
    assert (await call("operations.info")).bundle.version


async def test_errors_are_problems(call: Calls) -> None:
    for name, arguments, fields, code in (
        ("recommendations.recommend_for_user", ("u",), {"model": "gpt"}, "unknown_model"),
        ("recommendations.recommend_for_user", ("u",), {"n": 0}, "validation"),
        ("catalogue.show_item", ("unheard-of",), {}, "unknown_item"),
    ):
        problem = await call(name, *arguments, **fields)
        assert isinstance(problem, call.models.Problem)
        assert problem.type_ == f"urn:upnext:problem:{code}"
        assert problem.detail
