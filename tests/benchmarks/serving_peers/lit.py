"""LitServe with the duties of the bare prototype: read, encode, score; batches of what waits."""

from __future__ import annotations

import os
from typing import Any, Final

import litserve
from redis import Redis

from tests.benchmarks.serving_peers.parts import MAX_LENGTH, REDIS_SOCKET, Parts, best, key_of

N: Final = 10


class Recommender(litserve.LitAPI):
    """Runs in worker processes of its own; the HTTP servers hand requests over to them."""

    def setup(self, device: str) -> None:
        self.parts = Parts()
        self.redis = Redis(unix_socket_path=REDIS_SOCKET, decode_responses=True)

    def decode_request(self, request: dict[str, str]) -> str:
        return request["user_id"]

    def predict(self, user_ids: list[str]) -> list[dict[str, Any]]:
        pipe = self.redis.pipeline(transaction=False)
        for user_id in user_ids:
            pipe.lrange(key_of(user_id), -MAX_LENGTH, -1)
        histories = [self.parts.rows(history) for history in pipe.execute()]
        scores = self.parts.encode(histories) @ self.parts.vectors.T  # (B, N)
        return [
            {"user_id": user_id, "items": [self.described(r, float(row[r])) for r in best(row, N)]}
            for user_id, row in zip(user_ids, scores, strict=True)
        ]

    def described(self, row: int, score: float) -> dict[str, Any]:
        return {"item_id": self.parts.items[row].item_id, "score": score}

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    workers, tuned = int(os.environ["PEER_WORKERS"]), os.environ["PEER_TUNED"] == "1"
    # The best of several sizes, times to wait, queues, and numbers of HTTP servers that were tried.
    api = Recommender(max_batch_size=8, batch_timeout=0.001)
    options: dict[str, Any] = {"num_api_servers": workers, "access_log": False, "loop": "uvloop", "http": "httptools"}
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, fast_queue=tuned)
    server.run(
        host="127.0.0.1", port=int(os.environ["PEER_PORT"]), log_level="error", generate_client_file=False,
        **(options if tuned else {}),
    )  # fmt: skip
