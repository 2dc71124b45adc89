"""`/items`: the bundle's items with the live catalogue on top, and items like an item."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Depends
from starlette.responses import Response

from service import errors
from service.answers import EXAMPLE_WITHDRAWN, ItemAnswer, ItemsAnswer, SimilarAnswer
from service.bundles import Live
from service.catalogue import CatalogueUnavailable, Fields
from service.routes.dependencies import (
    NO_PARAMETERS,
    ItemPath,
    Services,
    ServicesOf,
    TraceOf,
    answer,
    described,
    query_of,
)
from service.routes.recommend import listed
from service.schemas import ItemBody, PageParameters, SimilarParameters
from service.similar import similar
from shared.catalogue import Item, ItemChange
from shared.times import BEGINNING, END, now, render, render_bound

T = TypeVar("T")

PageQuery = Annotated[PageParameters, Depends(query_of(PageParameters))]
SimilarQuery = Annotated[SimilarParameters, Depends(query_of(SimilarParameters))]
router = APIRouter(tags=["catalogue"])


@router.get(
    "/items",
    response_model=ItemsAnswer,
    summary="All items, page by page",
    openapi_extra=described(PageParameters),
    responses=errors.responses(errors.Invalid, errors.CatalogueDown, errors.Overloaded),
)
async def list_items(parameters: PageQuery, services: ServicesOf) -> Response:
    """The bundle's items and those of the live catalogue, in the order of their ids (by code point).

    Items that are withdrawn or do not exist now are listed too, and say so. Changes show here within a second. An item
    that is there from the first page to the last comes exactly once, whatever is added meanwhile.
    """
    live = services.live
    if not live.catalogue_read:
        raise errors.CatalogueDown()
    if (serving := live.serving) is not None:
        await services.recommender.beside(serving, lambda: serving.bundle.catalogue.rows_by_id)
    ids = live.page(parameters.cursor or "", parameters.limit + 1)
    page, more = ids[: parameters.limit], ids[parameters.limit :]
    rows = [shown(item_id, live.change_of(item_id), live) for item_id in page]
    return answer({"items": rows, "next_cursor": page[-1] if more else None})


@router.get(
    "/items/{item_id}/similar",
    response_model=SimilarAnswer,
    summary="Items like an item",
    tags=["recommendations"],
    openapi_extra=described(SimilarParameters),
    responses=errors.responses(
        errors.UnknownItem,
        errors.UnknownModel,
        errors.Invalid,
        errors.NoBundle,
        errors.CatalogueDown,
        errors.Overloaded,
    ),
)
async def similar_items(item_id: ItemPath, parameters: SimilarQuery, services: ServicesOf, trace: TraceOf) -> Response:
    """Items whose vectors in the model point most nearly where this item's vector does, by cosine; never itself.

    For an item that was added since the bundle was made there is no vector yet: it gets items that share categories
    with it, the more the better, then by popularity; none when it shares none.
    """
    serving = services.live.now_serving()
    recommender = services.recommender
    model = serving.model(parameters.model, recommender.default_model)
    trace.model_version = serving.bundle.version
    found = await similar(recommender, serving, model, item_id, parameters.n, parameters.as_of, trace)
    return answer(
        {
            "item_id": found.item_id,
            "model": {"name": found.model, "version": found.version},
            "as_of": render(found.as_of),
            "strategy": found.strategy,
            "requested": found.requested,
            "returned": len(found.items),
            "items": listed(found.items),
        }
    )


@router.get(
    "/items/{item_id}",
    response_model=ItemAnswer,
    summary="An item as it is now",
    dependencies=NO_PARAMETERS,
    responses=errors.responses(errors.UnknownItem, errors.Invalid, errors.CatalogueDown, errors.Overloaded),
)
async def show_item(item_id: ItemPath, services: ServicesOf) -> Response:
    """What the bundle says, with every change made since on top."""
    change = await reached(services.catalogue.get(item_id))
    return answer(shown(item_id, change, services.live))


@router.put(
    "/items/{item_id}",
    response_model=ItemAnswer,
    summary="Change or add an item",
    dependencies=NO_PARAMETERS,
    responses=errors.responses(
        errors.Malformed, errors.TooLarge, errors.Invalid, errors.CatalogueDown, errors.Overloaded
    ),
)
async def put_item(item_id: ItemPath, body: ItemBody, services: ServicesOf) -> Response:
    """Set what holds for an item from now on. This worker obeys at once, every other within a second.

    Fields that are absent keep the value they have, `withdrawn` too; null goes back to what the bundle says, and where
    that says nothing, to nothing. An item that was not known before exists from now on unless `available_from` says
    otherwise. Until the next training no model has a vector for it: it comes behind all others among popular items and
    among `candidates` that a caller names, and gets similar items by categories.
    """
    change = await put(item_id, body, services)
    return answer(shown(item_id, change, services.live))


_WITHDRAWN: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"application/json": {"example": EXAMPLE_WITHDRAWN}}}
}


@router.delete(
    "/items/{item_id}",
    response_model=ItemAnswer,
    summary="Withdraw an item",
    dependencies=NO_PARAMETERS,
    responses=_WITHDRAWN
    | errors.responses(errors.UnknownItem, errors.Invalid, errors.CatalogueDown, errors.Overloaded),
)
async def withdraw_item(item_id: ItemPath, services: ServicesOf) -> Response:
    """The item is not returned any more, for no `as_of`, until a PUT says `withdrawn: false`. Twice is as good."""
    change = await put(item_id, ItemBody(withdrawn=True), services, must_exist=True)
    return answer(shown(item_id, change, services.live))


async def put(item_id: str, body: ItemBody, services: Services, *, must_exist: bool = False) -> ItemChange:
    """Store what `merged` says, and obey it here at once."""

    def decide(row: ItemChange | None) -> Fields:
        if must_exist and current(item_id, row, services.live) is None:
            raise _unknown(item_id)
        return merged(item_id, row, body, services.live)

    change = await reached(services.catalogue.put(item_id, decide))
    services.live.apply([change])
    return change


def merged(item_id: str, row: ItemChange | None, body: ItemBody, live: Live) -> Fields:
    """What is to stand in the item's row: what was sent, else what stood there, else what the bundle says.

    The bundle's values are stored too, so that a training from the catalogue alone knows all of the item. Of an item
    that this worker's bundle does not have, nothing is made up: another bundle, loaded later, may know it.
    """
    sent = body.model_dump(include=body.model_fields_set)
    published = live.published(item_id)
    if row is not None and published is not None and row.loaded:
        row = None  # gives way to the bundle
    said: dict[str, Any] = {}
    for name in Fields._fields:
        value = sent[name] if name in sent else getattr(row, name, None)
        said[name] = getattr(published, name, None) if value is None else value
    if row is None and published is None and said["available_from"] is None and live.is_current:
        said["available_from"] = now()
    starts, ends = (
        bound if said[name] is None else said[name]
        for name, bound in (("available_from", BEGINNING), ("available_until", END))
    )
    # An item of the bundle may be over before it begins; who sends neither end is not told of it.
    if starts >= ends and sent.keys() & {"available_from", "available_until"}:
        raise errors.Invalid(
            "available_from is not before available_until",
            [{"pointer": "/available_until", "detail": f"The item exists from {render_bound(starts)} on."}],
        )
    return Fields(
        title=said["title"],
        categories=None if said["categories"] is None else tuple(said["categories"]),
        available_from=None if starts == BEGINNING else starts,
        available_until=None if ends == END else ends,
        withdrawn=bool(said["withdrawn"]),
    )


async def reached(answer: Awaitable[T]) -> T:
    """The database's answer, its errors as one of ours."""
    try:
        return await answer
    except CatalogueUnavailable as error:
        raise errors.CatalogueDown() from error


def current(item_id: str, change: ItemChange | None, live: Live) -> Item | None:
    """The item as it is now; None when neither the bundle nor the catalogue knows it."""
    serving, item = live.serving, live.published(item_id)
    if item is None or serving is None:
        # What nobody dated was not there when the bundle was made.
        unknown = Item(item_id) if serving is None else Item(item_id, available_from=serving.created)
        return None if change is None else change.on(unknown)
    return item if change is None or not serving.obeys(change) else change.on(item)


def shown(item_id: str, change: ItemChange | None, live: Live) -> dict[str, Any]:
    """The item with `change` on top of what the bundle has. Raises UnknownItem when neither knows it."""
    item, serving = current(item_id, change, live), live.serving
    if item is None:
        raise _unknown(item_id)
    exists = item.available_from <= now() < item.available_until and not item.withdrawn
    return {
        "item_id": item_id,
        "title": item.title,
        "categories": list(item.categories),
        "available_from": render_bound(item.available_from),
        "available_until": render_bound(item.available_until),
        "withdrawn": item.withdrawn,
        "available": exists,
        "in_bundle": serving is not None and item_id in serving.bundle.catalogue.index_by_id,
        "revision": change.revision if change is not None and (serving is None or serving.obeys(change)) else None,
    }


def _unknown(item_id: str) -> errors.UnknownItem:
    return errors.UnknownItem(f"No item {item_id!r} is in the catalogue.")
