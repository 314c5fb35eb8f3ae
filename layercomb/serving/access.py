"""Who may ask: whoever knows a key, if there is one."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping

from layercomb.serving.protocol import Refusal

VARIABLE = 'LAYERCOMB_API_KEY'
_KEY = re.compile(r'[!-~]{1,512}')


def checked_key(key: str | None) -> str | None:
    """A key that a header can hold; None for no key.

    Raises:
      ValueError: if it is empty, or holds other characters than letters, digits and signs of ASCII.
    """
    if key is not None and not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise ValueError(
            'the API key must be 1 to 512 letters, digits or signs of ASCII, without spaces: '
            "choose another, e.g. that of python -c 'import secrets; print(secrets.token_hex())'"
        )
    return key


def check_access(headers: Mapping[str, str], key: str | None) -> None:
    """Refuses a request that does not send the key.

    Args:
      headers: of the request.
      key: what ``Authorization: Bearer KEY`` must hold; None if anybody may ask.

    Raises:
      Refusal: of the status 401.
    """
    if key is None:
        return
    kind, _, said = headers.get('authorization', '').partition(' ')
    said = said.strip() if kind.lower() == 'bearer' else ''
    if not hmac.compare_digest(_digest(said), _digest(key)):
        what = 'the API key is wrong' if said else 'an API key is needed'
        raise Refusal(
            401,
            f'{what}: send Authorization: Bearer KEY, with the key the server was started with',
            'invalid_api_key',
            headers={'WWW-Authenticate': 'Bearer'},
        )


def _digest(text: str) -> bytes:
    """Of one length for any text, so that comparing tells nothing of the key's."""
    return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).digest()
