"""Files from the web: fetched once, into a cache, going on where a fetch broke off, and compared with their hash."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

_CHUNK = 2**18
# torch.hub's convention: the first digits of the file's SHA-256 stand in its name.
_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
# What has a meaning in a URL, or is quoted already.
_WRITTEN = "%/:=&?~#+!$,;'@()*[]"
# What is at the start of a web page, and of no checkpoint.
_PAGE = re.compile(rb"\s*<[!?a-zA-Z]")


def hash_in_name(name: str) -> str | None:
    """The SHA-256, or its first digits, that a file's name has: ``dla34-ba72cf86.pth``."""
    found = _IN_NAME.search(name)
    return found[1] if found else None


def is_page(start: bytes) -> bool:
    """Whether a file that starts so is a web page."""
    return _PAGE.match(start) is not None


def check_hash(path: Path, expected: str, *, remove: bool) -> None:
    """Compare a file with its hash.

    Args:
        path: the file.
        expected: its SHA-256 in hexadecimal digits, or as many of the first as are known.
        remove: put a file that is another one aside, as ``<name>.wrong``.

    Raises:
        ValueError: the file is another one.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest().startswith(expected.lower()):
        return
    aside = ""
    if remove:
        wrong = path.with_name(path.name + ".wrong")
        # In a cache that may only be read it stays where it is.
        with contextlib.suppress(OSError):
            path.replace(wrong)
            aside = f"; it was put aside as {wrong}"
    raise ValueError(f"{path}: expected a file whose SHA-256 starts with {expected}, got {digest.hexdigest()}{aside}")


def cached_at(url: str, folder: Path, expected: str | None) -> Path:
    """Where a URL's file is kept. Without a hash two URLs may end alike, so that the name gets a hash of the URL.

    Raises:
        ValueError: a URL that ends in no file's name.
    """
    name = Path(unquote(urlsplit(url).path)).name
    if not name or name in (".", ".."):
        raise ValueError(f"{url}: expected a URL that ends in the name of a file")
    if expected is None:
        path = Path(name)
        name = f"{path.stem}.{hashlib.sha256(url.encode()).hexdigest()[:8]}{path.suffix}"
    return folder / name


def fetch(url: str, folder: Path, *, expected: str | None = None, progress: bool = True, timeout: float = 20.0) -> Path:
    """A URL's file, from the cache or from the web.

    Whole files alone have the file's name: until then it is ``<name>.part``, where the next call goes on. Of several
    processes one fetches, and the others wait for it.

    Args:
        url: of http or https.
        folder: the cache.
        expected: SHA-256 of the file in hexadecimal digits, or as many of the first as are known; None checks nothing.
        progress: show a bar on standard error.
        timeout: seconds that a server may be silent.

    Raises:
        OSError: it cannot be fetched or written, with where to put it by hand.
        ValueError: it is a web page, or has another hash.
    """
    from filelock import FileLock

    path = cached_at(url, folder, expected)
    if not path.exists():
        lock = FileLock(path.with_name(path.name + ".lock"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise OSError(
                f"{url} could not be fetched: {error.filename or folder}: {error.strerror or error}; folder=... names "
                f"another cache. Or fetch it by hand and put it at {path}"
            ) from error
        try:
            if not path.exists():
                _Fetch(url, path, expected is not None, progress, timeout).run()
        finally:
            lock.release()
    if expected is not None:
        check_hash(path, expected, remove=True)
    return path


class _Fetch:
    """One file on its way: ``part`` has what has come, ``tag`` which version of the file that is of."""

    def __init__(self, url: str, path: Path, hashed: bool, progress: bool, timeout: float) -> None:
        self.url, self.path, self.hashed, self.progress, self.timeout = url, path, hashed, progress, timeout
        self.part, self.tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")

    def run(self) -> None:
        """Fetch it whole; as long as something comes, what breaks off goes on."""
        while True:
            before = self._size()
            try:
                total = self._some()
            # What sockets, protocols and a full disk raise; ValueErrors are of what has come.
            except (OSError, HTTPException) as error:
                if isinstance(error, HTTPError) or self._size() <= before:
                    raise self._failed(error) from error
                continue
            size = self._size()
            if size and (total is None or size == total):
                break
            if total is None or size > total or size <= before:
                raise self._failed(f"{size} bytes came" + (f" of {total}" if total is not None else ""))
        self.part.replace(self.path)
        self.tag.unlink(missing_ok=True)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _failed(self, error: Exception | str) -> OSError:
        reason = getattr(error, "reason", None) or error
        if isinstance(error, HTTPError):
            reason = f"the server says {error.code} {error.reason}"
        elif isinstance(reason, Exception):
            reason = str(reason) or type(reason).__name__
        kept = ""
        if "Range" in self._headers():
            kept = f"; {self._size()} bytes are kept, and the next call goes on there"
        else:
            self.part.unlink(missing_ok=True)
            self.tag.unlink(missing_ok=True)
        return OSError(
            f"{self.url} could not be fetched: {reason}{kept}. Or fetch it by hand and put it at {self.path}"
        )

    def _headers(self) -> dict[str, str]:
        """Whole, or from where it broke off, if the file is still the same one then: by its tag or by its hash."""
        headers = {"User-Agent": "dla_fast", "Accept-Encoding": "identity"}
        tag = self.tag.read_text(encoding="utf-8") if self.tag.exists() else ""
        if self._size() and (tag or self.hashed):
            headers["Range"] = f"bytes={self._size()}-"
            if tag:
                headers["If-Range"] = tag
        return headers

    def _answer(self) -> HTTPResponse:
        # A URL as people write it may have spaces and letters that HTTP has not.
        request = Request(quote(self.url, safe=_WRITTEN), headers=self._headers())
        response: HTTPResponse = urlopen(request, timeout=self.timeout)
        return response

    def _some(self) -> int | None:
        """Fetch until the answer ends; gives the bytes of the whole file, where the server tells."""
        try:
            response = self._answer()
        except HTTPError as error:
            if error.code != 416:
                raise
            # There is nothing past what has come: it is all, or of another file.
            error.close()
            if error.headers.get("Content-Range", "").endswith(f"/{self._size()}"):
                return self._size()
            self.part.unlink()
            response = self._answer()
        with response:
            going_on = response.status == 206 and _starts_at(response, self._size())
            length = response.headers.get("Content-Length")
            start = self._size() if going_on else 0
            total = None if length is None else start + int(length)
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if not going_on:
                # A weak tag says that the file means the same, not that its bytes are.
                self.tag.write_text("" if tag.startswith("W/") else tag, encoding="utf-8")
            with self.part.open("ab" if going_on else "wb") as file, self._bar(total, start) as bar:
                self._copy(response, file, bar)
        return total

    def _copy(self, response: HTTPResponse, file: BinaryIO, bar: object) -> None:
        first = file.tell() == 0
        while block := response.read1(_CHUNK):
            if first and is_page(block):
                file.close()
                self.part.unlink()
                self.tag.unlink(missing_ok=True)
                raise ValueError(
                    f"{self.url}: expected a checkpoint, got a web page; is it the link of the file itself?"
                )
            first = False
            file.write(block)
            bar.update(len(block))  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _bar(self, total: int | None, start: int) -> Iterator[object]:
        from torch.hub import tqdm

        with tqdm(
            total=total,
            initial=start,
            disable=not self.progress,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc=self.path.name,
        ) as bar:
            yield bar


def _starts_at(response: HTTPResponse, size: int) -> bool:
    """Whether an answer of a part begins where the bytes that there are end.

    Raises:
        OSError: it begins elsewhere.
    """
    text = response.headers.get("Content-Range", "")
    if not text.startswith(f"bytes {size}-"):
        raise OSError(f"asked for what follows {size} bytes, the server sent {text!r}")
    return True
