"""`DELETE /users/{user_id}`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from service import errors
from service.answers import ErasureAnswer
from service.erasure import ErasureUnavailable, ErasureUnknown
from service.routes.dependencies import NO_PARAMETERS, ServicesOf, UserPath, answer
from shared.times import render

router = APIRouter(tags=["events"])


@router.delete(
    "/users/{user_id}",
    response_model=ErasureAnswer,
    summary="Erase a user",
    dependencies=NO_PARAMETERS,
    responses=errors.responses(errors.Invalid, errors.LogDown, errors.SchemaBehind, errors.Overloaded),
)
async def erase_user(user_id: UserPath, services: ServicesOf) -> Response:
    """Delete all events of the user, and the history made of them. Again: those that have come since.

    A keyed hash of the id stays, with the time: events up to it are refused from then on, whoever sends them again,
    and left out where they come back from a backup or a file. Models trained before keep what they learnt until the
    next training.
    """
    try:
        done = await services.eraser.erase(user_id)
    except ErasureUnknown:
        raise errors.SchemaBehind() from None
    except ErasureUnavailable as error:
        unknown = "The event log cannot be reached or is busy. Whether the user was erased is not known: ask again."
        raise errors.LogDown(unknown) from error
    services.metrics.erasures.inc()
    return answer({"user_id": user_id, "events": done.events, "erased_at": render(done.erased_at)})
