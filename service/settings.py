"""All settings of the service: environment variables with the prefix UPNEXT_, or fields in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from redis.asyncio.connection import parse_url

from service.rates import parse_rate
from service.redis_cluster import is_cluster, nodes_of, url_of
from shared.retrieval import Mode

PREFIX = "UPNEXT_"
GRACE_SECONDS: Final = 5
"""Beyond `drain_seconds`, for what comes after the last request: the workers' tasks, and closing connections."""


class Settings(BaseSettings):
    """Read once at start; with nothing set, everything runs on one machine."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on; `0.0.0.0` for all.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    workers: int = Field(1, ge=1, le=64, description="Worker processes; each one uses a core and holds the models.")
    bundles: Path = Field(Path("bundles"), description="Folder in which the trainer publishes bundles.")
    database_url: str = Field(
        "sqlite:///var/upnext.db",
        repr=False,  # it may hold a password
        description="Event log and live catalogue: `sqlite:///file` or `postgresql://user:password@host/name`.",
    )
    redis_url: str | None = Field(
        None,
        repr=False,  # likewise
        description="History cache: `redis://host:6379`, or nodes of a cluster, `redis+cluster://host:6379,host:6379`. "
        "Unset, `python -m service` starts a Redis of its own.",
    )
    api_keys_file: Path | None = Field(
        None, description="File with a line for each API key, made by `python -m service key`; followed as it changes."
    )
    api_key: SecretStr | None = Field(
        None, min_length=24, description="An API key itself, with all scopes; at least 24 characters, drawn at random."
    )
    rate_limit: str | None = Field(
        None, description="How often each key may ask, for instance `600/minute`. Unset: as often as it likes."
    )
    default_model: str | None = Field(
        None, description="Model that answers when a request names none. Unset, or not in the bundle: the bundle's own."
    )
    required_models: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names of models, with commas between; a new bundle that lacks one is refused like a damaged one.",
    )
    retrieval: Mode = Field(
        Mode.AUTO, description="Search path: `auto` picks by catalogue size, `exact` and `hnsw` force one."
    )
    candidates: int = Field(
        200, ge=1, le=2000, description="Items retrieved for a request before the final gate and ranking; at least `n`."
    )
    query_vectors: int = Field(
        8192,
        ge=0,
        le=10_000_000,
        description="Query vectors that a worker remembers for each model, for users who ask again; 0: none.",
    )
    max_in_flight: int = Field(
        128, ge=1, le=100_000, description="Requests a worker has in flight at most; above, it answers 503 at once."
    )
    drain_seconds: int = Field(
        10, ge=1, le=3600, description="After SIGTERM, seconds for requests in hand to end before they are broken off."
    )
    bundle_poll_seconds: float = Field(
        2.0, gt=0, le=3600, description="How often a worker looks whether a new bundle was published."
    )
    catalogue_poll_seconds: float = Field(
        0.5, gt=0, le=60, description="How often a worker fetches item changes that other workers have taken."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines written; `warning` leaves out the line for each request."
    )

    @field_validator("required_models", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return [name for part in value.split(",") if (name := part.strip())] if isinstance(value, str) else value

    @field_validator("redis_url")
    @classmethod
    def _readable_url(cls, value: str | None) -> str | None:
        if value is not None:
            parse_url(url_of(value, nodes_of(value)[0]) if is_cluster(value) else value)
        return value

    @field_validator("rate_limit")
    @classmethod
    def _readable_rate(cls, value: str | None) -> str | None:
        if value is not None:
            parse_rate(value)
        return value


def markdown_table() -> str:
    """The settings as the table that the README shows."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "unset" if field.default in (None, ()) else f"`{field.default}`"
        rows.append(f"| `{PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)
