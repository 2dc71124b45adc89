"""The OpenAPI document: what it says of the service as a whole, and what holds for every operation.

What one operation takes, answers and refuses stands with its route; its keys and scopes in access.py.
"""

from __future__ import annotations

from typing import Any, Final

from service import access, answers, errors
from service.access import operations
from service.errors import MethodNotAllowed, NotFound
from service.routes.dependencies import PRIVATE

DESCRIPTION: Final = """
What next, for a user, from the order of what they did.

1. Tell what users do with `POST /events`.
2. Ask `GET /recommend/{user_id}`: items that exist, that the user has not seen, best first.
3. Narrow it down with `filter=genre:Comedy`, ask for many users at once with `POST /recommend/batch`, or for items
   like an item with `GET /items/{item_id}/similar`.
4. Keep items up to date with `PUT /items/{item_id}`; a withdrawn item is gone from all answers at once.

- **Ids** are your own strings of `A-Z a-z 0-9 _ . : @ + = ~ | -`, up to 256 characters.
- **Times** are RFC 3339 with an offset, `2026-11-21T10:00:00Z`; a time without one is an error.
- **Unknown parameters and fields** are errors, never silently ignored, but by `/metrics` and the documents, which take
  none.
- **Errors** are [RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) `application/problem+json` with a stable `type`;
  a 429 and a 503 say in `Retry-After` when to come back.
- **Other paths and methods** belong to no operation: a path that does not exist is a 404 `not_found`, a method that a
  path does not have a 405 `method_not_allowed`, which names in `Allow` those that it has. Both are described under
  `components/responses`.
- **Keys**: send `Authorization: Bearer <key>`. A service without keys answers callers on its own machine alone.
- Every response carries `X-Request-Id`: send your own, or use ours when you report a problem. `Server-Timing` tells
  where the time went.
"""

TAGS: Final = [
    {"name": "recommendations", "description": "What next?"},
    {"name": "events", "description": "What users did. Stored durably before the answer, seen by the next request."},
    {"name": "catalogue", "description": "Items: what they are called, and when they exist."},
    {"name": "operations", "description": "For those who run the service."},
]

_HEADERS: Final[dict[str, dict[str, Any]]] = {
    "X-Request-Id": {
        "description": "Names the request in the log: what you sent as `X-Request-Id` if it is an id, else a UUIDv7.",
        "required": True,
        "schema": {"type": "string"},
        "example": "019aa5f2-7f6c-7c3e-8d0b-5a8c1f0e9b11",
    },
    "Server-Timing": {
        "description": "Milliseconds of each stage, and how the items were found. A request that is refused because "
        "too many are in flight may come without.",
        "schema": {"type": "string"},
        "example": 'read;dur=0.412, encode;dur=0.198, retrieve;dur=0.102;desc="exact", total;dur=0.951',
    },
    "X-Model-Version": {
        "description": "Version of the bundle that answered.",
        "schema": {"type": "string"},
        "example": "2026-11-21T10-00-00Z-3f9c",
    },
    "Cache-Control": {
        "description": "Answers are about somebody, and of this moment: no cache may keep them.",
        "schema": {"type": "string", "const": PRIVATE["Cache-Control"]},
    },
}


def complete(document: dict[str, Any]) -> None:
    """Add what holds for every operation: headers, examples of answers, keys, and the form of all errors.

    Twice is as good: FastAPI keeps the document.
    """
    components = document["components"]
    problem = answers.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components["schemas"].update(problem.pop("$defs"), Problem=problem)
    anywhere = errors.responses(NotFound, MethodNotAllowed)
    components["responses"] = {kind.__name__: anywhere[kind.status] for kind in (NotFound, MethodNotAllowed)}
    components["headers"] = _HEADERS
    access.describe(document)
    for _, _, operation in operations(document):
        answered = operation["responses"]["200"]
        if (body := answered["content"].get("application/json")) is not None:
            body.setdefault("example", getattr(answers, body["schema"]["$ref"].rpartition("/")[2]).example)
            _refer(answered, "Cache-Control")
        if "recommendations" in operation["tags"]:
            _refer(answered, "X-Model-Version")
        for response in operation["responses"].values():
            _refer(response, "X-Request-Id", "Server-Timing")
    for response in components["responses"].values():
        _refer(response, "X-Request-Id", "Server-Timing")


def _refer(response: dict[str, Any], *names: str) -> None:
    headers = response.setdefault("headers", {})
    headers.update({name: {"$ref": f"#/components/headers/{name}"} for name in names})
