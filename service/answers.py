"""What comes out over HTTP. These models describe the answers in OpenAPI; see schemas.py for what goes in."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.events import ItemId


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

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "recommendation_id": "019aa5f2-7f6c-7c3e-8d0b-5a8c1f0e9b11",
                "user_id": "42",
                "model": {"name": "sasrec", "version": "2026-11-21T10-00-00Z-3f9c"},
                "as_of": "2026-11-21T10:00:00Z",
                "strategy": "sequence",
                "history_source": "cache",
                "exclusions": {"seen": True},
                "requested": 1,
                "returned": 1,
                "items": [
                    {
                        "rank": 1,
                        "item_id": "318",
                        "title": "Schindler's List",
                        "score": 7.91,
                        "available_from": "1993-01-01T00:00:00Z",
                        "reason": "sequence",
                    }
                ],
            }
        }
    )


class BatchAnswer(BaseModel):
    """One recommendation for each user."""

    results: list[RecommendationAnswer] = Field(description="In the order of the users.")


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

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "item_id": "50",
                "model": {"name": "sasrec", "version": "2026-11-21T10-00-00Z-3f9c"},
                "as_of": "2026-11-21T10:00:00Z",
                "strategy": "similar",
                "requested": 1,
                "returned": 1,
                "items": [
                    {
                        "rank": 1,
                        "item_id": "318",
                        "title": "Schindler's List",
                        "score": 0.83,
                        "available_from": "1993-01-01T00:00:00Z",
                        "reason": "similar",
                    }
                ],
            }
        }
    )


class OlderItem(BaseModel):
    """One item in the older form."""

    id: int | str = Field(description="A number where the item id is a whole number.")
    title: str | None
    score: float | None


class OlderAnswer(BaseModel):
    """Recommendations in the older form, best first."""

    recommendations: list[OlderItem]

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"recommendations": [{"id": 1, "title": "Toy Story (1995)", "score": 0.98}]},
        }
    )


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


class ErasureAnswer(BaseModel):
    """The user's events are gone."""

    user_id: str
    events: int = Field(description="How many were deleted, this time.")
    erased_at: str = Field(description="Events of the user up to this time are refused from now on.")


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


class ItemsAnswer(BaseModel):
    """A page of the catalogue, in the order of item ids."""

    items: list[ItemAnswer]
    next_cursor: ItemId | None = Field(description="For the next page; null on the last one.")


# --- operations ---------------------------------------------------------------------------------------


class Liveness(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Ready. `degraded` names what is down although answers are given."""

    status: Literal["ready", "degraded"]
    checks: dict[str, str] = Field(description="`ok`, or what is wrong, of: bundle, catalogue, redis.")


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


class ModelAnswer(BaseModel):
    """One model of the live bundle."""

    name: str
    default: bool
    kind: str
    encoder: dict[str, Any]
    fit: str
    parity: dict[str, Any]
    index: dict[str, Any]
    metrics: dict[str, Any]
    config: dict[str, Any]


class Models(BaseModel):
    """The models of the live bundle; none while there is no bundle."""

    version: str | None
    models: list[ModelAnswer]


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
