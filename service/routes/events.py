"""`POST /events` and `GET /users/{user_id}/history`."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Body, Depends
from starlette.responses import Response

from service import errors
from service.answers import EventsAnswer, HistoryAnswer
from service.bundles import Live
from service.errors import Fault
from service.ingest import Accepted, EventConflict, EventsErased, LogUnavailable, NewEvent
from service.routes.dependencies import NO_PARAMETERS, ServicesOf, TraceOf, UserPath, answer, described, query_of
from service.schemas import EXAMPLE_EVENT, EventBody, EventOrEvents, EventsBody, HistoryParameters
from shared.times import SECOND, now, render

HistoryQuery = Annotated[HistoryParameters, Depends(query_of(HistoryParameters))]
router = APIRouter(tags=["events"])

FUTURE = 5 * SECOND
"""How far clocks may differ."""

PERHAPS: Final = (
    "The event log did not answer; the events may be stored or not. With an event_id, send them again: it is safe."
)

_EXAMPLES: dict[str, Any] = {
    "one": {"summary": "One event", "value": EXAMPLE_EVENT},
    "many": {"summary": "Several", "value": {"events": [EXAMPLE_EVENT]}},
}


@router.post(
    "/events",
    response_model=EventsAnswer,
    summary="Tell what users did",
    dependencies=NO_PARAMETERS,
    responses=errors.responses(
        errors.Malformed,
        errors.Conflict,
        errors.Erased,
        errors.TooLarge,
        errors.Invalid,
        errors.LogDown,
        errors.Overloaded,
    ),
)
async def take_events(
    body: Annotated[EventOrEvents, Body(openapi_examples=_EXAMPLES)], services: ServicesOf, trace: TraceOf
) -> Response:
    """Store one event, or up to 500; all of them or none. The next recommendation sees them.

    The answer comes after the commit. With an `event_id` a retry is safe: the same event again is a `duplicate`, the
    same id with other fields a 409.
    """
    sent, base = (body.events, "/events/") if isinstance(body, EventsBody) else ([body], "")
    arrived, live = now(), services.live
    refuse_future(sent, base, arrived)
    events = [NewEvent(**vars(event)) for event in sent]
    try:
        with trace.stage("store"):
            taken = await services.log.append(events, live.policy, arrived)
    except EventConflict as conflict:
        detail = "An event with this user_id and event_id has other fields"
        raise errors.Conflict(errors=[_at(base, i, "", detail) for i in conflict.positions]) from conflict
    except EventsErased as erased:
        faults = [_at(base, i, "", f"The user was erased at {render(at)}") for i, at in erased.positions.items()]
        raise errors.Erased(errors=faults) from erased
    except LogUnavailable as error:
        raise errors.LogDown(PERHAPS if error.perhaps_written else None) from error
    accepted = sum(one.status == "accepted" for one in taken)
    services.metrics.count(services.metrics.events, "accepted", amount=accepted)
    services.metrics.count(services.metrics.events, "duplicate", amount=len(taken) - accepted)
    outcomes = [outcome(one, event, live) for one, event in zip(taken, sent, strict=True)]
    return answer({"accepted": accepted, "duplicates": len(taken) - accepted, "events": outcomes})


def outcome(taken: Accepted, event: EventBody, live: Live) -> dict[str, Any]:
    """What became of one event, and what it means here."""
    return {
        "event_id": taken.event_id,
        "status": taken.status,
        "known_item": live.knows(event.item_id),
        "known_type": live.policy.names(event.event_type),
    }


def refuse_future(events: list[EventBody], base: str, arrived: int) -> None:
    """Raise Invalid for events from the future: they would stay a user's newest event for as long."""
    detail = f"The time lies in the future; here it is {render(arrived)}"
    faults = [
        _at(base, i, "/timestamp", detail)
        for i, event in enumerate(events)
        if event.timestamp is not None and event.timestamp > arrived + FUTURE
    ]
    if faults:
        raise errors.Invalid(f"{faults[0]['pointer']}: {detail}", faults)


def _at(base: str, position: int, rest: str, detail: str) -> Fault:
    return {"pointer": (f"{base}{position}" if base else "") + rest, "detail": detail}


@router.get(
    "/users/{user_id}/history",
    response_model=HistoryAnswer,
    summary="What a user did",
    openapi_extra=described(HistoryParameters),
    responses=errors.responses(errors.Invalid, errors.LogDown, errors.Overloaded),
)
async def show_history(
    user_id: UserPath,
    parameters: HistoryQuery,
    services: ServicesOf,
) -> Response:
    """The user's newest events from the log, oldest first. A user without events has an empty history."""
    try:
        events = await services.log.history(user_id, parameters.limit)
    except LogUnavailable as error:
        raise errors.LogDown("The event log cannot be reached.") from error
    fields = ("event_id", "item_id", "event_type", "value", "recommendation_id", "session_id")
    rows = [{**{f: getattr(event, f) for f in fields}, "timestamp": render(event.timestamp)} for event in events]
    return answer({"user_id": user_id, "events": rows})
