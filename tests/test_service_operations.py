"""What operators and readers of the documentation see."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.main import create_app
from service.settings import PREFIX, Settings, markdown_table
from service.telemetry import JsonLines, TurnHandler, uuid7
from shared.bundle import sha256
from tests.servers import RedisServer
from tests.serving import Running, json_of, running, serving
from tests.worlds import cyclic


@pytest.fixture
async def upnext(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic()) as running:
        yield running


async def test_readiness(upnext: Running) -> None:
    assert json_of(await upnext.http.get("/readyz")) == {
        "status": "ready",
        "checks": {"bundle": "ok", "catalogue": "ok", "redis": "ok"},
    }


async def test_redis_down_is_degraded_but_ready(tmp_path: Path, redis_of_test: RedisServer) -> None:
    async with serving(tmp_path, redis_of_test, cyclic()) as upnext:
        await upnext.view("u", "3")
        redis_of_test.kill()
        ready = json_of(await upnext.http.get("/readyz"))
        assert (ready["status"], ready["checks"]["bundle"]) == ("degraded", "ok")
        answer = await upnext.ask("u", n=1)
        assert (answer["items"][0]["item_id"], answer["history_source"]) == ("4", "log")


async def test_a_database_without_schema_is_not_ready(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic()) as upnext:
        bare = upnext.settings.model_copy(update={"database_url": f"sqlite:///{tmp_path / 'bare.db'}"})
    async with running(bare) as upnext:
        response = await upnext.http.get("/readyz")
        assert response.status_code == 503
        assert "python -m service migrate" in response.json()["checks"]["catalogue"]
        assert (await upnext.http.get("/recommend/u")).status_code == 503


async def test_no_redis_url_is_explained() -> None:
    with pytest.raises(RuntimeError, match="python -m service"):
        async with running(Settings(redis_url=None)):
            pass


async def test_info_and_models(upnext: Running) -> None:
    info = json_of(await upnext.http.get("/info"))
    assert info["service_version"]
    bundle = info["bundle"]
    assert bundle["version"] == "2000-03-01T00-00-00Z-test"
    items = upnext.settings.bundles / bundle["version"] / "items.jsonl"
    assert bundle["files"]["items.jsonl"]["sha256"] == sha256(items)
    models = json_of(await upnext.http.get("/models"))
    assert [(m["name"], m["default"], m["kind"]) for m in models["models"]] == [
        ("sasrec", True, "encoder"),
        ("bert4rec", False, "encoder"),
    ]
    assert models["models"][0]["metrics"] == {"bundle": {"hr@10": 1.0}}


async def test_metrics(upnext: Running) -> None:
    await upnext.view("u", "3")
    await upnext.ask("u")
    await upnext.http.get("/no/such/path")
    text = (await upnext.http.get("/metrics")).text
    for line in (
        'upnext_recommendations_total{history_source="log",model="sasrec",strategy="sequence"} 1.0',
        'upnext_request_seconds_count{method="GET",route="/recommend/{user_id}",status="200"} 1.0',
        'upnext_request_seconds_count{method="-",route="unmatched",status="404"} 1.0',
        'upnext_stage_seconds_count{stage="retrieve"} 1.0',
        'upnext_retrievals_total{path="exact"} 1.0',
        'upnext_events_total{status="accepted"} 1.0',
        "upnext_bundle_load_failures_total 0.0",
    ):
        assert line in text.splitlines(), line


async def test_each_path_is_counted_and_named(upnext: Running) -> None:
    await upnext.view("u", "3")

    async def path(method: str, url: str, body: Any = None) -> str:
        response = await upnext.http.request(method, url, json=body)
        assert response.status_code == 200, response.text
        (stage,) = (part for part in response.headers["server-timing"].split(", ret") if "desc=" in part)
        return stage.split('"')[1]

    assert await path("GET", "/recommend/u") == "exact"
    assert await path("GET", "/recommend/nobody") == "popular"
    assert await path("POST", "/recommend", {"history": ["3"], "candidates": ["4", "5"]}) == "candidates"
    assert await path("GET", "/items/3/similar") == "exact"
    users = ["u", "nobody", "u", "u"]
    assert await path("POST", "/recommend/batch", {"users": users}) == "exact, popular"
    lines = (await upnext.http.get("/metrics")).text.splitlines()
    counted = {line for line in lines if line.startswith("upnext_retrievals_total{")}
    totals = {"exact": 5, "popular": 2, "candidates": 1}
    assert counted == {f'upnext_retrievals_total{{path="{name}"}} {count}.0' for name, count in totals.items()}


async def test_one_log_line_a_request_without_history(upnext: Running, caplog: pytest.LogCaptureFixture) -> None:
    await upnext.view("secret-user", "3")
    caplog.clear()
    with caplog.at_level(logging.INFO, "service"):
        await upnext.ask("secret-user")
    (record,) = [r for r in caplog.records if r.name == "service.telemetry"]
    text = JsonLines().format(record)
    line = json.loads(text)
    assert "\n" not in text
    assert "secret" not in text
    assert (line["message"], line["route"], line["status"]) == ("request", "/recommend/{user_id}", 200)
    assert set(line["stages"]) == {"read", "encode", "retrieve", "exclude", "rank"}


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
async def test_pages_load_nothing_from_elsewhere(upnext: Running, page: str) -> None:
    response = await upnext.http.get(page)
    assert response.status_code == 200
    assert "Upnext" in response.text
    (policy,) = response.headers["content-security-policy"].split(";")
    assert policy.split()[0] == "default-src"  # whatever kind of thing a script may want
    assert set(policy.split()[1:]) <= {"'self'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"}
    named = re.findall(r'(?:src|href|spec-url)="([^"]+)"|url: .([^\'"]+)', response.text)
    assets = {one or other for one, other in named}
    assert "openapi.json" in assets
    assert len(assets) >= 3
    for asset in assets:
        assert re.fullmatch(r"[a-z./-]+", asset), asset  # on this server, behind whatever path a proxy may add
        assert (await upnext.http.get(asset)).status_code == 200, asset


def openapi() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def test_every_operation_is_described() -> None:
    document = openapi()
    tags = {tag["name"] for tag in document["tags"]}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)
            assert set(operation["tags"]) <= tags
            assert "HTTPValidationError" not in json.dumps(operation)


def test_examples_of_bodies_are_accepted() -> None:
    from service.schemas import BatchBody, EventBody, EventsBody, ItemBody, OlderBody, RecommendBody

    for model in (BatchBody, EventBody, EventsBody, ItemBody, OlderBody, RecommendBody):
        examples = model.model_json_schema()["examples"]
        assert examples
        for example in examples:
            model.model_validate(example)


def test_settings_table_names_every_setting() -> None:
    table = markdown_table()
    for name, field in Settings.model_fields.items():
        assert field.description
        assert f"| `{PREFIX}{name.upper()}` |" in table


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPNEXT_PORT", "9000")
    monkeypatch.setenv("UPNEXT_RETRIEVAL", "hnsw")
    assert (Settings().port, Settings().retrieval) == (9000, "hnsw")


class Writes(io.StringIO):
    """A stream that keeps apart what was written in one go."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def write(self, text: str) -> int:
        self.calls.append(text)
        return len(text)


def test_a_turn_of_the_loop_writes_its_lines_in_one_go() -> None:
    stream, log = Writes(), logging.Logger("test", logging.INFO)
    handler = TurnHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.info("before the loop")
    assert stream.calls == ["before the loop\n"]

    async def turns() -> None:
        stream.calls.clear()
        log.info("one")
        log.info("two")
        assert stream.calls == []
        await asyncio.sleep(0)
        assert stream.calls == ["one\ntwo\n"]
        log.info("three")
        log.warning("this may be the last line")
        assert stream.calls == ["one\ntwo\n", "three\nthis may be the last line\n"]
        await asyncio.sleep(0)
        log.info("at the end")

    asyncio.run(turns())
    assert stream.calls[2:] == ["at the end\n"]


def test_uuid7_sorts_by_time() -> None:
    ids = [uuid7() for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", i) for i in ids)
    assert [i[:12] for i in ids] == sorted(i[:12] for i in ids)


def test_importing_the_service_imports_no_torch() -> None:
    code = "import service.main, sys, os; print('torch' in sys.modules, os.environ['OMP_NUM_THREADS'])"
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]
