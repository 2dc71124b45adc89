"""`GET /recommend/{user_id}`, `POST /recommend`, `POST /recommend/batch`, and the older `POST /api/recommend/`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import orjson
from fastapi import APIRouter, Depends
from starlette.responses import Response

from service import errors
from service.answers import BatchAnswer, OlderAnswer, RecommendationAnswer
from service.batch import recommend_all
from service.recommend import Question, Recommendation, Recommended
from service.routes.dependencies import (
    NO_PARAMETERS,
    Services,
    ServicesOf,
    TraceOf,
    UserPath,
    answer,
    described,
    dumped,
    query_of,
)
from service.schemas import BatchBody, OlderBody, RecommendBody, RecommendParameters
from service.telemetry import Trace
from shared.times import render

RecommendQuery = Annotated[RecommendParameters, Depends(query_of(RecommendParameters))]
router = APIRouter(tags=["recommendations"])


@router.get(
    "/recommend/{user_id}",
    response_model=RecommendationAnswer,
    summary="What next, for a user",
    openapi_extra=described(RecommendParameters),
    responses=errors.responses(
        errors.UnknownModel,
        errors.Invalid,
        errors.NoBundle,
        errors.HistoryDown,
        errors.CatalogueDown,
        errors.Overloaded,
    ),
)
async def recommend_for_user(
    user_id: UserPath,
    parameters: RecommendQuery,
    services: ServicesOf,
    trace: TraceOf,
) -> Response:
    """Items that the user is likely to want next, given the order of what they did.

    Items that do not exist at `as_of`, and items the user has seen, never come back: rather fewer items than asked
    for, with a 200. A user about whom nothing is known gets popular items. When histories cannot be read the answer
    is popular items too, marked `degraded`; set `require_seen` to get a 503 instead.
    """
    return await _recommend(parameters.question(user_id), services, trace)


@router.post(
    "/recommend",
    response_model=RecommendationAnswer,
    summary="What next, for a history that the caller brings",
    dependencies=NO_PARAMETERS,
    responses=errors.responses(
        errors.Malformed,
        errors.UnknownModel,
        errors.TooLarge,
        errors.Invalid,
        errors.NoBundle,
        errors.CatalogueDown,
        errors.Overloaded,
    ),
)
async def recommend_for_history(body: RecommendBody, services: ServicesOf, trace: TraceOf) -> Response:
    """The same for an anonymous session: the history comes with the request, and nothing is stored.

    With `as_of` a time, entries with a later timestamp do not count; `last_event` is the newest timestamp. Brought
    items count as seen. Unknown items are left out of the history.
    """
    return await _recommend(body.question(), services, trace)


_FOR_USERS: Final = errors.responses(
    errors.Malformed,
    errors.UnknownModel,
    errors.TooLarge,
    errors.Invalid,
    errors.NoBundle,
    errors.HistoryDown,
    errors.CatalogueDown,
    errors.Overloaded,
)


@router.post(
    "/recommend/batch",
    response_model=BatchAnswer,
    summary="What next, for many users",
    dependencies=NO_PARAMETERS,
    responses=_FOR_USERS,
)
async def recommend_for_users(body: BatchBody, services: ServicesOf, trace: TraceOf) -> Response:
    """One recommendation for each of up to 256 users, in order, each as `GET /recommend/{user_id}` would give it.

    One bundle answers all of them. Single requests go ahead meanwhile. With `as_of=last_event`, or `require_seen`, one
    user for whom there is no answer makes the whole request an error.
    """
    results = [  # bytes one by one: a large answer made in one go would hold up everybody
        orjson.Fragment(dumped(rendered(counted(found, services))))
        async for found in recommend_all(services.recommender, body.users, body.question(), trace)
    ]
    return answer({"results": results})


@router.post(
    "/api/recommend/",
    response_model=OlderAnswer,
    summary="What next, in the form of an older client",
    dependencies=NO_PARAMETERS,
    responses=_FOR_USERS,
)
async def recommend_as_before(body: OlderBody, services: ServicesOf, trace: TraceOf) -> Response:
    """`GET /recommend/{user_id}` for a client that sends a body and expects three fields an item.

    Ids that are whole numbers come back as numbers. The score is null for popular items, which no model scored.
    """
    found = counted(await services.recommender.recommend(body.question(), trace), services)
    return answer(
        {"recommendations": [{"id": number(i.item_id), "title": i.title, "score": i.score} for i in found.items]}
    )


def number(item_id: str) -> int | str:
    """The id as a number if it is one and JSON readers can hold it: "42" -> 42, but "042" and "1e3" stay text."""
    if not (item_id.isdecimal() and item_id.isascii() and len(item_id) <= len(str(_EXACT))):
        return item_id
    value = int(item_id)
    return value if str(value) == item_id and value <= _EXACT else item_id


_EXACT: Final = 2**53 - 1
"""The largest whole number below which JavaScript and others tell all apart."""


async def _recommend(question: Question, services: Services, trace: Trace) -> Response:
    return answer(rendered(counted(await services.recommender.recommend(question, trace), services)))


def counted(found: Recommendation, services: Services) -> Recommendation:
    """`found`, seen by the metrics."""
    metrics = services.metrics
    metrics.count(metrics.recommendations, found.model, found.strategy, found.history_source)
    return found


def rendered(found: Recommendation) -> dict[str, Any]:
    """The answer as JSON content."""
    return {
        "recommendation_id": found.recommendation_id,
        "user_id": found.user_id,
        "model": {"name": found.model, "version": found.version},
        "as_of": render(found.as_of),
        "strategy": found.strategy,
        "history_source": found.history_source,
        "exclusions": {"seen": found.seen_excluded},
        "requested": found.requested,
        "returned": len(found.items),
        "items": listed(found.items),
    }


def listed(items: Sequence[Recommended]) -> list[dict[str, Any]]:
    """Items as JSON content."""
    return [
        {
            "rank": rank,
            "item_id": item.item_id,
            "title": item.title,
            "score": item.score,
            "available_from": item.available_from,
            "reason": item.reason,
        }
        for rank, item in enumerate(items, start=1)
    ]
