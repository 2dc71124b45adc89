"""TLS to Redis and PostgreSQL: what the URLs ask for is done, and a wrong certificate or none at all is refused.

The servers are real; where a build of theirs knows no TLS, a front of a few lines ends it before them, as stunnel does.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trustme
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from service.errors import RateLimited
from service.history import create_redis
from service.rates import RateLimit, parse_rate
from service.settings import Settings
from shared.database import create_engine, migrate
from tests.servers import PostgresServer, RedisServer
from tests.serving import json_of, running
from tests.test_service_access import EVENT
from tests.worlds import cyclic, write_bundle

SSL_REQUEST = struct.pack("!II", 8, 80877103)  # how a PostgreSQL client asks for TLS
Backend = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Authority:
    """A certificate authority of our own, with a server's certificate for localhost and a client's."""

    def __init__(self, folder: Path) -> None:
        self.authority, self.folder = trustme.CA(), folder
        self.file = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.file))
        self.client_cert, self.client_key = folder / "client.pem", folder / "client.key"
        client = self.authority.issue_cert("upnext@client.example")
        client.cert_chain_pems[0].write_to_path(str(self.client_cert))
        client.private_key_pem.write_to_path(str(self.client_key))
        self.client_key.chmod(0o600)

    def server(self, name: str = "localhost", *, asks_client: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(name).configure_cert(context)
        if asks_client:
            self.authority.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def front(backend: Backend, context: ssl.SSLContext, *, postgresql: bool = False) -> AsyncIterator[int]:
    """A port that speaks TLS with clients and passes what they say to `backend`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, EOFError):
            if postgresql:
                if await reader.readexactly(8) != SSL_REQUEST:
                    return writer.close()  # a server that takes no connection without TLS
                writer.write(b"S")
                await writer.start_tls(context)
            inner_reader, inner_writer = await backend()
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
        writer.close()
        return None

    server = await asyncio.start_server(serve, "localhost", 0, ssl=None if postgresql else context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def secure_redis(redis_server: RedisServer, authority: Authority) -> AsyncIterator[str]:
    """host:port of a Redis behind TLS."""
    backend = lambda: asyncio.open_unix_connection(redis_server.socket)  # noqa: E731
    async with front(backend, authority.server()) as port:
        yield f"localhost:{port}"


def postgresql_front(server: PostgresServer, context: ssl.SSLContext) -> AbstractAsyncContextManager[int]:
    path = server.folder / "data" / ".s.PGSQL.5432"
    return front(lambda: asyncio.open_unix_connection(path), context, postgresql=True)


async def test_the_service_over_tls(
    tmp_path: Path, secure_redis: str, postgresql: PostgresServer, authority: Authority
) -> None:
    """Everything there is, with both servers checked by name."""
    write_bundle(tmp_path / "bundles", cyclic())
    database = make_url(await postgresql.new_database()).database
    async with postgresql_front(postgresql, authority.server()) as port:
        url = f"postgresql://postgres@localhost:{port}/{database}?sslmode=verify-full&sslrootcert={authority.file}"
        engine = create_engine(url)
        await migrate(engine)
        await engine.dispose()
        redis_url = f"rediss://{secure_redis}?ssl_ca_certs={authority.file}"
        settings = Settings(
            redis_url=redis_url, database_url=url, bundles=tmp_path / "bundles", rate_limit="1000/minute"
        )
        async with running(settings) as upnext:
            json_of(await upnext.http.post("/events", json=EVENT))
            sources = [(await upnext.ask("u"))["history_source"] for _ in range(2)]
            assert sources == ["log", "cache"]
            assert upnext.services.live.catalogue_failure is None


@pytest.mark.parametrize(
    "options",
    ["", "ssl_ca_certs={other}", "ssl_ca_certs={ca}&ssl_cert_reqs=optional", "plain"],
)
async def test_redis_under_another_name_or_authority(
    redis_server: RedisServer, authority: Authority, tmp_path: Path, options: str
) -> None:
    other = Authority(tmp_path)
    backend = lambda: asyncio.open_unix_connection(redis_server.socket)  # noqa: E731
    async with front(backend, authority.server("elsewhere.example")) as port:
        scheme = "redis" if options == "plain" else "rediss"
        query = "" if options == "plain" else options.format(other=other.file, ca=authority.file)
        client = create_redis(f"{scheme}://localhost:{port}?{query}", timeout=5)
        with pytest.raises(RedisConnectionError):
            await client.ping()
        await client.aclose()


async def test_rates_are_counted_over_tls(secure_redis: str, authority: Authority) -> None:
    limit = RateLimit(parse_rate("1/hour"), f"rediss://{secure_redis}?ssl_ca_certs={authority.file}", timeout=5)
    await limit.admit("a")
    with pytest.raises(RateLimited):
        await limit.admit("a")
    await limit.aclose()


async def answers(engine: AsyncEngine) -> bool:
    try:
        async with engine.connect() as connection:
            return bool((await connection.execute(text("select 1"))).scalar_one())
    finally:
        await engine.dispose()


@pytest.mark.parametrize(
    ("query", "name", "fine"),
    [
        ("sslmode=require", "elsewhere.example", True),  # as PostgreSQL has it: encrypted, to whomever
        ("sslmode=verify-ca&sslrootcert={ca}", "elsewhere.example", True),
        ("sslmode=verify-full&sslrootcert={ca}", "elsewhere.example", False),
        ("sslmode=verify-full&sslrootcert={ca}", "localhost", True),
        ("sslmode=verify-ca&sslrootcert={other}", "localhost", False),
        ("sslmode=disable", "localhost", False),
    ],
)
async def test_postgresql_s_own_words_for_tls(
    tmp_path: Path, postgresql: PostgresServer, authority: Authority, query: str, name: str, fine: bool
) -> None:
    query = query.format(ca=authority.file, other=Authority(tmp_path).file)
    async with postgresql_front(postgresql, authority.server(name)) as port:
        engine = create_engine(f"postgresql://postgres@localhost:{port}/postgres?{query}")
        if fine:
            assert await answers(engine)
        else:
            with pytest.raises((OSError, DBAPIError)):  # asyncpg lets ssl's own through
                await answers(engine)


async def test_a_certificate_of_our_own(postgresql: PostgresServer, authority: Authority) -> None:
    async with postgresql_front(postgresql, authority.server(asks_client=True)) as port:
        url = f"postgresql://postgres@localhost:{port}/postgres?sslmode=verify-full&sslrootcert={authority.file}"
        own = f"&sslcert={authority.client_cert}&sslkey={authority.client_key}"
        assert await answers(create_engine(url + own))
        with pytest.raises((OSError, DBAPIError)):
            await answers(create_engine(url))
