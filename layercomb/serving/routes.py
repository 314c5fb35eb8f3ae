"""The application: its routes, requests and responses."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
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

from layercomb.errors import UsageError
from layercomb.serving import protocol
from layercomb.serving.access import check_access, checked_key
from layercomb.serving.engine import Engine, Running
from layercomb.serving.hosts import ANY, allowed, checked, name_of
from layercomb.serving.limits import Limits
from layercomb.serving.openai import chat, completions, tokens
from layercomb.serving.openai.answers import Answer
from layercomb.serving.openai.fields import cut
from layercomb.serving.openai.scores import Names
from layercomb.serving.protocol import Refusal
from layercomb.supervised.decoding.sampling import Sampler

_PAGE = importlib.resources.files('layercomb.serving').joinpath('page.html').read_text('utf-8')
# A client that is cut off while it writes does not read the response, so up to this many times the
# allowed bytes are read and dropped.
_DISCARDED = 16


def build(
    engine: Engine,
    tokenizer: Any,
    name: str,
    limits: Limits,
    hosts: str | Sequence[str] | None,
    api_key: str | None = None,
) -> Starlette:
    """The application around an engine; see `serving.app`."""
    routes = _Routes(engine, tokenizer, name, limits)
    allowed_hosts, key = None if hosts is None else allowed(hosts), checked_key(api_key)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await engine.close()

    def route(path: str, answer: Any, method: str, is_open: bool = False) -> Route:
        guarded = _guarded(answer, allowed_hosts, None if is_open else key)
        return Route(path, guarded, methods=[method])

    handlers: dict[Any, Any] = {Refusal: _refused, HTTPException: _http, Exception: _failed}
    made = Starlette(
        routes=[
            route('/', routes.page, 'GET', is_open=True),
            route('/healthz', routes.health, 'GET', is_open=True),
            route('/v1/models', routes.models, 'GET'),
            route('/v1/completions', routes.completions, 'POST'),
            route('/v1/chat/completions', routes.chat, 'POST'),
            route('/tokenize', routes.tokenize, 'POST'),
            route('/detokenize', routes.detokenize, 'POST'),
            route('/tokenizer_info', routes.tokenizer_info, 'GET'),
        ],
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    made.state.engine = engine
    return made


def _guarded(answer: Any, hosts: Sequence[str] | None, key: str | None) -> Any:
    """An endpoint that answers under allowed host names, see `hosts`, to those who have the key."""

    async def endpoint(request: Request) -> Response:
        said = request.headers.get('host')  # browsers always send one
        if said is not None and hosts is not None and ANY not in hosts:
            name = name_of(said)
            if name not in hosts:
                shown = _suggested(name)
                message = (
                    f'unknown Host {shown}: use the address the server told, or start it with '
                    f'--allowed_hosts {shown}'
                )
                raise Refusal(403, message, 'unknown_host')
        check_access(request.headers, key)
        return await answer(request)

    return endpoint


class _Routes:
    """What answers each path."""

    def __init__(self, engine: Engine, tokenizer: Any, name: str, limits: Limits) -> None:
        self._engine, self._tokenizer, self._name, self._limits = engine, tokenizer, name, limits
        self._names = Names(tokenizer)
        own = self._names.tokenizer.tokenizer
        self._chat = own if getattr(own, 'chat', None) is not None else None
        self._advised = _advised(own)

    async def page(self, request: Request) -> Response:
        kind = 'chat' if self._chat is not None else 'text'
        of_text = 'data-kind="text" data-most="256"'  # as the page is written
        here = f'data-kind="{kind}" data-most="{min(256, self._limits.max_tokens)}"'
        return HTMLResponse(_PAGE.replace(of_text, here), headers=_HEADERS)

    async def health(self, request: Request) -> Response:
        return JSONResponse({'status': 'ok', 'running': self._engine.n_running})

    async def models(self, request: Request) -> Response:
        about = {'object': 'model', 'created': 0, 'owned_by': 'layercomb'}
        base = {'id': self._name, **about}
        adapted = ({'id': name, **about, 'parent': self._name} for name in self._engine.adapters)
        return JSONResponse({'object': 'list', 'data': [base, *adapted]})

    async def completions(self, request: Request) -> Response:
        return await self._answered(
            request,
            completions.parse,
            self._tokenizer,
            self._name,
            self._engine.vocab_size,
            self._limits,
            self._advised,
            self._engine.adapters,
        )

    async def chat(self, request: Request) -> Response:
        if self._chat is None:
            message = (
                'this model has no chat template, so it continues texts: ask /v1/completions, or '
                'serve a model that was taught to answer'
            )
            raise Refusal(404, message, 'no_chat_template')
        return await self._answered(
            request,
            chat.parse,
            self._chat,
            self._name,
            self._engine.vocab_size,
            self._limits,
            self._advised,
            self._engine.max_len,
            self._engine.adapters,
        )

    async def tokenize(self, request: Request) -> Response:
        served = self._tokenizer, self._name, self._engine.adapters
        made = await self._read(request, tokens.tokenize, *served)
        return JSONResponse({**made, 'max_model_len': self._engine.max_len})

    async def detokenize(self, request: Request) -> Response:
        served = self._tokenizer, self._name, self._engine.vocab_size, self._engine.adapters
        return JSONResponse(await self._read(request, tokens.detokenize, *served))

    async def tokenizer_info(self, request: Request) -> Response:
        return JSONResponse(tokens.info(self._tokenizer))

    async def _answered(self, request: Request, parse: Any, *how: Any) -> Response:
        asked: protocol.Request = await self._read(request, parse, *how)
        gone = asyncio.create_task(_gone(request))
        try:
            running = await self._start(asked, gone)
            answer = Answer(running, asked.adapter or self._name, self._names)
            if asked.stream:
                return _EventStream(running, answer)
            gone.add_done_callback(lambda _: running.cancel())
            return JSONResponse(await answer.whole())
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

    async def _read(self, request: Request, parse: Any, *how: Any) -> Any:
        """What is made of a body of JSON of an allowed size."""
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
        # Encoding does not block other requests.
        return await run_in_threadpool(parse, bytes(body), *how)


def _advised(tokenizer: Any) -> dict[str, Any]:
    """What a model's makers advise for sampling, as arguments of `Sampler`.

    Raises:
      UsageError: if it cannot be.
    """
    given = dict(getattr(tokenizer, 'generation', None) or {})
    names = ('temperature', 'top_k', 'top_p', 'repetition_penalty')
    made = {name: given[name] for name in names if given.get(name) is not None}
    if made.get('top_k') == 0:  # none, as transformers has it
        del made['top_k']
    try:
        Sampler(**made)
    except (TypeError, ValueError) as e:
        raise UsageError(f"the model's generation settings cannot be used ({e})") from None
    return made


def _suggested(name: str) -> str:
    """A valid host name, or NAME: the message may be copied into a command."""
    try:
        return 'NAME' if name == ANY else checked(name)
    except ValueError:
        return 'NAME'


class _EventStream(StreamingResponse):
    """A completion as server-sent events, as it is made."""

    def __init__(self, running: Running, answer: Answer) -> None:
        headers = {'Cache-Control': 'no-store'}
        super().__init__(answer.events(), media_type='text/event-stream', headers=headers)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # after a disconnect nothing more is made
            self._running.cancel()


async def _gone(request: Request) -> None:
    """Ends when the client has hung up."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass


async def _refused(request: Request, refusal: Refusal) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _http(request: Request, error: HTTPException) -> Response:
    code = {404: 'not_found', 405: 'method_not_allowed'}.get(error.status_code, 'http_error')
    refusal = Refusal(error.status_code, f'{error.detail}: {cut(request.url.path, 200)}', code)
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


_HEADERS = {
    'Content-Security-Policy': _policy(_PAGE),
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
}
