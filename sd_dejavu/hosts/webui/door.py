"""The door to our routes: who may come in, what they may bring, and whether they are still there.

The hosts guard their own routes in two ways, and neither reaches those of extensions: ``--api-auth`` asks for HTTP's basic
credentials, Gradio (``--gradio-auth``) knows users who have signed in by a cookie. Where one of them is set ours want
either. Requests and apps are the host's own objects, of Starlette and Gradio; nothing of these is imported.
"""

from __future__ import annotations

import asyncio
import binascii
import json
import os
import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hmac import compare_digest
from pathlib import Path
from threading import Lock
from typing import TypeVar
from urllib.parse import urlsplit

from .hosted import App, Options, Request, State

Found = TypeVar("Found")

LONGEST_BODY = 64 * 1024  # bytes; all that our routes take are a few settings


class Refused(Exception):
    """A request that is not let in; ``status`` and ``headers`` are of the HTTP answer."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, dict(headers or {})


# ------------------------------------------------------------------------------------------ who


def check_user(request: Request, app: App, api_auth: str | None) -> None:
    """Raises Refused where the host asks for a password, by ``api_auth`` or its ``app``, and this request has none."""
    signs_in = any(getattr(app, name, None) is not None for name in ("auth", "auth_dependency"))
    if not api_auth and not signs_in:
        return
    if api_auth and _has_password(request.headers.get("authorization", ""), api_auth):
        return
    if signs_in and _has_signed_in(request, app):
        return
    headers = {"WWW-Authenticate": "Basic"} if api_auth else {}
    raise Refused(401, "this host asks for a password: give that of --api-auth, or sign in to its page", headers)


def _has_password(header: str, api_auth: str) -> bool:
    """Whether a header 'Basic ...' holds one of 'user:password,user:password'; all are compared, each in constant time."""
    scheme, _, encoded = header.partition(" ")
    try:
        user, colon, password = b64decode(encoded.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return False
    if scheme.lower() != "basic" or not colon:
        return False
    accounts = [account.split(":") for account in api_auth.split(",")]
    same = [
        compare_digest(user, account[0].encode()) & compare_digest(password, account[1].encode())
        for account in accounts
        if len(account) == 2  # the host itself takes no other
    ]
    return any(same)


def _has_signed_in(request: Request, app: App) -> bool:
    """Gradio's own answer; its versions have named the cookies differently."""
    for route in app.routes:
        if getattr(route, "name", "") == "get_current_user":
            return route.endpoint(request) is not None
    return False


# ----------------------------------------------------------------------------------------- what


def check_site(request: Request, origins: str | None = None, pattern: str | None = None) -> None:
    """Raises Refused for what the page of another site asks in a user's browser.

    ``origins`` and ``pattern`` are what the host lets in all the same (``--cors-allow-origins``, ``-regex``).
    """
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    allowed = (origins or "").split(",")
    if origin is not None and (origin in allowed or "*" in allowed or (pattern and re.fullmatch(pattern, origin))):
        return
    is_own = origin is None or urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower()
    if site in ("cross-site", "same-site") or (site != "same-origin" and not is_own):
        raise Refused(403, f"the page of another site asked for this ({origin or site}): only the host's own page may")


async def body_of(request: Request) -> Options:
    """The JSON object in the body. Raises Refused for anything else: nothing of it is guessed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"the body must be sent as application/json, not as {kind or 'something of no type'}")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise Refused(413, f"the body must have at most {LONGEST_BODY} bytes")
    try:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not valid JSON: send an object such as {}, which takes the defaults") from error
    if not isinstance(values, dict):
        raise Refused(400, "the body must be a JSON object such as {}, which takes the defaults")
    return values


def sentence(error: Exception | str, folders: Iterable[str | Path]) -> str:
    """An error in one line, without where on this machine things are: files below ``folders`` are named from there."""
    text = " ".join(str(error).split())
    for folder in sorted({os.path.abspath(folder) for folder in folders}, key=len, reverse=True):
        if folder != os.path.dirname(folder):
            text = text.replace(folder + os.sep, "").replace(folder, "a folder of the host")
    return text


# ------------------------------------------------------------------------------------- how long


class Turn:
    """One piece of work in the host's queue, for a client who may hang up before its end.

    ``state`` is the host's, of the job that it is at; only a job of this turn is ever interrupted.
    """

    def __init__(self, state: State) -> None:
        self._state, self._lock = state, Lock()
        self._is_on = self.left = False

    @contextmanager
    def job(self, name: str) -> Iterator[None]:
        """The host's job, begun and ended. Raises ValueError where nobody waits for it any more."""
        with self._lock:
            if self.left:
                raise ValueError("it was not begun: the client hung up")
            self._state.begin(job=name)
            self._is_on = True
        try:
            yield
        finally:
            with self._lock:
                self._is_on = False
            self._state.end()

    def leave(self) -> None:
        """The client has hung up: what has begun is ended as by the host's Stop, what has not never begins."""
        with self._lock:
            self.left = True
            if self._is_on:
                self._state.interrupt()


async def while_there(request: Request, turn: Turn, work: Callable[[], Found]) -> Found:
    """What ``work`` gives, done in a thread of its own; when the client hangs up its turn is over."""
    working = asyncio.get_running_loop().run_in_executor(None, work)
    leaving = asyncio.ensure_future(_left(request))
    both: set[asyncio.Future[Found] | asyncio.Future[None]] = {working, leaving}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            turn.leave()
        return await working
    finally:
        leaving.cancel()
        if not working.done():
            turn.leave()


async def _left(request: Request) -> None:
    """Returns when the client has hung up; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
