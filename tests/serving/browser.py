"""A headless Chromium, driven over the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def _runs(program: str) -> bool:
    """Whether a browser starts; some systems have a stub there, which only says where to get it."""
    try:
        done = subprocess.run([program, '--version'], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


_NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
CHROMIUM = next(filter(_runs, filter(None, map(shutil.which, _NAMES))), None)

# The protocol is spoken on the browser's descriptors 3 and 4, which may be taken here.
_EXEC = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One page in a browser of its own.

    Args:
      url: what to open.
      width, height: of the window.
    """

    def __init__(self, url: str, width: int = 1000, height: int = 800) -> None:
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        flags = ('--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe')
        command = [str(CHROMIUM), *flags, f'--user-data-dir={self._home.name}']
        self._process = subprocess.Popen(
            [sys.executable, '-c', _EXEC, str(read), str(write), *command],
            pass_fds=(read, write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._ids, self._received, self._session = itertools.count(1), b'', None
        target = self._call('Target.createTarget', url=url)['targetId']
        self._session = self._call('Target.attachToTarget', targetId=target, flatten=True)[
            'sessionId'
        ]
        self._call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.until(f"location.href === '{url}' && document.readyState === 'complete'")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)
        self._process.terminate()
        self._process.wait(20)
        os.close(self._from)
        self._home.cleanup()

    def js(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        said = self._call(
            'Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True
        )
        assert 'exceptionDetails' not in said, said
        return said['result'].get('value')

    def until(self, expression: str, seconds: float = 30) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f'still false: {expression}'
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self._call('Input.insertText', text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Presses a key; modifiers: 2 is Ctrl."""
        code = {'Enter': 13, 'Escape': 27, 'Tab': 9}[key]
        said = {'text': '\r'} if key == 'Enter' else {}  # with a text, it submits a form
        for kind in ('keyDown', 'keyUp'):
            self._call(
                'Input.dispatchKeyEvent',
                type=kind,
                **said,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
            )

    def dark(self) -> None:
        """Asks for dark colours."""
        self._call(
            'Emulation.setEmulatedMedia',
            features=[{'name': 'prefers-color-scheme', 'value': 'dark'}],
        )

    def screenshot(self, path: str | Path) -> None:
        """Writes what is seen as a PNG."""
        Path(path).write_bytes(base64.b64decode(self._call('Page.captureScreenshot')['data']))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        asked = {'id': next(self._ids), 'method': method, 'params': params}
        if self._session is not None:
            asked['sessionId'] = self._session
        os.write(self._to, json.dumps(asked).encode() + b'\0')
        while True:
            message, rest, self._received = self._received.partition(b'\0')
            if not rest:
                piece = os.read(self._from, 1 << 16)
                assert piece, 'the browser ended'
                self._received = message + piece
                continue
            said = json.loads(message)
            if said.get('id') == asked['id']:
                assert 'error' not in said, said
                return said['result']
