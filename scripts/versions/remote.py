"""Reads some members of a zip file that lies on a web server, without downloading the rest."""

from __future__ import annotations

import io
import os
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from zipfile import ZipFile

WINDOW = 1 << 20
"""Bytes fetched at once. Python files lie next to each other in a wheel, so most members cost no request."""

TIMEOUT = 60.0
"""Seconds the server may be silent."""


class RangeFile(io.RawIOBase):
    """A file on a web server, read by HTTP range requests. Raises OSError where the server does not take them."""

    def __init__(self, url: str, context: ssl.SSLContext | None) -> None:
        self._url, self._context, self._position = url, context, 0
        with self._open("bytes=0-0") as response:
            self._size = int(response.headers["Content-Range"].rpartition("/")[2])

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move, without a request."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Fill the buffer by one request, or up to the end of the file."""
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        with self._open(f"bytes={self._position}-{end - 1}") as response:
            data = response.read()
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    @contextmanager
    def _open(self, wanted: str) -> Iterator[HTTPResponse]:
        request = urllib.request.Request(self._url, headers={"Range": wanted})
        with urllib.request.urlopen(request, timeout=TIMEOUT, context=self._context) as response:
            if response.status != 206:
                raise OSError(f"the server at {self._url} does not answer range requests")
            yield response


def open_zip(url: str, certificates: str | None) -> ZipFile:
    """Open the zip file at a URL. certificates: a file, by default what requests and OpenSSL use. Raises OSError."""
    if url.startswith("file:"):
        return ZipFile(Path(urllib.request.url2pathname(url.removeprefix("file://"))))
    chosen = certificates or os.environ.get("REQUESTS_CA_BUNDLE")
    remote = RangeFile(url, ssl.create_default_context(cafile=chosen) if url.startswith("https:") else None)
    return ZipFile(io.BufferedReader(remote, WINDOW))
