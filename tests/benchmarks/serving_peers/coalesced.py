"""The bare prototype with all its tricks: what waits is read, encoded and scored together; bytes come from orjson."""

from __future__ import annotations

import asyncio

import orjson
from fastapi import FastAPI, Response
from redis.asyncio import Redis

from tests.benchmarks.serving_peers.parts import MAX_LENGTH, REDIS_SOCKET, Parts, best, key_of

BATCH = 16

app = FastAPI()
parts = Parts()
redis = Redis(unix_socket_path=REDIS_SOCKET, decode_responses=True)
waiting: list[tuple[str, int, asyncio.Future[bytes]]] = []
running: asyncio.Task[None] | None = None


@app.get("/recommend/{user_id}")
async def recommend(user_id: str, n: int = 10) -> Response:
    global running  # noqa: PLW0603 - one queue a process
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    waiting.append((user_id, n, future))
    if running is None:
        running = asyncio.create_task(answer_all())
    return Response(await future, media_type="application/json")


async def answer_all() -> None:
    global running  # noqa: PLW0603
    while waiting:
        batch = waiting[:BATCH]
        del waiting[:BATCH]
        async with redis.pipeline(transaction=False) as pipe:
            for user_id, _, _ in batch:
                pipe.lrange(key_of(user_id), -MAX_LENGTH, -1)
            histories = await pipe.execute()
        scores = parts.encode([parts.rows(history) for history in histories]) @ parts.vectors.T  # (B, N)
        for (user_id, n, future), row in zip(batch, scores, strict=True):
            found = best(row, n)
            items = [{"item_id": parts.items[r].item_id, "score": row[r]} for r in found]
            content = {"user_id": user_id, "items": items}
            future.set_result(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))
    running = None
