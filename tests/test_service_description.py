"""The OpenAPI description and the service say the same: examples, fields, headers, errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema_rs import validator_for
from pydantic import BaseModel, SecretStr

from service import answers
from service.errors import MEDIA_TYPE
from service.main import create_app
from service.metrics import Metrics
from service.settings import Settings
from tests.servers import RedisServer
from tests.serving import Running, serving
from tests.worlds import cyclic

KEY = "0123456789abcdef01234567"
DOCUMENT = create_app(Settings()).openapi()
ASKED = {
    ("get", "/recommend/{user_id}"): ("/recommend/u", None),
    ("post", "/recommend"): ("/recommend", {"history": ["1"]}),
    ("post", "/recommend/batch"): ("/recommend/batch", {"users": ["u", "nobody"]}),
    ("post", "/api/recommend/"): ("/api/recommend/", {"user_id": "u"}),
    ("post", "/events"): ("/events", {"user_id": "u", "item_id": "3", "event_type": "view"}),
    ("get", "/users/{user_id}/history"): ("/users/u/history", None),
    ("delete", "/users/{user_id}"): ("/users/u", None),
    ("get", "/items"): ("/items?limit=2", None),
    ("get", "/items/{item_id}"): ("/items/3", None),
    ("put", "/items/{item_id}"): ("/items/3", {"title": "Three"}),
    ("delete", "/items/{item_id}"): ("/items/3", None),
    ("get", "/items/{item_id}/similar"): ("/items/3/similar", None),
    **{("get", path): (path, None) for path in ("/livez", "/readyz", "/metrics", "/info", "/models")},
}


@pytest.fixture
async def upnext(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Running]:
    async with serving(tmp_path, redis_server, cyclic(), api_key=SecretStr(KEY), rate_limit="60/minute") as running:
        json = {"user_id": "u", "item_id": "3", "event_type": "view"}
        assert (await running.peer(key=KEY).post("/events", json=json)).status_code == 200
        yield running


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def resolved(part: dict[str, Any]) -> Any:
    """What `part` refers to, if it is a reference."""
    found: Any = DOCUMENT
    for name in part["$ref"].split("/")[1:] if "$ref" in part else []:
        found = found[name]
    return part if found is DOCUMENT else found


def assert_valid(value: Any, schema: dict[str, Any]) -> None:
    """`value` is as `schema` says, which may refer into the document."""
    errors = validator_for(schema | {"components": DOCUMENT["components"]}).iter_errors(value)
    assert [error.message for error in errors] == []


def model_of(operation: dict[str, Any]) -> type[BaseModel]:
    """What the operation answers."""
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    model: type[BaseModel] = getattr(answers, schema["$ref"].rpartition("/")[2])
    return model


def test_every_answer_has_an_example_of_its_form() -> None:
    for method, path, operation in operations():
        ((kind, body),) = operation["responses"]["200"]["content"].items()
        assert_valid(body["example"], body["schema"])
        if kind == "application/json":
            read = model_of(operation).model_validate(body["example"], strict=True, extra="forbid")
            assert read.model_dump() == body["example"], (method, path)  # no field is missing


def test_a_withdrawn_item_is_shown_as_withdrawn() -> None:
    body = DOCUMENT["paths"]["/items/{item_id}"]["delete"]["responses"]["200"]["content"]["application/json"]
    assert (body["example"]["withdrawn"], body["example"]["available"]) == (True, False)


def test_the_example_of_the_metrics_is_of_metrics_that_are_there() -> None:
    body = DOCUMENT["paths"]["/metrics"]["get"]["responses"]["200"]["content"]["text/plain"]
    metrics = Metrics()
    metrics.count(metrics.events, "accepted", amount=1682)
    assert body["example"] in metrics.render().decode()


def test_every_error_has_an_example_of_its_form() -> None:
    described = [
        (status, response)
        for _, _, operation in operations()
        for status, response in operation["responses"].items()
        if status != "200"
    ]
    anywhere = DOCUMENT["components"]["responses"]
    assert all(
        "internal" in operation["responses"]["500"]["content"][MEDIA_TYPE]["examples"]
        for _, _, operation in operations()
    )
    described += [("404", anywhere["NotFound"]), ("405", anywhere["MethodNotAllowed"])]
    for status, response in described:
        body = response["content"][MEDIA_TYPE]
        assert body["examples"]
        for code, example in body["examples"].items():
            assert_valid(example["value"], body["schema"])
            answers.Problem.model_validate(example["value"], strict=True, extra="forbid")
            assert example["value"]["type"] == f"urn:upnext:problem:{code}"
            assert example["value"]["status"] == int(status)


def test_every_header_has_an_example_of_its_form() -> None:
    found = [
        resolved(header)
        for _, _, operation in operations()
        for response in (*operation["responses"].values(), *DOCUMENT["components"]["responses"].values())
        for header in response["headers"].values()
    ]
    for header in found:
        assert header["description"]
        assert_valid(header.get("example", header["schema"].get("const")), header["schema"])


async def test_answers_have_the_fields_and_headers_that_are_described(upnext: Running) -> None:
    assert ASKED.keys() == {(method, path) for method, path, _ in operations()}
    for method, path, operation in operations():
        url, body = ASKED[method, path]
        response = await upnext.peer(key=KEY).request(method, url, json=body)
        assert response.status_code == 200, response.text
        described = operation["responses"]["200"]
        assert_headers(response, described)
        if "application/json" in described["content"]:
            answered = response.json()
            assert_valid(answered, described["content"]["application/json"]["schema"])
            read = model_of(operation).model_validate(answered, extra="forbid")
            assert read.model_dump(mode="json") == answered, path  # no field is missing


async def test_the_parts_that_are_open_in_the_schema_have_the_fields_of_real_ones(upnext: Running) -> None:
    ask = upnext.peer(key=KEY).get
    info, models = (await ask("/info")).json()["bundle"], (await ask("/models")).json()["models"]
    for part in ("data", "availability", "history_policy"):
        assert answers.Info.example["bundle"][part].keys() == info[part].keys()
    for part in ("encoder", "parity", "index"):
        assert answers.Models.example["models"][0][part].keys() == models[0][part].keys()


def assert_headers(response: httpx.Response, described: dict[str, Any]) -> None:
    """The response has the headers that are described, and no others of its own."""
    usual = {"content-type", "content-length"}
    headers = {name.lower(): resolved(header) for name, header in described["headers"].items()}
    assert response.headers.keys() - usual == headers.keys(), response.request.url
    for name, header in headers.items():
        sent = response.headers[name]
        assert_valid(int(sent) if header["schema"].get("type") == "integer" else sent, header["schema"])


async def test_errors_have_the_headers_that_are_described(upnext: Running) -> None:
    ask, path = upnext.peer(key=KEY).get, DOCUMENT["paths"]["/items/{item_id}"]["get"]["responses"]
    assert_headers(await upnext.http.get("/items/3"), path["401"])
    assert_headers(await ask("/items/unheard-of"), path["404"])
    assert_headers(await ask("/items/3?n=1"), path["422"])
    anywhere = DOCUMENT["components"]["responses"]
    assert_headers(await ask("/nowhere"), anywhere["NotFound"])
    assert_headers(await upnext.peer(key=KEY).patch("/items/3"), anywhere["MethodNotAllowed"])
    bound = upnext.app.state.bound
    bound.limit, limit = 0, bound.limit
    assert_headers(await ask("/items/3"), path["503"])
    bound.limit = limit
    while (response := await ask("/items/3")).status_code == 200:
        pass
    assert_headers(response, path["429"])
