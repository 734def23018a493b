"""Proves a loaded model through the path that users take, before the first connection is accepted."""

import asyncio
import json
from typing import Any

from mlx_launcher.host.app import App
from mlx_launcher.host.errors import ModelFault
from mlx_launcher.host.settings import Settings


async def prove(app: App, settings: Settings) -> None:
    """Has the app answer a chat request of one token, in-process; raises ModelFault with the reason if it does not."""
    body = {"model": settings["model_id"], "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    status, answer = await _post(app, "/v1/chat/completions", body, settings["api_key"])
    if status != 200:
        raise ModelFault(
            f"the model did not answer a request of one token: {answer.get('error', {}).get('message', status)}"
        )
    if answer["usage"]["completion_tokens"] < 1:
        raise ModelFault("the model answered a request of one token without a token")


async def _post(app: App, path: str, body: dict[str, Any], key: str | None) -> tuple[int, dict[str, Any]]:
    request = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if request:
            return request.pop()
        # A client that stays: the answer cancels this wait.
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": None}
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))
