"""For those who run the service: liveness, readiness, metrics, and what is loaded."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from service import errors
from service.answers import Info, Liveness, Models, Readiness
from service.bundles import Live
from service.routes.dependencies import NO_PARAMETERS, ServicesOf, answer
from service.version import VERSION
from shared.bundle import Bundle

router = APIRouter(tags=["operations"])


@router.get("/livez", response_model=Liveness, summary="Is the process alive", dependencies=NO_PARAMETERS,
            responses=errors.responses(errors.Invalid))  # fmt: skip
async def livez() -> Response:
    """The event loop answers; nothing else is looked at."""
    return answer({"status": "ok"})


@router.get("/readyz", response_model=Readiness, summary="Can it answer", dependencies=NO_PARAMETERS,
            responses=errors.responses(errors.Invalid, errors.NotReady))  # fmt: skip
async def readyz(services: ServicesOf) -> Response:
    """Models are loaded and warmed, and the live catalogue was read.

    Redis down is no reason to take the worker out: it answers from the log, or degraded, and so would all others.
    """
    live = services.live
    reasons = {
        "bundle": live.bundle_failure,
        "catalogue": live.catalogue_failure,
        "redis": None if await services.histories.ping() else "Redis does not answer; histories come from the log",
    }
    checks = {name: reason or "ok" for name, reason in reasons.items()}
    refuse_unready(live, checks)
    return answer({"status": "degraded" if any(reasons.values()) else "ready", "checks": checks})


def refuse_unready(live: Live, checks: dict[str, str]) -> None:
    """Raise NotReady, with all checks, where a recommendation would fail."""
    try:
        live.now_serving()
    except errors.Unavailable as error:
        raise errors.NotReady(str(error), checks=checks) from error


_EXPOSITION: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "Prometheus' text format.",
        "content": {
            "text/plain": {
                "schema": {"type": "string"},
                "example": "# HELP upnext_events_total Events taken, by outcome.\n"
                "# TYPE upnext_events_total counter\n"
                'upnext_events_total{status="accepted"} 1682.0\n',
            }
        },
    }
}


@router.get("/metrics", response_class=Response, summary="Prometheus metrics",
            responses=_EXPOSITION | errors.responses())  # fmt: skip
async def metrics(services: ServicesOf) -> Response:
    """Of all workers of this host together."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/info", response_model=Info, summary="What runs here", dependencies=NO_PARAMETERS,
            responses=errors.responses(errors.Invalid, errors.Overloaded))  # fmt: skip
async def info(services: ServicesOf) -> Response:
    """Versions, data and checksums."""
    serving = services.live.serving
    return answer(
        {
            "service_version": VERSION,
            "bundle": described(serving.bundle) if serving else None,
            "catalogue_revision": services.live.revision,
        }
    )


def described(bundle: Bundle) -> dict[str, Any]:
    """What /info says of a bundle."""
    wanted = {
        "version",
        "created",
        "schema_version",
        "default_model",
        "data",
        "availability",
        "history_policy",
        "files",
    }
    return bundle.manifest.model_dump(mode="json", include=wanted)


@router.get("/models", response_model=Models, summary="The models", dependencies=NO_PARAMETERS,
            responses=errors.responses(errors.Invalid, errors.Overloaded))  # fmt: skip
async def models(services: ServicesOf) -> Response:
    """Each model of the live bundle: shapes, search index, settings, and how it did on held-out data."""
    serving = services.live.serving
    if serving is None:
        return answer({"version": None, "models": []})
    default = serving.model(None, services.recommender.default_model).name
    listed = [
        {"name": name, "default": name == default, **model.info.model_dump(mode="json")}
        for name, model in serving.bundle.models.items()
    ]
    return answer({"version": serving.bundle.version, "models": listed})
