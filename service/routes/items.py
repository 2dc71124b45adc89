"""`GET | PUT | DELETE /items/{item_id}`: the bundle's items with the live catalogue on top."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from fastapi import APIRouter
from starlette.responses import Response

from service import errors
from service.answers import ItemAnswer
from service.catalogue import CatalogueUnavailable
from service.routes.dependencies import NO_PARAMETERS, ItemPath, Services, ServicesOf, answer
from service.schemas import ItemBody
from shared.catalogue import Item, ItemChange
from shared.times import BEGINNING, END, now, render_bound

T = TypeVar("T")

router = APIRouter(tags=["catalogue"], dependencies=NO_PARAMETERS)


@router.get(
    "/items/{item_id}",
    response_model=ItemAnswer,
    summary="An item as it is now",
    responses=errors.responses(errors.UnknownItem, errors.Invalid, errors.CatalogueDown),
)
async def show_item(item_id: ItemPath, services: ServicesOf) -> Response:
    """What the bundle says, with every change made since on top."""
    return shown(item_id, await reached(services.catalogue.get(item_id)), services)


@router.put(
    "/items/{item_id}",
    response_model=ItemAnswer,
    summary="Change or add an item",
    responses=errors.responses(errors.Malformed, errors.TooLarge, errors.Invalid, errors.CatalogueDown),
)
async def put_item(item_id: ItemPath, body: ItemBody, services: ServicesOf) -> Response:
    """Set what holds for an item from now on. This worker obeys at once, every other within a second.

    Fields that are absent or null keep the value they have. An item that was not known before exists from now on
    unless `available_from` says otherwise; it is recommended after the next training, since no model has a vector for
    it yet.
    """
    known = current(item_id, await reached(services.catalogue.get(item_id)), services)
    change = await reached(put(known or Item(item_id, available_from=now()), body, services))
    return shown(item_id, change, services)


@router.delete(
    "/items/{item_id}",
    response_model=ItemAnswer,
    summary="Withdraw an item",
    responses=errors.responses(errors.UnknownItem, errors.Invalid, errors.CatalogueDown),
)
async def withdraw_item(item_id: ItemPath, services: ServicesOf) -> Response:
    """The item is not returned any more, for no `as_of`, until a PUT without `withdrawn`. Twice is as good as once."""
    known = current(item_id, await reached(services.catalogue.get(item_id)), services)
    if known is None:
        raise _unknown(item_id)
    change = await reached(put(known, ItemBody(withdrawn=True), services))
    return shown(item_id, change, services)


async def put(known: Item, body: ItemBody, services: Services) -> ItemChange:
    """Store the whole item as it will be, so that a training from the catalogue alone knows all of it; obey it here."""
    starts = known.available_from if body.available_from is None else body.available_from
    ends = known.available_until if body.available_until is None else body.available_until
    if starts >= ends:
        raise errors.Invalid(
            "available_from is not before available_until",
            [{"pointer": "/available_until", "detail": f"The item exists from {render_bound(starts)} on."}],
        )
    change = await services.catalogue.put(
        known.item_id,
        title=known.title if body.title is None else body.title,
        categories=known.categories if body.categories is None else tuple(body.categories),
        available_from=None if starts == BEGINNING else starts,
        available_until=None if ends == END else ends,
        withdrawn=body.withdrawn,
    )
    services.live.apply([change])
    return change


async def reached(answer: Awaitable[T]) -> T:
    """The database's answer, its errors as one of ours."""
    try:
        return await answer
    except CatalogueUnavailable as error:
        raise errors.CatalogueDown() from error


def current(item_id: str, change: ItemChange | None, services: Services) -> Item | None:
    """The item as it is now; None when neither the bundle nor the catalogue knows it."""
    serving = services.live.serving
    index = serving.bundle.catalogue.index_by_id.get(item_id) if serving else None
    if serving is None or index is None:
        return None if change is None else Item(item_id).changed(change)
    item = serving.bundle.catalogue[index]
    return item if change is None or not serving.obeys(change) else item.changed(change)


def shown(item_id: str, change: ItemChange | None, services: Services) -> Response:
    """The item with `change` on top of what the bundle has. Raises UnknownItem when neither knows it."""
    item, serving = current(item_id, change, services), services.live.serving
    if item is None:
        raise _unknown(item_id)
    exists = item.available_from <= now() < item.available_until and not item.withdrawn
    return answer(
        {
            "item_id": item_id,
            "title": item.title,
            "categories": list(item.categories),
            "available_from": render_bound(item.available_from),
            "available_until": render_bound(item.available_until),
            "withdrawn": item.withdrawn,
            "available": exists,
            "in_bundle": serving is not None and item_id in serving.bundle.catalogue.index_by_id,
            "revision": None if change is None else change.revision,
        }
    )


def _unknown(item_id: str) -> errors.UnknownItem:
    return errors.UnknownItem(f"No item {item_id!r} is in the catalogue.")
