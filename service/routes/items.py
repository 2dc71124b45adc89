"""`GET | PUT | DELETE /items/{item_id}`: the bundle's items with the live catalogue on top."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import APIRouter
from starlette.responses import Response

from service import errors
from service.answers import ItemAnswer
from service.catalogue import CatalogueUnavailable
from service.routes.dependencies import NO_PARAMETERS, ItemPath, Services, ServicesOf, answer
from service.schemas import ItemBody
from shared.catalogue import Item, ItemChange
from shared.times import now, render_bound

router = APIRouter(tags=["catalogue"], dependencies=NO_PARAMETERS)


@router.get(
    "/items/{item_id}",
    response_model=ItemAnswer,
    summary="An item as it is now",
    responses=errors.responses(errors.UnknownItem, errors.Invalid, errors.CatalogueDown),
)
async def show_item(item_id: ItemPath, services: ServicesOf) -> Response:
    """What the bundle says, with every change made since on top."""
    with reaching():
        change = await services.catalogue.get(item_id)
    return shown(item_id, change, services)


@router.put(
    "/items/{item_id}",
    response_model=ItemAnswer,
    summary="Change or add an item",
    responses=errors.responses(errors.Malformed, errors.TooLarge, errors.Invalid, errors.CatalogueDown),
)
async def put_item(item_id: ItemPath, body: ItemBody, services: ServicesOf) -> Response:
    """Set what holds for an item from now on. This worker obeys at once, every other within a second.

    Fields that are absent or null leave what the bundle says. An item that the bundle does not know is stored and
    known to events from here on; it is recommended after the next training, since no model has a vector for it yet.
    """
    with reaching():
        change = await services.catalogue.put(
            item_id,
            title=body.title,
            categories=None if body.categories is None else tuple(body.categories),
            available_from=body.available_from,
            available_until=body.available_until,
            withdrawn=body.withdrawn,
        )
    services.live.apply([change])
    return shown(item_id, change, services)


@router.delete(
    "/items/{item_id}",
    response_model=ItemAnswer,
    summary="Withdraw an item",
    responses=errors.responses(errors.UnknownItem, errors.Invalid, errors.CatalogueDown),
)
async def withdraw_item(item_id: ItemPath, services: ServicesOf) -> Response:
    """The item is not returned any more, for no `as_of`, until a PUT without `withdrawn`. Twice is as good as once."""
    with reaching():
        if not services.live.knows(item_id) and await services.catalogue.get(item_id) is None:
            raise _unknown(item_id)
        change = await services.catalogue.withdraw(item_id)
    services.live.apply([change])
    return shown(item_id, change, services)


@contextmanager
def reaching() -> Iterator[None]:
    """The database's errors as one of ours."""
    try:
        yield
    except CatalogueUnavailable as error:
        raise errors.CatalogueDown() from error


def shown(item_id: str, change: ItemChange | None, services: Services) -> Response:
    """The item with `change` on top of what the bundle has. Raises UnknownItem when neither knows it."""
    serving = services.live.serving
    index = serving.bundle.catalogue.index_by_id.get(item_id) if serving else None
    if index is None and change is None:
        raise _unknown(item_id)
    item = serving.bundle.catalogue[index] if serving and index else Item(item_id)
    item = item if change is None else merged(item, change)
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
            "in_bundle": index is not None,
            "revision": None if change is None else change.revision,
        }
    )


def merged(item: Item, change: ItemChange) -> Item:
    """`item` with the fields that `change` sets."""
    return Item(
        item_id=item.item_id,
        title=item.title if change.title is None else change.title,
        categories=item.categories if change.categories is None else change.categories,
        available_from=item.available_from if change.available_from is None else change.available_from,
        available_until=item.available_until if change.available_until is None else change.available_until,
        withdrawn=change.withdrawn,
    )


def _unknown(item_id: str) -> errors.UnknownItem:
    return errors.UnknownItem(f"No item {item_id!r} is in the catalogue.")
