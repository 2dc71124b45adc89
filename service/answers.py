"""What comes out over HTTP. These models describe the answers in OpenAPI; see schemas.py for what goes in.

Each answer has an example, all of one user, one item and one bundle, which description.py shows. (It would lose its
nulls in the model's schema, where FastAPI takes them out.) A test holds the examples against the models, and the models
against what the service answers, field by field.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, Field

from service.schemas import EXAMPLE_EVENT
from service.version import VERSION
from shared.events import ItemId

_VERSION: Final = "2026-11-21T10-00-00Z-3f9c"
_ANSWERED_BY: Final = {"name": "sasrec", "version": _VERSION}
_TITLE: Final = "Schindler's List (1993)"
_SINCE: Final = "1993-01-01T00:00:00Z"
_TYPES: Final = ["view", "click", "play", "read", "like", "rating", "cart", "purchase"]


class ModelName(BaseModel):
    """Which model of which bundle answered."""

    name: str
    version: str = Field(description="The bundle's version.")


class Exclusions(BaseModel):
    """What was left out."""

    seen: bool = Field(description="Whether seen items were left out; false also when they could not be.")


class RecommendedItem(BaseModel):
    """One recommended item."""

    rank: int
    item_id: ItemId
    title: str | None
    score: float | None = Field(
        description="Not comparable across models or bundles. Null for popular and new items: no model scored them."
    )
    available_from: str | None
    reason: Literal["sequence", "similar", "popular", "new"] = Field(
        description="`new`: added since the bundle was made, so neither scored nor counted yet."
    )


_RECOMMENDATION: Final[dict[str, Any]] = {
    "recommendation_id": "019aa5f2-7f6c-7c3e-8d0b-5a8c1f0e9b11",
    "user_id": "42",
    "model": _ANSWERED_BY,
    "as_of": "2026-11-21T10:00:00Z",
    "strategy": "sequence",
    "history_source": "cache",
    "exclusions": {"seen": True},
    "requested": 1,
    "returned": 1,
    "items": [
        {
            "rank": 1, "item_id": "318", "title": _TITLE, "score": 7.91, "available_from": _SINCE,
            "reason": "sequence",
        }
    ],
}  # fmt: skip


class RecommendationAnswer(BaseModel):
    """Recommendations, best first."""

    recommendation_id: str = Field(description="UUIDv7; send it along with events that came from this answer.")
    user_id: str | None = Field(description="Null where the request brought the history.")
    model: ModelName
    as_of: str
    strategy: Literal["sequence", "popular", "degraded"] = Field(
        description="`sequence`: a model read the history; `popular`: it holds no known item; `degraded`: it could not "
        "be read, so these are popular items and may be seen ones."
    )
    history_source: Literal["cache", "log", "request", "none"]
    exclusions: Exclusions
    requested: int
    returned: int
    items: list[RecommendedItem]

    example: ClassVar[dict[str, Any]] = _RECOMMENDATION


class BatchAnswer(BaseModel):
    """One recommendation for each user."""

    results: list[RecommendationAnswer] = Field(description="In the order of the users.")

    example: ClassVar[dict[str, Any]] = {"results": [_RECOMMENDATION]}


class SimilarAnswer(BaseModel):
    """Items like an item, best first."""

    item_id: ItemId
    model: ModelName
    as_of: str
    strategy: Literal["similar", "popular"] = Field(
        description="`similar`: by the model's vectors; `popular`: it has no vector, so items that share categories "
        "with it, by the number shared and then by popularity."
    )
    requested: int
    returned: int
    items: list[RecommendedItem] = Field(description="Scores are cosines, from -1 to 1.")

    example: ClassVar[dict[str, Any]] = {
        "item_id": "318",
        "model": _ANSWERED_BY,
        "as_of": "2026-11-21T10:00:00Z",
        "strategy": "similar",
        "requested": 1,
        "returned": 1,
        "items": [
            {
                "rank": 1, "item_id": "64", "title": "Shawshank Redemption, The (1994)", "score": 0.83,
                "available_from": "1994-01-01T00:00:00Z", "reason": "similar",
            }
        ],
    }  # fmt: skip


class OlderItem(BaseModel):
    """One item in the older form."""

    id: int | str = Field(description="A number where the item id is a whole number.")
    title: str | None
    score: float | None


class OlderAnswer(BaseModel):
    """Recommendations in the older form, best first."""

    recommendations: list[OlderItem]

    example: ClassVar[dict[str, Any]] = {"recommendations": [{"id": 1, "title": "Toy Story (1995)", "score": 0.98}]}


class EventOutcome(BaseModel):
    """What became of one event."""

    event_id: str
    status: Literal["accepted", "duplicate"]
    known_item: bool = Field(description="Whether the live bundle or catalogue has the item.")
    known_type: bool = Field(
        description="Whether the bundle's history policy names the type. An event of another type is stored and "
        "touches nothing else."
    )


class EventsAnswer(BaseModel):
    """The events are in the log, and the next recommendation sees them."""

    accepted: int
    duplicates: int
    events: list[EventOutcome] = Field(description="In the order of the request.")

    example: ClassVar[dict[str, Any]] = {
        "accepted": 1,
        "duplicates": 0,
        "events": [{"event_id": "c0a8f1", "status": "accepted", "known_item": True, "known_type": True}],
    }


_STORED: Final = {name: value for name, value in EXAMPLE_EVENT.items() if name != "user_id"}


class StoredEvent(BaseModel):
    """An event of the log."""

    event_id: str
    item_id: ItemId
    event_type: str
    value: float | None
    timestamp: str
    recommendation_id: str | None
    session_id: str | None


class HistoryAnswer(BaseModel):
    """A user's newest events, oldest first."""

    user_id: str
    events: list[StoredEvent]

    example: ClassVar[dict[str, Any]] = {"user_id": EXAMPLE_EVENT["user_id"], "events": [_STORED]}


class ErasureAnswer(BaseModel):
    """The user's events are gone."""

    user_id: str
    events: int = Field(description="How many were deleted, this time.")
    erased_at: str = Field(description="Events of the user up to this time are refused from now on.")

    example: ClassVar[dict[str, Any]] = {"user_id": "42", "events": 57, "erased_at": "2026-11-21T10:00:00.482133Z"}


_ITEM: Final[dict[str, Any]] = {
    "item_id": "318",
    "title": _TITLE,
    "categories": ["genre:Drama", "genre:War"],
    "available_from": _SINCE,
    "available_until": "2027-01-01T00:00:00Z",
    "withdrawn": False,
    "available": True,
    "in_bundle": True,
    "revision": 7,
}
EXAMPLE_WITHDRAWN: Final = _ITEM | {"withdrawn": True, "available": False, "revision": 8}


class ItemAnswer(BaseModel):
    """An item as it is now: the bundle's values with the live catalogue's on top."""

    item_id: ItemId
    title: str | None
    categories: list[str]
    available_from: str | None = Field(description="Null: since ever.")
    available_until: str | None = Field(description="Null: for ever.")
    withdrawn: bool
    available: bool = Field(description="Whether it exists now.")
    in_bundle: bool = Field(
        description="Whether a model has a vector for it. Others come last among popular items and named candidates."
    )
    revision: int | None = Field(description="Of the live catalogue at the item's last change; null: never changed.")

    example: ClassVar[dict[str, Any]] = _ITEM


class ItemsAnswer(BaseModel):
    """A page of the catalogue, in the order of item ids."""

    items: list[ItemAnswer]
    next_cursor: ItemId | None = Field(description="For the next page; null on the last one.")

    example: ClassVar[dict[str, Any]] = {"items": [_ITEM], "next_cursor": "318"}


# --- operations ---------------------------------------------------------------------------------------


class Liveness(BaseModel):
    """The process answers."""

    status: Literal["ok"]

    example: ClassVar[dict[str, Any]] = {"status": "ok"}


class Readiness(BaseModel):
    """Ready. `degraded` names what is down although answers are given."""

    status: Literal["ready", "degraded"]
    checks: dict[str, str] = Field(description="`ok`, or what is wrong, of: bundle, catalogue, redis.")

    example: ClassVar[dict[str, Any]] = {
        "status": "ready",
        "checks": {"bundle": "ok", "catalogue": "ok", "redis": "ok"},
    }


class BundleInfo(BaseModel):
    """The live bundle."""

    version: str
    created: str
    schema_version: int
    default_model: str
    data: dict[str, Any]
    availability: dict[str, Any]
    history_policy: dict[str, Any]
    files: dict[str, Any] = Field(description="Size and sha256 of each file.")


class Info(BaseModel):
    """What runs here."""

    service_version: str
    bundle: BundleInfo | None
    catalogue_revision: int

    example: ClassVar[dict[str, Any]] = {
        "service_version": VERSION,
        "bundle": {
            "version": _VERSION,
            "created": "2026-11-21T10:00:00Z",
            "schema_version": 2,
            "default_model": "sasrec",
            "data": {
                "source": "ml-100k", "fingerprint": "1f072150fb11caf2", "events": 100000, "users": 943,
                "items": 1682, "first_event": "1997-09-20T03:05:10Z", "last_event": "1998-04-22T23:10:38Z",
                "has_times": True,
            },
            "availability": {
                "policy": "first_event", "declared": 1681, "from_first_event": 1, "always": 0, "from_data_end": 0,
                "contradicted": 14, "never": 0, "events_before_declared": 33,
            },
            "history_policy": {
                "sequence_types": _TYPES, "seen_types": _TYPES, "minimum_value": None, "collapse_repeats": False,
            },
            "files": {
                "items.jsonl": {
                    "size": 281457,
                    "sha256": "cacabf68126e9b5172750a32a9e3e3f47782c1813ba0d03149c7782484c3a8b4",
                }
            },
        },
        "catalogue_revision": 7,
    }  # fmt: skip


class ModelAnswer(BaseModel):
    """One model of the live bundle."""

    name: str
    default: bool
    kind: str
    encoder: dict[str, Any]
    fit: str
    epochs: int | None = Field(description="That these weights were trained for.")
    parity: dict[str, Any]
    index: dict[str, Any]
    metrics: dict[str, Any]
    config: dict[str, Any]


class Models(BaseModel):
    """The models of the live bundle; none while there is no bundle."""

    version: str | None
    models: list[ModelAnswer]

    example: ClassVar[dict[str, Any]] = {
        "version": _VERSION,
        "models": [
            {
                "name": "sasrec",
                "default": True,
                "kind": "encoder",
                "encoder": {
                    "architecture": "sasrec", "item_count": 1682, "width": 64, "max_length": 200,
                    "asks_with_mask": False, "buckets": [8, 16, 24, 200], "clock": "none", "largest_time": 0,
                },
                "fit": "all",
                "epochs": 10,
                "parity": {
                    "lengths": [1, 199, 200, 205], "max_vector_difference": 1.2e-06,
                    "max_score_difference": 1.7e-06, "top10_changes": 0, "max_tower_difference": None,
                },
                "index": {
                    "space": "ip", "m": 16, "ef_construction": 200, "ef": 200, "recall_at_10": 0.9999,
                    "recall_at_100": 0.9989,
                },
                "metrics": {"bundle": {"cases": 943, "users": 943, "hr@10": 0.1771, "ndcg@10": 0.0928}},
                "config": {"name": "sasrec", "model": {"hidden_units": 64, "blocks": 2}},
            }
        ],
    }  # fmt: skip


class Fault(BaseModel):
    """One wrong place in the request."""

    pointer: str | None = Field(None, description="JSON pointer into the body.")
    parameter: str | None = Field(None, description="Query or path parameter.")
    detail: str


class Problem(BaseModel):
    """RFC 9457 problem details: the form of every error."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: list[Fault] = Field(default=[], description="For 422 and 409: each wrong place.")
    checks: dict[str, str] = Field(
        default={}, description="For `not_ready`: what `/readyz` looks at, `ok` or the reason."
    )
