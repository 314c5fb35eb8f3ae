"""A server for one language model: OpenAI's completions and chat API, and a page.

from layercomb import serving
application = serving.app(model, tokenizer, 'my-model')      # ASGI
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layercomb import transforms
from layercomb.errors import UsageError, require
from layercomb.model import Model
from layercomb.serving.access import checked_key
from layercomb.serving.hosts import allowed
from layercomb.serving.limits import Limits
from layercomb.supervised.decoding.drafts import Speculation

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ['Limits', 'app', 'bound', 'run']

_LOOPBACK = ('127.0.0.1', 'localhost', '::1')


def app(
    model: Model,
    tokenizer: Any,
    name: str,
    limits: Limits = Limits(),
    hosts: str | Sequence[str] | None = None,
    api_key: str | None = None,
    speculate: Speculation | None = None,
) -> Starlette:
    """Makes the ASGI application, and compiles the programs that most requests need.

    ``POST /v1/completions`` takes `prompt` (a text, texts, or token ids), `max_tokens` (0 with
    `echo` for the prompt alone), `n`, `best_of`, `temperature`, `top_p`, `presence_penalty`,
    `frequency_penalty`, `logit_bias`, `logprobs`, `stop`, `stream`, `stream_options`, `seed`,
    `echo`, and, beyond OpenAI's fields, `top_k` and `repetition_penalty`. OpenAI's other fields are
    accepted if their values ask for nothing. ``POST /v1/chat/completions`` takes `messages` of
    texts, and the same, with `max_completion_tokens` and `top_logprobs`, without `echo` and
    `best_of`; only where the tokenizer has a chat template. Where a request is silent about
    sampling, the tokenizer's ``generation`` holds.

    Prompt and answer are one text: the answer is what its tokens add to the text of the prompt.
    Stop texts are searched in the answer only; the one that is complete first ends it. ``GET``
    serves ``/v1/models``, ``/healthz`` and a page at ``/``. ``/tokenize``, ``/detokenize`` and
    ``/tokenizer_info`` are for programs that count tokens. Errors are JSON.

    If the model has adapters (`transforms.adapters`), each of them is a model of its own for
    clients, by its name, and rows of several are decoded together.

    Args:
      model: a language model with weights, (B, L) → (B, L, V).
      tokenizer: turns text into tokens and back: see `data.Tokenizer`.
      name: of the model, as clients know it.
      limits: what requests may ask for.
      hosts: the host names under which it answers, without ports; ``'*'`` or None for any. A
        request without a Host header is answered; browsers always send one.
      api_key: what requests must send as ``Authorization: Bearer KEY``, except for the page and
        ``/healthz``; None if anybody may ask.
      speculate: how tokens of a choice that is alone are drafted, as of `Engine`; None for no
        drafts.

    Returns:
      An ASGI application; its `state.engine` makes the completions.

    Raises:
      TypeError, ValueError: if the tokenizer does not offer what `data.Tokenizer` names, a host
        is no host name, or the key is none that a header can hold.
      UsageError: if starlette is not installed, or the model is no language model or cannot be
        decoded, or cannot speculate; or if one of its adapters is called as the model is.
    """
    require('starlette', 'serve')
    if model.layer.n_in != 1:
        raise UsageError(
            f'serve takes a language model: this one has {model.layer.n_in} inputs; an '
            'encoder-decoder answers by layercomb generate, or decoding.generate(inputs=…)'
        )
    from layercomb.serving.engine import Engine
    from layercomb.serving.routes import build

    checked_key(api_key)  # before anything is compiled
    if name in transforms.adapter_names(model.layer):
        raise UsageError(f'{name!r} is the model itself: give the adapter another name')
    engine = Engine(model, tokenizer, limits, speculate)
    engine.warm_up()
    return build(engine, tokenizer, name, limits, hosts, api_key)


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound to an address and does not listen yet.

    Args:
      host: a name or an address; ``0.0.0.0`` or ``::`` for all interfaces.
      port: 0 … 65535; 0 takes a free one.

    Raises:
      UsageError: if the address is taken, not allowed, or not of this machine.
    """
    require('uvicorn', 'serve')
    if not isinstance(port, int | np.integer) or not 0 <= port < 1 << 16:
        raise UsageError(f'port {port} cannot be: choose --port from 0 to {(1 << 16) - 1}')
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as e:
        raise UsageError(f'{host!r} is no address ({e}): choose another --host') from None
    with made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
        except OSError as e:
            cure = '--port' if e.errno in (errno.EADDRINUSE, errno.EACCES) else '--host'
            raise UsageError(
                f'cannot listen on {host}:{port} ({e.strerror}): choose another {cure}'
            ) from None
        yield made


def run(
    model: Model,
    tokenizer: Any,
    name: str,
    limits: Limits,
    listener: socket.socket,
    allowed_hosts: str | Sequence[str] = (),
    api_key: str | None = None,
    speculate: Speculation | None = None,
) -> None:
    """Serves until it is interrupted, and prints a line when it is ready.

    Args:
      model, tokenizer, name, limits: as for `app`.
      listener: a socket from `bound`. If only this machine can reach it, requests for other host
        names are refused.
      allowed_hosts: further host names under which it answers, such as that of a proxy on this
        machine that passes the Host header on; ``'*'`` for any. If other machines can reach the
        listener, it answers under any name by default; with `allowed_hosts`, only under these and
        those of the loopback.
      api_key, speculate: as for `app`.

    Raises:
      TypeError, ValueError, UsageError: as `app`.
    """
    uvicorn = require('uvicorn', 'serve')
    address, port, *_ = listener.getsockname()
    here = ipaddress.ip_address(address).is_loopback
    further = allowed(allowed_hosts)
    own = address.partition('%')[0]  # without the interface, which browsers do not send
    hosts = (*_LOOPBACK, own, *further) if here or further else None
    print(f'{name}: compiling', flush=True)
    started = time.perf_counter()
    application = app(model, tokenizer, name, limits, hosts, api_key, speculate)
    logging.basicConfig(level=logging.WARNING)
    config = uvicorn.Config(
        application,
        access_log=False,
        log_level='warning',
        timeout_graceful_shutdown=1,
        ws='none',
    )
    listener.listen()  # requests from now on wait until the server runs
    seconds = time.perf_counter() - started
    shown = f'[{address}]' if ':' in address else address
    print(f'ready after {seconds:.1f} s: http://{shown}:{port}/ (Ctrl-C stops)', flush=True)
    if not here:
        asked = 'nothing asks who they are' if api_key is None else 'they need the API key'
        print(f'other machines may reach it, and {asked}', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
