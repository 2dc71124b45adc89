"""`/docs` and `/redoc`: Swagger UI and Redoc, from files that the service brings, so that they need no internet.

A browser is told to fetch nothing from elsewhere. Redoc's script names a logo on a server of its makers, and goes
without one that it cannot load.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

ASSETS: Final = "static-offline-docs"
"""Where the files are. Relative, as all that the pages name: a proxy may have put a path in front."""
POLICY: Final = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"}
"""Scripts within the pages, workers and pictures that scripts make: all but what comes from another server."""


@router.get("/docs")
async def docs() -> HTMLResponse:
    """The API, to read and to try."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Upnext - Swagger UI",
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon.png",
    )
    return HTMLResponse(page.body, headers=POLICY)


@router.get("/redoc")
async def redoc() -> HTMLResponse:
    """The API, to read."""
    page = get_redoc_html(
        openapi_url="openapi.json",
        title="Upnext - Redoc",
        redoc_js_url=f"{ASSETS}/redoc.standalone.js",
        redoc_favicon_url=f"{ASSETS}/favicon.png",
        with_google_fonts=False,
    )
    return HTMLResponse(page.body, headers=POLICY)
