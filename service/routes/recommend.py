"""`GET /recommend/{user_id}` and `POST /recommend`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from service import errors
from service.answers import RecommendationAnswer
from service.recommend import Question, Recommendation
from service.routes.dependencies import (
    NO_PARAMETERS,
    Services,
    ServicesOf,
    TraceOf,
    UserPath,
    answer,
    described,
    query_of,
)
from service.schemas import RecommendBody, RecommendParameters
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
        errors.UnknownModel, errors.Invalid, errors.NoBundle, errors.HistoryDown, errors.CatalogueDown
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
        errors.Malformed, errors.UnknownModel, errors.TooLarge, errors.Invalid, errors.NoBundle, errors.CatalogueDown
    ),
)
async def recommend_for_history(body: RecommendBody, services: ServicesOf, trace: TraceOf) -> Response:
    """The same for an anonymous session: the history comes with the request, and nothing is stored.

    With `as_of` a time, entries with a later timestamp do not count; `last_event` is the newest timestamp. Brought
    items count as seen. Unknown items are left out of the history.
    """
    return await _recommend(body.question(), services, trace)


async def _recommend(question: Question, services: Services, trace: Trace) -> Response:
    found = await services.recommender.recommend(question, trace)
    services.metrics.recommendations.labels(found.model, found.strategy, found.history_source).inc()
    return answer(rendered(found))


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
        "items": [
            {
                "rank": rank,
                "item_id": item.item_id,
                "title": item.title,
                "score": item.score,
                "available_from": item.available_from,
                "reason": item.reason,
            }
            for rank, item in enumerate(found.items, start=1)
        ],
    }
