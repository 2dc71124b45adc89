"""What goes in over HTTP: parameters and bodies, which forbid fields that do not exist. See answers.py for the rest."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from service.recommend import Brought, Question
from shared import times
from shared.categories import Where
from shared.events import EVENT_TYPE_PATTERN, ID_PATTERN

MAX_N: Final = 100
MAX_EXCLUDE: Final = 100
MAX_CANDIDATES: Final = 1_000
MAX_HISTORY: Final = 1_000
MAX_EVENTS: Final = 500
MAX_USERS: Final = 256
MAX_FILTERS: Final = 100
_FIRST, _LAST = (times.of_datetime(bound.replace(tzinfo=UTC)) for bound in (datetime.min, datetime.max))


def _not_dots(text: str) -> str:
    if text in (".", ".."):
        raise ValueError('"." and ".." cannot be ids: they vanish from URLs')
    return text


def _parse_time(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError("write a time as text: 2026-11-21T10:00:00Z")
    try:
        moment = times.parse(value)
    except ValueError as error:
        raise ValueError(f"{error}; in a URL, write + as %2B" if " " in value else str(error)) from None
    if not _FIRST <= moment <= _LAST:
        raise ValueError("the time is outside the years 1 to 9999, UTC")
    return moment


def _parse_as_of(value: object) -> object:
    return value if value == "last_event" else _parse_time(value)


def _strings(values: object) -> object:
    """Categories as a list of "field:value", also from {"field": ["value", ...]}."""
    if not isinstance(values, dict):
        return values
    if not all(isinstance(v, list) and all(isinstance(value, str) for value in v) for v in values.values()):
        raise ValueError('write {"genre": ["Comedy", "Drama"]} or ["genre:Comedy", "genre:Drama"]')
    if any(":" in name for name in values):
        raise ValueError("the name of a field has no colon")
    return [f"{name}:{value}" for name, listed in values.items() for value in listed]


def _whole(value: object) -> object:
    """JSON knows no integers: 5.0 is 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("the character NUL cannot be stored")
    return text


def _category(text: str) -> str:
    name, _, value = text.partition(":")
    if not name or not value:
        raise ValueError('a category is "field:value", for instance "genre:Comedy"')
    return text


# What a pattern can say of "." and ".." stands in the description alone: pydantic's own patterns cannot look ahead.
_ID_IN_DESCRIPTION: Final = {"pattern": ID_PATTERN.replace("^", r"^(?!\.{1,2}$)", 1)}
Whole = Annotated[int, BeforeValidator(_whole)]
Id = Annotated[str, Field(pattern=ID_PATTERN, json_schema_extra=_ID_IN_DESCRIPTION), AfterValidator(_not_dots)]
Time = Annotated[
    int,
    BeforeValidator(_parse_time),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-11-21T10:00:00Z"]}),
]
AsOfField = Annotated[
    int | Literal["last_event"],
    BeforeValidator(_parse_as_of),
    WithJsonSchema({"type": "string", "examples": ["2026-11-21T10:00:00Z", "last_event"]}),
]
_CATEGORY_IN_DESCRIPTION: Final = {"pattern": "^[^:\\u0000]+:[^\\u0000]+$"}
Category = Annotated[
    str,
    Field(max_length=256, json_schema_extra=_CATEGORY_IN_DESCRIPTION),
    AfterValidator(_storable),
    AfterValidator(_category),
]

_AS_OF = (
    "Answer as of this time (RFC 3339 with offset): only items that exist then, only events up to then. `last_event` "
    "means the time of the user's newest event. Absent: items of now, and the whole history."
)


class Strict(BaseModel):
    """Fields that do not exist are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StrictBody(Strict):
    """JSON has types of its own: a text is no number, and 0 is not false."""

    model_config = ConfigDict(strict=True)


class NoParameters(Strict):
    """For routes without query parameters."""


# --- recommendations ----------------------------------------------------------------------------------


class _Wishes(Strict):
    model: str | None = Field(None, max_length=64, description="A model of the live bundle. Absent: the default one.")
    n: Whole = Field(10, ge=1, le=MAX_N, description="How many items. Fewer come back only when fewer are permitted.")
    as_of: AsOfField | None = Field(None, description=_AS_OF)
    exclude_seen: bool = Field(True, description="Leave out everything in the user's history, however long ago.")
    exclude: list[Id] = Field(default=[], max_length=MAX_EXCLUDE, description="Item ids to leave out; repeatable.")
    filter: list[Category] = Field(
        default=[],
        max_length=MAX_FILTERS,
        description="Only items of these categories, each `field:value`; repeatable. Values of one field are "
        "alternatives, and each field named must be met. A field that no item has is an error.",
        examples=[["genre:Comedy", "genre:Drama"]],
    )
    filter_out: list[Category] = Field(
        default=[],
        max_length=MAX_FILTERS,
        description="No items of any of these categories; repeatable.",
        examples=[["genre:Horror"]],
    )
    available_after: Time | None = Field(
        None, description="Only items whose `available_from` is this time or later. Null counts as before all times."
    )
    available_before: Time | None = Field(
        None, description="Only items whose `available_from` is this time or earlier."
    )

    def where(self) -> Where | None:
        """The filters; None without any."""
        if not (
            self.filter or self.filter_out or self.available_after is not None or self.available_before is not None
        ):
            return None
        return Where(tuple(self.filter), tuple(self.filter_out), self.available_after, self.available_before)

    def wishes(self) -> dict[str, Any]:
        """The fields of a Question that all forms of it share."""
        return {
            "model": self.model,
            "n": self.n,
            "as_of": self.as_of,
            "exclude_seen": self.exclude_seen,
            "exclude": self.exclude,
            "where": self.where(),
        }


_REQUIRE_SEEN: Final = "Rather a 503 than an answer that could not leave out seen items, when histories are down."


class RecommendParameters(_Wishes):
    """The query of `GET /recommend/{user_id}`."""

    require_seen: bool = Field(False, description=_REQUIRE_SEEN)

    def question(self, user_id: str) -> Question:
        """As the domain has it."""
        return Question(user_id=user_id, require_seen=self.require_seen, **self.wishes())


class BatchBody(_Wishes, StrictBody):
    """The body of `POST /recommend/batch`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"users": ["42", "43"], "n": 5},
                {"users": ["42"], "model": "sasrec", "filter": ["genre:Comedy"], "exclude": ["318"]},
            ]
        }
    )

    users: list[Id] = Field(min_length=1, max_length=MAX_USERS, description="User ids.")
    require_seen: bool = Field(False, description=_REQUIRE_SEEN)

    def question(self) -> Question:
        """As the domain has it, for no user yet."""
        return Question(require_seen=self.require_seen, in_body=True, **self.wishes())


class OlderBody(StrictBody):
    """The body of `POST /api/recommend/`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": 1, "model": "sasrec"}, {"user_id": "u-1", "n": 5}]}
    )

    user_id: Annotated[int, Field(strict=True, gt=-(2**53), lt=2**53), BeforeValidator(_whole)] | Id = Field(
        description='A number counts as its digits: 1 and "1" are one user. A larger number is sent as text.'
    )
    model: str | None = Field(None, max_length=64, description="A model of the live bundle. Absent: the default one.")
    n: Whole = Field(10, ge=1, le=MAX_N, description="How many items.")

    def question(self) -> Question:
        """As the domain has it."""
        return Question(user_id=str(self.user_id), model=self.model, n=self.n, in_body=True)


class SimilarParameters(Strict):
    """The query of `GET /items/{item_id}/similar`."""

    model: str | None = Field(None, max_length=64, description="A model of the live bundle. Absent: the default one.")
    n: Whole = Field(10, ge=1, le=MAX_N, description="How many items. Fewer come back only when fewer are permitted.")
    as_of: Time | None = Field(None, description="Only items that exist at this time. Absent: now.")


class HistoryEntry(StrictBody):
    """One place of a history that the caller brings, with its time."""

    item_id: Id
    timestamp: Time


def _ids_or_entries(history: Any) -> str:
    return "entries" if isinstance(history, list) and history and not isinstance(history[0], str) else "ids"


def _one_list(schema: dict[str, Any]) -> None:
    """Describe "a list of ids or a list of entries" as one list: makers of clients do not tell two lists apart."""
    branches = schema.pop("anyOf", None) or schema.pop("oneOf")
    schema |= {"type": "array", "maxItems": MAX_HISTORY, "items": {"anyOf": [branch["items"] for branch in branches]}}


class RecommendBody(_Wishes, StrictBody):
    """The body of `POST /recommend`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"history": ["1", "318", "260"], "n": 5},
                {"history": [{"item_id": "1", "timestamp": "2026-11-21T10:00:00Z"}], "as_of": "last_event"},
                {"history": ["1"], "candidates": ["318", "260", "50"], "model": "sasrec"},
                {
                    "history": ["1"],
                    "filter": ["genre:Comedy", "genre:Drama"],
                    "available_after": "1990-01-01T00:00:00Z",
                },
            ]
        }
    )

    history: Annotated[
        Annotated[list[Id], Field(max_length=MAX_HISTORY), Tag("ids")]
        | Annotated[list[HistoryEntry], Field(max_length=MAX_HISTORY), Tag("entries")],
        Discriminator(_ids_or_entries),
    ] = Field(
        description="Item ids, oldest first; or ids with timestamps on all, sorted here (stable on ties).",
        json_schema_extra=_one_list,
    )
    candidates: list[Id] | None = Field(
        None,
        max_length=MAX_CANDIDATES,
        description="Rank these items alone. Unknown ones, and those that do not exist at `as_of`, are excluded, seen "
        "or filtered, do not come back. Items added since the bundle, which no model can score, come last.",
    )

    @field_validator("history", mode="before")
    @classmethod
    def _timestamps_on_all_or_none(cls, history: Any) -> Any:
        if isinstance(history, list) and len({isinstance(entry, str) for entry in history}) > 1:
            raise ValueError("put timestamps on all entries or on none")
        return history

    def question(self) -> Question:
        """As the domain has it."""
        ids = [e if isinstance(e, str) else e.item_id for e in self.history]
        stamps = [e.timestamp for e in self.history if isinstance(e, HistoryEntry)]
        return Question(brought=Brought(ids, stamps or None), candidates=self.candidates, in_body=True, **self.wishes())


# --- events -------------------------------------------------------------------------------------------

EXAMPLE_EVENT: Final[dict[str, JsonValue]] = {
    "event_id": "c0a8f1",
    "user_id": "42",
    "item_id": "318",
    "event_type": "view",
    "value": 4.0,
    "timestamp": "2026-11-21T10:00:00Z",
    "recommendation_id": "019aa5f2-7f6c-7c3e-8d0b-5a8c1f0e9b11",
    "session_id": "s1",
}


class EventBody(StrictBody):
    """One event."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_EVENT]})

    event_id: Id | None = Field(None, description="Makes a retry safe. Absent: a new event each time.")
    user_id: Id
    item_id: Id
    event_type: str = Field(pattern=EVENT_TYPE_PATTERN, description="For instance view, like, purchase.")
    value: float | None = Field(None, strict=True, allow_inf_nan=False, description="For instance a rating.")
    timestamp: Time | None = Field(None, description="When it happened; absent: now. At most 5 s in the future.")
    recommendation_id: Id | None = Field(None, description="The answer that led to the event.")
    session_id: Id | None = None


class EventsBody(StrictBody):
    """Several events; all are stored or none."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"events": [EXAMPLE_EVENT]}]})

    events: list[EventBody] = Field(min_length=1, max_length=MAX_EVENTS)


def _one_or_many(body: Any) -> str:
    return "many" if isinstance(body, EventsBody) or (isinstance(body, dict) and "events" in body) else "one"


EventOrEvents = Annotated[
    Annotated[EventBody, Tag("one")] | Annotated[EventsBody, Tag("many")], Discriminator(_one_or_many)
]


class HistoryParameters(Strict):
    """The query of `GET /users/{user_id}/history`."""

    limit: int = Field(100, ge=1, le=1000, description="How many of the newest events.")


# --- items --------------------------------------------------------------------------------------------


class PageParameters(Strict):
    """The query of `GET /items`."""

    cursor: Id | None = Field(None, description="`next_cursor` of the page before. Absent: the first page.")
    limit: int = Field(100, ge=1, le=1000, description="Items on a page.")


class ItemBody(StrictBody):
    """What is to hold for an item. A field that is absent keeps its value; null goes back to what the bundle says."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "title": "Schindler's List (1993)",
                    "categories": ["genre:Drama", "genre:War"],
                    "available_from": "1993-01-01T00:00:00Z",
                },
                {"categories": {"genre": ["Drama", "War"]}, "available_until": "2027-01-01T00:00:00Z"},
            ]
        }
    )

    title: (
        Annotated[
            str, Field(max_length=1000, json_schema_extra={"pattern": "^[^\\u0000]*$"}), AfterValidator(_storable)
        ]
        | None
    ) = None
    categories: (
        Annotated[
            list[Category],
            Field(max_length=100),
            BeforeValidator(_strings),
            WithJsonSchema(
                {
                    "anyOf": [
                        {"type": "array", "maxItems": 100, "items": {"type": "string"} | _CATEGORY_IN_DESCRIPTION},
                        {
                            "type": "object",
                            "propertyNames": {"pattern": "^[^:\\u0000]+$"},
                            "additionalProperties": {
                                "type": "array",
                                "items": {"type": "string", "pattern": "^[^\\u0000]+$"},
                            },
                        },
                    ]
                }
            ),
        ]
        | None
    ) = Field(None, description='["genre:Comedy"] or {"genre": ["Comedy"]}.')
    available_from: Time | None = Field(None, description="Inclusive.")
    available_until: Time | None = Field(None, description="Exclusive.")
    withdrawn: Annotated[bool, Field(strict=True)] | None = Field(
        None, description="Not to be returned at any time until this is false again."
    )

    @model_validator(mode="after")
    def _interval(self) -> ItemBody:
        if None not in (self.available_from, self.available_until) and self.available_from >= self.available_until:  # type: ignore[operator]
            raise ValueError("available_until must lie after available_from")
        return self
