"""The names under which a server answers.

A page from elsewhere may have a name of its own lead to this machine (DNS rebinding); its browser
then sends that name as Host. So names that nobody has allowed are refused.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Sequence

ANY = '*'


def allowed(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names in the form that `name_of` gives.

    Args:
      names: host names and addresses, without ports; several in one text with commas between.
        ``*`` allows any.

    Raises:
      ValueError: if one is no name of a host.

    >>> allowed('Chat.Example.org., [::1]')
    ('chat.example.org', '::1')
    """
    given = names.split(',') if isinstance(names, str) else names
    return tuple(_checked(each) for each in given)


def name_of(host: str) -> str:
    """The name in a Host header: without its port, brackets and last dot, in lower case.

    >>> [name_of(host) for host in ('LOCALHOST:8000', '[::1]:8000', 'chat.example.org.')]
    ['localhost', '::1', 'chat.example.org']
    """
    host = host.strip().lower()
    bracketed = re.fullmatch(r'\[(.*)\](:\d*)?', host)
    host = bracketed[1] if bracketed else re.sub(r'^([^:]*):\d*$', r'\1', host)
    try:
        return str(ipaddress.ip_address(host))  # ::1 has other spellings
    except ValueError:
        return host.removesuffix('.')


def _checked(name: str) -> str:
    made = name.strip() if isinstance(name, str) else ''
    if made == ANY:
        return made
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(made.removeprefix('[').removesuffix(']')))
    made = made.lower().removesuffix('.')
    with contextlib.suppress(UnicodeError):
        made = made if made.isascii() else made.encode('idna').decode()  # as browsers send it
    if not re.fullmatch(r'[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?', made):
        raise ValueError(
            f'allowed hosts have {name!r}: give names as a browser shows them, without scheme, '
            'port and path, e.g. chat.example.org, or * for any'
        )
    return made
