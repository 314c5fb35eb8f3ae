"""The application: its routes, requests and responses."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from layercomb.serving import protocol
from layercomb.serving.engine import Engine, Running
from layercomb.serving.hosts import ANY, allowed, checked, name_of
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Refusal

_PAGE = importlib.resources.files('layercomb.serving').joinpath('page.html').read_text('utf-8')
# A client that is cut off while it writes does not read the response, so up to this many times the
# allowed bytes are read and dropped.
_DISCARDED = 16


def build(
    engine: Engine, tokenizer: Any, name: str, limits: Limits, hosts: str | Sequence[str] | None
) -> Starlette:
    """The application around an engine; see `serving.app`."""
    routes = _Routes(engine, tokenizer, name, limits, hosts)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await engine.close()

    handlers: dict[Any, Any] = {Refusal: _refused, HTTPException: _http, Exception: _failed}
    made = Starlette(
        routes=[
            Route('/', routes.guarded(routes.page), methods=['GET']),
            Route('/healthz', routes.guarded(routes.health), methods=['GET']),
            Route('/v1/models', routes.guarded(routes.models), methods=['GET']),
            Route('/v1/completions', routes.guarded(routes.completions), methods=['POST']),
        ],
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    made.state.engine = engine
    return made


class _Routes:
    """What answers each path."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        name: str,
        limits: Limits,
        hosts: str | Sequence[str] | None,
    ) -> None:
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self._limits, self._hosts = limits, None if hosts is None else allowed(hosts)

    def guarded(self, answer: Any) -> Any:
        """An endpoint that answers only under the allowed host names, see `hosts`."""

        async def endpoint(request: Request) -> Response:
            said = request.headers.get('host')  # browsers always send one
            if said is not None and self._hosts is not None and ANY not in self._hosts:
                name = name_of(said)
                if name not in self._hosts:
                    shown = _suggested(name)
                    message = (
                        f'unknown Host {shown}: use the address the server told, or start it with '
                        f'--allowed_hosts {shown}'
                    )
                    raise Refusal(403, message, 'unknown_host')
            return await answer(request)

        return endpoint

    async def page(self, request: Request) -> Response:
        return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        return JSONResponse({'status': 'ok', 'running': self._engine.n_running})

    async def models(self, request: Request) -> Response:
        model = {'id': self._name, 'object': 'model', 'created': 0, 'owned_by': 'layercomb'}
        return JSONResponse({'object': 'list', 'data': [model]})

    async def completions(self, request: Request) -> Response:
        asked = await self._read(request)
        gone = asyncio.create_task(_gone(request))
        try:
            running = await self._start(asked, gone)
            if asked.stream:
                return _EventStream(running, self._name)
            gone.add_done_callback(lambda _: running.cancel())
            return JSONResponse(await _whole(running, self._name))
        finally:
            gone.cancel()

    async def _start(self, asked: protocol.Request, gone: asyncio.Task[None]) -> Running:
        """Begins a completion, unless the client hangs up while it waits for its turn."""
        starting = asyncio.create_task(self._engine.start(asked))
        try:
            await asyncio.wait((starting, gone), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise Refusal(400, 'the client hung up before its turn', 'disconnected')
            return starting.result()
        finally:
            starting.cancel()

    async def _read(self, request: Request) -> protocol.Request:
        """The request, if its body is JSON of an allowed size."""
        kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
        if kind != 'application/json':  # another site's page needs a preflight
            raise Refusal(415, 'send JSON, with Content-Type: application/json', 'no_json')
        body, n, limit = bytearray(), 0, self._limits.max_body
        try:
            async with asyncio.timeout(self._limits.reading):
                async for piece in request.stream():
                    n += len(piece)
                    if n <= limit:
                        body += piece
                    elif n > _DISCARDED * limit:
                        break
        except TimeoutError:
            raise Refusal(408, 'the body did not arrive in time', 'timeout') from None
        except ClientDisconnect:
            raise Refusal(400, 'the body ends before its end', 'disconnected') from None
        if n > limit:
            raise Refusal(413, f'the body is over {limit} bytes: send less', 'body_too_large')
        vocab_size = self._engine.vocab_size
        return await run_in_threadpool(  # encoding does not block other requests
            protocol.parse, bytes(body), self._tokenizer, self._name, vocab_size, self._limits
        )


def _suggested(name: str) -> str:
    """A valid host name, or NAME: the message may be copied into a command."""
    try:
        return 'NAME' if name == ANY else checked(name)
    except ValueError:
        return 'NAME'


class _EventStream(StreamingResponse):
    """A completion as server-sent events, as it is made."""

    def __init__(self, running: Running, model: str) -> None:
        headers = {'Cache-Control': 'no-store'}
        super().__init__(_events(running, model), media_type='text/event-stream', headers=headers)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # after a disconnect nothing more is made
            self._running.cancel()


async def _events(running: Running, model: str) -> AsyncIterator[str]:
    name = protocol.new_id()
    try:
        async for piece in running.pieces():
            choice = protocol.choice(piece.index, piece.text, piece.finish_reason)
            yield _event(protocol.completion(name, model, [choice]))
        if running.request.include_usage:
            usage = protocol.usage(running.request, running.n_made)
            yield _event({**protocol.completion(name, model, []), 'usage': usage})
    except Refusal as e:  # the status has been sent already
        yield _event(e.body)
    yield 'data: [DONE]\n\n'


async def _whole(running: Running, model: str) -> dict[str, Any]:
    texts = [''] * len(running.request.rows)
    reasons: list[str | None] = [None] * len(texts)
    async for piece in running.pieces():
        texts[piece.index] += piece.text
        reasons[piece.index] = piece.finish_reason
    choices = [protocol.choice(i, *of) for i, of in enumerate(zip(texts, reasons, strict=True))]
    made = protocol.completion(protocol.new_id(), model, choices)
    return {**made, 'usage': protocol.usage(running.request, running.n_made)}


async def _gone(request: Request) -> None:
    """Ends when the client has hung up."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass


def _event(value: dict[str, Any]) -> str:
    return f'data: {json.dumps(value, ensure_ascii=False)}\n\n'


async def _refused(request: Request, refusal: Refusal) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _http(request: Request, error: HTTPException) -> Response:
    code = {404: 'not_found', 405: 'method_not_allowed'}.get(error.status_code, 'http_error')
    refusal = Refusal(
        error.status_code, f'{error.detail}: {protocol.cut(request.url.path, 200)}', code
    )
    return JSONResponse(refusal.body, refusal.status, {**(error.headers or {})})


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(
        Refusal(500, 'an error here: the log says which', 'internal_error').body, 500
    )


def _policy(page: str) -> str:
    """A policy under which the page runs its own script and style, and nothing else."""

    def hashed(tag: str) -> str:
        (inside,) = re.findall(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        return f"{tag}-src 'sha256-{digest}'"

    rules = ("default-src 'none'", hashed('script'), hashed('style'), "connect-src 'self'")
    return '; '.join((*rules, "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"))


_PAGE_HEADERS = {
    'Content-Security-Policy': _policy(_PAGE),
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
}
