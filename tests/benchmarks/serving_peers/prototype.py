"""The bare prototype: a FastAPI route and the parts, nothing else. No validation, seen items, dates, log or metrics."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from redis.asyncio import Redis

from tests.benchmarks.serving_peers.parts import MAX_LENGTH, REDIS_SOCKET, Parts, best, key_of

app = FastAPI()
parts = Parts()
redis = Redis(unix_socket_path=REDIS_SOCKET, decode_responses=True)


@app.get("/recommend/{user_id}")
async def recommend(user_id: str, n: int = 10) -> dict[str, Any]:
    history = await redis.lrange(key_of(user_id), -MAX_LENGTH, -1)
    (query,) = parts.encode([parts.rows(history)])
    scores = parts.vectors @ query  # (N,)
    items = [{"item_id": parts.items[row].item_id, "score": float(scores[row])} for row in best(scores, n)]
    return {"user_id": user_id, "items": items}
