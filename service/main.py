"""The application: `create_app`, and the lifespan that builds and closes everything it uses.

Importable by uvicorn as a factory: `uvicorn --factory service.main:create_app`. `python -m service` does that, and
starts what is missing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service import description, errors
from service.access import Door
from service.bundles import Live
from service.catalogue import LiveCatalogue
from service.direct import Direct
from service.erasure import Eraser
from service.history import HistoryStore, create_cluster, create_redis
from service.ingest import EventLog
from service.keys import KeyRing
from service.metrics import Metrics
from service.overload import Bound, InFlight
from service.patience import STATEMENT_SECONDS
from service.rates import RateLimit, parse_rate
from service.recommend import Recommender
from service.redis_cluster import is_cluster
from service.routes import events, items, operations, pages, recommend, users
from service.routes.dependencies import Services
from service.settings import Settings
from service.telemetry import Telemetry
from service.version import VERSION
from shared.database import READER_KIB, close, create_engine

CONNECTIONS: Final = 10
"""To the database, for each worker: one writes, one follows the catalogue, the others read histories."""
POOL_SECONDS: Final = 2.0
"""How long a request waits for one of them to be free."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application for `settings` (of the environment by default). Nothing is opened before its lifespan."""
    settings = settings or Settings()
    metrics = Metrics()
    keys = KeyRing(settings.api_keys_file, settings.api_key)
    limit = None
    if settings.rate_limit is not None and settings.redis_url is not None:
        limit = RateLimit(parse_rate(settings.rate_limit), settings.redis_url, failed=metrics.failed)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(keys)
            if limit is not None:
                stack.push_async_callback(limit.aclose)
            app.state.services = await stack.enter_async_context(services_for(settings, metrics))
            yield

    app: FastAPI = FastAPIOffline(  # for the files of the pages
        docs_url=None,
        redoc_url=None,
        static_url=f"/{pages.ASSETS}",
        title="Upnext",
        version=VERSION,
        summary="Sequential recommendations",
        description=description.DESCRIPTION,
        openapi_tags=description.TAGS,
        lifespan=lifespan,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,  # what generated clients call their functions
    )
    routers = [module.router for module in (recommend, events, users, items, operations, pages)]
    for router in routers:
        app.include_router(router)
    errors.install(app, [route for router in routers for route in router.routes])
    app.add_middleware(Direct)
    app.add_middleware(Door, keys=keys, limit=limit)
    app.state.bound = Bound(settings.max_in_flight, metrics)
    app.add_middleware(InFlight, bound=app.state.bound)
    app.add_middleware(Telemetry, metrics=metrics)  # outermost: it tells of refused requests too
    _complete_description(app)
    return app


@asynccontextmanager
async def services_for(settings: Settings, metrics: Metrics) -> AsyncIterator[Services]:
    """Everything that endpoints use, opened in the order of need and closed in reverse."""
    if settings.redis_url is None:
        raise RuntimeError(
            "UPNEXT_REDIS_URL is not set; start with `python -m service`, which brings a Redis, or set it"
        )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(metrics.flushing())
        metrics.starts.inc()
        pool = {"pool_size": CONNECTIONS, "max_overflow": 0, "pool_timeout": POOL_SECONDS}
        engine = create_engine(
            settings.database_url, sqlite_kib=READER_KIB, statement_seconds=STATEMENT_SECONDS, **pool
        )
        stack.push_async_callback(close, engine)
        create = create_cluster if is_cluster(settings.redis_url) else create_redis
        redis = create(settings.redis_url)
        stack.push_async_callback(redis.aclose)
        histories = HistoryStore(redis, engine, failed=metrics.failed)
        log = await stack.enter_async_context(EventLog(engine, histories))
        catalogue = LiveCatalogue(engine, failed=metrics.failed)
        live = await stack.enter_async_context(Live(settings, catalogue, metrics))
        recommender = Recommender(live, histories, candidates=settings.candidates, default_model=settings.default_model)
        stack.callback(recommender.shutdown)
        yield Services(live, recommender, histories, log, Eraser(engine, histories), catalogue, metrics)


def _complete_description(app: FastAPI) -> None:
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        description.complete(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
