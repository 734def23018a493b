"""mlx-lm's request handler with what it lacks: errors of OpenAI's kind, a key, one model, and clients that leave."""

import contextlib
import functools
import io
import json
import logging
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from mlx_lm import server as upstream

from mlx_launcher.host import legacy_harmony
from mlx_launcher.host.access import check_key, check_model, check_sender, is_loopback
from mlx_launcher.host.chat import accepted, prepare
from mlx_launcher.host.engine import unforeseen
from mlx_launcher.host.errors import EmptyPromptError, RequestError
from mlx_launcher.host.requests import Generation, check_logit_bias, parse_chat, parse_completion
from mlx_launcher.host.responses import error_body, sse
from mlx_launcher.host.stops import StopScanner
from mlx_launcher.host.timings import Stopwatch

if TYPE_CHECKING:
    from mlx_launcher.host.legacy_service import Service

log = logging.getLogger("mlx_launcher.host")

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_MOST_LOGPROBS = 11  # mlx-lm's own limit


class _Refused(BaseException):
    """A RequestError on its way through mlx-lm's handler, which answers every Exception of a generation with 404."""

    def __init__(self, error: RequestError) -> None:
        super().__init__()
        self.error = error


class _ClientLeft(BaseException):
    """Nobody is there to answer."""


class Handler(upstream.APIHandler):  # type: ignore[misc]
    """Serves one connection, which is one request: mlx-lm speaks HTTP/1.0."""

    path: str
    timeout = 75.0  # for a client that sends nothing, or takes nothing

    def __init__(self, service: "Service", *connection: Any) -> None:
        self._service = service
        self._streams = False
        self._calls = 0
        super().__init__(_Watched(service, self), *connection, system_fingerprint=service.fingerprint)

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        with self._errors():
            self._check_sender()
            path = self.path.partition("?")[0].rstrip("/")
            if not is_loopback(self.client_address[0]):
                self._check_key()
            settings = self._service.settings
            if path == "/health":
                status = {"model": settings["model_id"], "model_loaded": self._service.alive}
                if self._service.alive:
                    self._answer(200, {"status": "ok", **status})
                else:
                    self._answer(503, {"status": "unavailable", **status})
            elif path == "/v1/models":
                self._answer(200, {"object": "list", "data": [self._model()]})
            elif path.startswith("/v1/models/"):
                check_model(settings, unquote(path.removeprefix("/v1/models/")), exact=True)
                self._answer(200, self._model())
            else:
                raise RequestError(404, f"there is nothing at {path or '/'}; try {_CHAT}, /v1/models or /health")

    def do_POST(self) -> None:  # noqa: N802
        with self._errors():
            self._check_sender()
            path = self.path.partition("?")[0].rstrip("/")
            if path not in (_CHAT, _TEXT):
                raise RequestError(404, f"there is nothing at {path or '/'}; try {_CHAT}, /v1/models or /health")
            with self._counted():
                self._answered(path)

    def _answered(self, path: str) -> None:
        self._check_key()
        raw = self._body()
        body, generation = parse_chat(raw) if path == _CHAT else parse_completion(raw)
        check_model(self._service.settings, body.model)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        asked = {
            "model": self._service.settings["model_id"],
            "stream": bool(body.stream),
            "stream_options": {"include_usage": include_usage},
            **self._asked(generation),
        }
        # Handed on as if it had come so: mlx-lm's handler reads it from here.
        raw = json.dumps({key: value for key, value in asked.items() if value is not None}).encode()
        self.path, self.rfile = path, io.BytesIO(raw)
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(raw))
        with self._service.answered(), self.response_generator.asked(path, generation.stop):
            super().do_POST()

    def do_OPTIONS(self) -> None:  # noqa: N802
        """A preflight gets no permission: mlx-lm's own handler would name all methods and headers."""
        with self._errors():
            self._check_sender()
            raise RequestError(405, "OPTIONS is not possible here; use GET or POST")

    def _asked(self, generation: Generation) -> dict[str, Any]:
        """The request in mlx-lm's words, and nothing else of what came: it would load adapters and other models by name."""
        if generation.guide is not None:
            raise RequestError(400, "answers cannot be constrained by the legacy server", param="response_format")
        if generation.n > 1 or len(generation.prompts) > 1:
            raise RequestError(400, "the legacy server gives one answer to one prompt", param="n")
        vocabulary = self._service.vocabulary
        check_logit_bias(generation, vocabulary)
        sampling = dict(generation.sampling)
        if sampling.get("top_k", 0) >= vocabulary:
            # It leaves out nothing, and mlx-lm's thread would end of it.
            del sampling["top_k"]
        asked: dict[str, Any] = {
            **sampling,
            "max_tokens": generation.max_tokens,
            "logprobs": generation.top_logprobs is not None,
            "top_logprobs": min(generation.top_logprobs or 0, _MOST_LOGPROBS),
        }
        tokenizer = self._service.provider.tokenizer
        if generation.messages is None:
            prompt = generation.prompts[0]
            if not prompt.strip() and not tokenizer.encode(prompt):
                # mlx-lm's thread would end of it, and the server with it.
                raise EmptyPromptError
            return {**asked, "prompt": prompt}
        messages = prepare(generation.messages)
        if tokenizer.has_chat_template:
            messages, _ = accepted(tokenizer, messages, generation.tools)
        return {**asked, "messages": messages, "tools": generation.tools}

    def _body(self) -> bytes:
        limit = self._service.settings["max_body_bytes"]
        try:
            size = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            raise RequestError(411, "the request has no Content-Length") from None
        if size > limit:
            raise RequestError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        body: bytes = self.rfile.read(max(size, 0))
        if len(body) < size:
            raise _ClientLeft
        return body

    def _check_sender(self) -> None:
        # As http.server read them.
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]
        check_sender(self._service.settings, headers)

    def _check_key(self) -> None:
        check_key(self._service.settings, self.headers.get("Authorization", "").encode("latin-1"))

    def _set_cors_headers(self) -> None:
        """None at all, for no page is to read an answer."""

    def _model(self) -> dict[str, Any]:
        name = self._service.settings["model_id"]
        return {"id": name, "object": "model", "created": self.created, "owned_by": "mlx-launch"}

    def _answer(self, status: int, body: dict[str, Any], **headers: str) -> None:
        raw = json.dumps(body).encode()
        self._set_completion_headers(status)
        for name, value in {**headers, "Content-Length": str(len(raw))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Around one request for an answer: counts how it ended."""
        timings = self._service.counters.timings
        timings.asked()
        failed: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failed = error.error if isinstance(error, _Refused) else error
            raise
        finally:
            timings.ended(failed)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _Refused as refused:
            self._fail(refused.error)
        except RequestError as error:
            self._fail(error)
        except (_ClientLeft, OSError):
            self.close_connection = True
        except Exception as error:
            self._fail(unforeseen(error))

    def _fail(self, error: RequestError) -> None:
        with contextlib.suppress(OSError):
            if self._streams:
                self.wfile.write(sse(error_body(error)))
                return
            # mlx-lm's handler has a 200 ready before the first token.
            self._headers_buffer: list[bytes] = []
            retry = {"Retry_After": str(error.retry_after)} if error.retry_after is not None else {}
            self._answer(error.status, error_body(error), **retry)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        self._streams = True
        super()._set_stream_headers(status_code)

    def generate_response(
        self, text: str, finish_reason: str | None, *rest: Any, tool_calls: Any = None, **named: Any
    ) -> Any:
        """An answer whose calls were all left out, because they were not well formed, has not ended in calls."""
        self._calls += len(tool_calls or ())
        if finish_reason == "tool_calls" and not self._calls:
            finish_reason = "stop"
        return super().generate_response(text, finish_reason, *rest, tool_calls=tool_calls, **named)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are logged with what they cost, and never on a stderr that may block."""

    def has_left(self) -> bool:
        # Polled first: a socket with a timeout waits even where it is told not to.
        watch = select.poll()
        watch.register(self.connection, select.POLLIN)
        try:
            return bool(watch.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


class _Watched:
    """mlx-lm's generator as one handler sees it: counted, and given up when the client leaves or the server stops.

    It also looks for stop strings: mlx-lm does so by their tokens, and misses those that the model writes with others.
    """

    def __init__(self, service: "Service", handler: Handler) -> None:
        self._service = service
        self._handler = handler
        self._began = time.monotonic()
        self._stops: list[str] = []
        self._prompt = self._cached = self._generated = self._processed = 0
        self._left = False
        self._stopwatch = Stopwatch(service.counters.timings, self._began)

    @property
    def cli_args(self) -> Any:
        return self._service.provider.cli_args

    @contextlib.contextmanager
    def asked(self, path: str, stops: list[str]) -> Iterator[None]:
        """Around one request, which is logged with what it cost."""
        self._stops = stops
        try:
            yield
        finally:
            self._stopwatch.over()
            log.info(
                "%s: %d prompt tokens, %d of them cached, %d generated, %.2f s%s",
                "chat" if path == _CHAT else "completion",
                self._prompt,
                self._cached,
                self._generated,
                time.monotonic() - self._began,
                ", client left" if self._left else "",
            )

    def generate(self, request: Any, arguments: Any, progress_callback: Callable[[int, int], None]) -> Any:
        self._check()
        try:
            context, answers = self._service.generator.generate(
                request, arguments, functools.partial(self._on_progress, progress_callback)
            )
        except Exception as error:
            raise _Refused(unforeseen(error)) from None
        self._prompt = len(context.prompt)
        limit = self._service.context
        if limit is not None and self._prompt >= limit:
            context.stop()
            what = f"the prompt has {self._prompt} tokens, the model's context is {limit}"
            raise _Refused(RequestError(400, what, param="messages", code="context_length_exceeded"))
        self._service.counters.prompt_tokens += self._prompt
        if self._service.harmony:
            context.text_sm = legacy_harmony.STATES
            context.tool_parser = legacy_harmony.parse_call
        context.tool_parser = functools.partial(_well_formed, context.tool_parser)
        return context, self._watched(context, answers)

    def _watched(self, context: Any, answers: Any) -> Iterator[Any]:
        scanner = StopScanner(self._stops)
        for answer in answers:
            if not self._generated:
                self._cached = max(0, context.prompt_cache_count)
                self._service.counters.cached_tokens += self._cached
                self._stopwatch.prompted(self._prompt, self._cached)
            self._generated += 1
            self._service.counters.completion_tokens += 1
            self._stopwatch.token()
            self._check()
            text, stop, _ = scanner.feed(answer.text)
            if stop is not None or answer.finish_reason == "stop":
                # Without a last answer mlx-lm's handler takes it for a stop, but does not drop the text that comes with one.
                yield replace(answer, text=text if stop is not None else scanner.flush(), finish_reason=None)
                return
            yield replace(answer, text=text + scanner.flush() if answer.finish_reason else text)

    def _on_progress(self, tell: Callable[[int, int], None], done: int, total: int) -> None:
        self._service.counters.processed_tokens += max(0, done - self._processed)
        self._processed = max(self._processed, done)
        self._check()
        tell(done, total)

    def _check(self) -> None:
        if self._service.stopping:
            raise _Refused(RequestError(503, "the server is stopping", code="stopping", retry_after=1))
        if self._handler.has_left():
            self._left = True
            raise _ClientLeft


def _well_formed(parse: Callable[[str, Any], Any], text: str, tools: Any) -> list[dict[str, Any]]:
    """What mlx-lm's parser makes of a call; ValueError, for which mlx-lm leaves the call out, for all that is none."""
    try:
        parsed = parse(text, tools)
    except Exception as error:
        log.warning("a tool call is left out: it cannot be parsed (%s)", type(error).__name__)
        raise ValueError("not a call") from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    for call in calls:
        if not (
            isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
        ):
            log.warning("a tool call is left out: it lacks a name or arguments")
            raise ValueError("not a call")
    return calls
