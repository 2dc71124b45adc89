"""`python -m service`: start everything that is missing, then the workers.

python -m service            run (the default)
python -m service migrate    bring the database to this release's schema
python -m service settings   print all settings as a table
python -m service openapi    print the API description
python -m service tombstones print who was erased when, as keyed hashes, for trainers that read files
python -m service key shop read write >> keys    make an API key: its line for the file, and once, the key
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Final

import orjson
import uvicorn
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from service.keys import KeyRing, KeysError, Scope, new_key
from service.memory import settle_allocator
from service.redis_child import RedisMissing, start_redis
from service.settings import GRACE_SECONDS, PREFIX, Settings, markdown_table
from shared.bundle import HOW_TO_PUBLISH, BundleError, current_version
from shared.database import SchemaError, close, create_engine, is_migrated, is_passing, migrate
from shared.erasure import Tombstones, TombstonesError, read_tombstones

HUNG_SECONDS: Final = 15
"""A worker that does not answer the launcher for so long is replaced; imports on a busy machine take several."""
DATABASE_SECONDS: Final = 5.0
"""How long the start waits for the database to say which schema it has."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "key":
            return make_key(given.name, given.scopes)
        commands = {
            "run": run,
            "migrate": migrate_only,
            "settings": print_settings,
            "openapi": print_openapi,
            "tombstones": print_tombstones,
        }
        return commands[given.command](Settings())
    except ValidationError as error:
        for found in error.errors():
            say(f"{PREFIX}{'.'.join(map(str, found['loc'])).upper()}: {found['msg']}")
    except (RedisMissing, SchemaError, KeysError, TombstonesError, SQLAlchemyError, OSError) as error:
        say(str(error))
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description="Upnext: what next, for a user.")
    parser.set_defaults(command="run")
    commands = parser.add_subparsers(title="commands", metavar="command (default: run)")
    for name, about in (
        ("run", "start everything that is missing, then the workers"),
        ("migrate", "bring the database to this release's schema"),
        ("settings", "print all settings as a table"),
        ("openapi", "print the API description"),
        ("tombstones", "print who was erased when, as keyed hashes, for trainers that read files"),
        ("key", "make an API key: its line for the file to stdout, the key itself, this once, to stderr"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(command=name)
        if name == "key":
            command.add_argument("name", help="who will use it; it stands in the log")
            command.add_argument("scopes", nargs="+", choices=[str(scope) for scope in Scope], help="what it may do")
    return parser


def say(text: str) -> None:
    """Tell the person at the terminal; stdout is for the commands that print a document."""
    print(text, file=sys.stderr, flush=True)


def misspelt(names: Iterable[str]) -> list[str]:
    """Words on variables that are almost settings: nobody reads them, and their owner believes otherwise."""
    known = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields]
    near = {n: difflib.get_close_matches(n, known, 1, 0.85) for n in names if n.startswith(PREFIX) and n not in known}
    return [f"{name} is no setting; did you mean {found[0]}?" for name, found in near.items() if found]


def print_settings(_: Settings) -> int:
    """All settings as a table."""
    print(markdown_table())
    return 0


def print_tombstones(settings: Settings) -> int:
    """Who was erased when."""
    found = asyncio.run(_tombstones(settings.database_url))
    if found is None:
        say("The database cannot erase users yet; run: python -m service migrate")
        return 1
    print(found.to_json())
    return 0


async def _tombstones(url: str) -> Tombstones | None:
    engine = create_engine(url)
    try:
        async with engine.connect() as connection:
            return await read_tombstones(connection)
    finally:
        await engine.dispose()


def make_key(name: str, scopes: list[str]) -> int:
    """A new API key."""
    key, line = new_key(name, [scope for scope in Scope if scope in scopes])
    say(f"{key}\n(it is shown this once; the file that UPNEXT_API_KEYS_FILE names holds its hash)")
    print(line)
    return 0


def print_openapi(settings: Settings) -> int:
    """The API description."""
    from service.main import create_app  # noqa: PLC0415 - see `run` on what may be imported when

    sys.stdout.buffer.write(orjson.dumps(create_app(settings).openapi(), option=orjson.OPT_INDENT_2) + b"\n")
    return 0


def migrate_only(settings: Settings) -> int:
    """Bring the schema up to date."""
    asyncio.run(_migrate(settings.database_url))
    say("The database has the schema of this release.")
    return 0


async def _migrate(url: str, patience: float | None = None) -> None:
    """Bring the schema up to date. Raises TimeoutError if the database does not say within `patience` which it has.

    A migration that has begun takes as long as it takes: events may be many.
    """
    engine = create_engine(url)
    try:
        async with asyncio.timeout(patience):
            migrated = await is_migrated(engine)
        if not migrated:
            await migrate(engine)
    finally:
        await close(engine)


def run(settings: Settings) -> int:
    """Start Redis where none is set, migrate, and run the workers until SIGINT or SIGTERM.

    `service.main` is not imported here: workers are processes of their own, and prometheus_client looks for its
    folder when it is imported.
    """
    settle_allocator()
    for name in misspelt(os.environ):
        say(name)
    refuse_taken_port(settings.host, settings.port)
    if settings.api_keys_file is not None:
        # Say here what workers would die of.
        KeyRing(settings.api_keys_file, None).reload(settings.api_keys_file)
    signal.signal(signal.SIGTERM, _stop)
    with ExitStack() as stack:
        try:
            if settings.redis_url is None:
                os.environ[f"{PREFIX}REDIS_URL"] = stack.enter_context(start_redis())
            metrics = stack.enter_context(tempfile.TemporaryDirectory(prefix="upnext-metrics-"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
            from service.sharing import FILE  # noqa: PLC0415 - see above

            os.environ[FILE] = stack.enter_context(tempfile.NamedTemporaryFile(prefix="upnext-")).name
            migrate_if_there(settings)
            greet(settings)
            serve(settings)
        except KeyboardInterrupt:
            pass
        finally:
            # What is left to stop is stopped in order, however often somebody presses Ctrl-C.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("Stopped.")
    return 0


def migrate_if_there(settings: Settings) -> None:
    """Bring the schema up to date, unless no database answers: the workers can wait for it as well.

    One that answers, and will not take us today or tomorrow, is an error.
    """
    try:
        asyncio.run(_migrate(settings.database_url, DATABASE_SECONDS))
        return
    except TimeoutError:
        reason = f"no answer within {DATABASE_SECONDS:.0f} s"
    except OSError as error:
        reason = str(error)
    except DBAPIError as error:
        if not is_passing(error):
            raise
        reason = str(error.orig)
    say(f"Database cannot be reached ({reason}); the workers start, and serve as soon as it can")
    say("         If this release is new to it, run then: python -m service migrate")


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def refuse_taken_port(host: str, port: int) -> None:
    """Raise OSError that names the setting, before anything was started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"Cannot listen on {host}:{port}: {error.strerror}. Set {PREFIX}PORT (or {PREFIX}HOST) to another one."
            ) from error


def greet(settings: Settings) -> None:
    """Where things are, for the person who has just started it."""
    here = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - compared, not bound
    here = f"http://[{here}]:{settings.port}" if ":" in here else f"http://{here}:{settings.port}"
    try:
        version = current_version(settings.bundles)
    except BundleError as error:
        version = f"unusable: {error}"
    publish = f"none in {settings.bundles}/ yet; {HOW_TO_PUBLISH} (it goes live without a restart)"
    redis = "its own, for this run" if settings.redis_url is None else "as set"
    say(f"Upnext   {here}/docs   (API {here}, Ctrl-C stops it)")
    say(f"Bundle   {version or publish}")
    say(f"Redis    {redis}; workers: {settings.workers}")
    if settings.api_key is None and settings.api_keys_file is None:
        say("Keys     none: it answers this machine alone")


class Workers(Multiprocess):
    """The worker processes. One that does not even notice that its time to stop is over is killed."""

    def join_all(self) -> None:
        """Wait for the workers' end, for as long as they have."""
        deadline = time.monotonic() + (self.config.timeout_graceful_shutdown or 0) + GRACE_SECONDS + 1
        for worker in self.processes:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                say(f"Worker {worker.pid} does not stop, so it is killed")
                worker.process.kill()
            worker.join()


def serve(settings: Settings) -> None:
    """The workers; returns when they have stopped. Exits with an error when one cannot start."""
    from service.telemetry import logging_config  # noqa: PLC0415 - after PROMETHEUS_MULTIPROC_DIR is set

    alone = settings.workers == 1
    config = uvicorn.Config(
        "service.worker:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        loop="uvloop" if alone else "service.sharing:SharingLoop",
        http="service.overload:RefusingProtocol" if alone else "service.sharing:SharingProtocol",
        access_log=False,  # the service writes its own line for each request
        server_header=False,
        log_config=logging_config(settings.log_level),
        timeout_graceful_shutdown=settings.drain_seconds,
        timeout_worker_healthcheck=HUNG_SECONDS,
    )
    # As uvicorn.run does it, which does not tell when a worker could not start.
    if alone:
        server = uvicorn.Server(config)
        server.run()
        failed = not server.started
    else:
        supervisor = Workers(config, sockets=[config.bind_socket()])
        supervisor.run()
        failed = any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes)
    if failed:
        sys.exit(STARTUP_FAILURE)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    sys.exit(main())
