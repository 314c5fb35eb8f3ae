"""The host names under which a server answers.

A hostile page can make its own host name resolve to this machine (DNS rebinding). The browser then
sends that name as the Host header, so requests for names that nobody has allowed are refused.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Sequence

ANY = '*'
_LABEL = re.compile(r'[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?')
_LONGEST = 253  # characters of a name, RFC 1035


def allowed(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names in the form that `name_of` gives.

    Args:
      names: host names as a browser sends them (``xn--…`` for letters beyond ASCII) and addresses,
        without ports: a sequence, or one text with commas between them. ``*`` allows any.

    Raises:
      ValueError: if one is no name of a host.

    >>> allowed('Chat.Example.org., [::1]')
    ('chat.example.org', '::1')
    """
    if isinstance(names, str):
        names = [each for each in names.split(',') if each.strip()] or [names]
    return tuple(map(checked, names))


def name_of(host: str) -> str:
    """The name in a Host header: without its port, brackets and last dot, in lower case.

    >>> [name_of(host) for host in ('LOCALHOST:8000', '[::1]:8000', 'chat.example.org.')]
    ['localhost', '::1', 'chat.example.org']
    """
    host = host.strip().lower()
    bracketed = re.fullmatch(r'\[(.*)\](:\d*)?', host)
    host = bracketed[1] if bracketed else re.sub(r'^([^:]*):\d*$', r'\1', host)
    try:
        return str(ipaddress.ip_address(host))  # ::1 can be spelled in other ways
    except ValueError:
        return host.removesuffix('.')


def checked(name: str) -> str:
    """One name in the form that `name_of` gives, or ``*``.

    Raises:
      ValueError: if it is no host name. Names with letters beyond ASCII are refused: there are
        several rules to encode them, and the wrong one may give the name of another host.
    """
    made = name.strip() if isinstance(name, str) else ''
    if made == ANY:
        return made
    if not made.isascii():
        raise ValueError(
            f'{name!r:.80} is not in ASCII: give the name as the browser sends it, xn--…'
        )
    if '%' not in made:  # an interface, which browsers do not send
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(made.removeprefix('[').removesuffix(']')))
    made = made.lower().removesuffix('.')
    if len(made) > _LONGEST or not all(map(_LABEL.fullmatch, made.split('.'))):
        raise ValueError(
            f'{name!r:.80} is no host name: give names as a browser sends them, without scheme, '
            'port and path, e.g. chat.example.org, or * for any'
        )
    return made
