"""The teacher's computer: an HTTP server that learners' computers report to, and the teacher's page.

Learners' computers use /join, /report and /leave (see `protocol`). The page, its stream of events and /remove are for a
browser that has the key in a cookie, which it gets by opening the page's address once with the key.

Any web page that someone in the room has open may send requests here through its reader's browser. So the name in
`Host` must be this computer's address (a page that has pointed a name of its own at it, by DNS rebinding, is refused),
learners' requests must not come from a browser at all, and the teacher's only from the teacher's page.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from lora_from_scratch.room import protocol
from lora_from_scratch.room.protocol import Invitation
from lora_from_scratch.room.rate import Rate
from lora_from_scratch.room.table import FullError, Learner, Table
from lora_from_scratch.support.files import write_json

PAGE = Path(__file__).with_name("page.html")
TIME_FOR_A_BODY = 10.0  # seconds
GUESSES = (10, 10.0)  # wrong codes from one address: 10 at once, then one every 10 seconds
REPORTS = (30, 0.5)  # of one learner: 30 at once, then two a second
REFRESH = 0.5  # seconds between two events at least
AT_LEAST_EVERY = 15.0  # seconds between two events at most, as the page shows minutes
KEEP_EVERY = 5.0  # seconds
NOT_A_BROWSER = "learners join from their notebooks, not from a browser"


class Room:
    """The ASGI application, in `app`.

    Args:
        table: the learners, and the exercises to show.
        invitation: what learners type to join.
        keep: the file in which the table is kept; None keeps nothing.
    """

    def __init__(self, table: Table, invitation: Invitation, keep: Path | None = None) -> None:
        self.table, self.invitation, self.keep = table, invitation, keep
        self.key = secrets.token_urlsafe(24)
        self.cookie = f"room-{invitation.port}"  # a browser does not separate cookies by port
        self.is_closing: Callable[[], bool] = lambda: False  # set by whoever runs the server
        self.page = PAGE.read_bytes()
        self._guesses, self._reports = Rate(*GUESSES), Rate(*REPORTS)
        hosts = [invitation.address, "127.0.0.1", "localhost"]
        self.app = Starlette(
            routes=[
                Route("/", self.show),
                Route("/events", self.events),
                Route("/remove", self.remove, methods=["POST"]),
                Route("/join", self.join, methods=["POST"]),
                Route("/report", self.report, methods=["POST"]),
                Route("/leave", self.leave, methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
            exception_handlers={HTTPException: _refuse},
            lifespan=self._lifespan,
        )

    # --- Learners ---

    async def join(self, http: Request) -> Response:
        body = await _learners_body(http)
        guesser, now = http.client.host if http.client else "", time.time()
        if wait := self._guesses.wait(guesser, now):
            raise _too_many(f"too many wrong codes; wait {wait:.0f} seconds and try again", wait)
        code = body.get("code")
        if not isinstance(code, str) or not _same(code.strip().upper(), self.invitation.code):
            self._guesses.take(guesser, now)
            raise HTTPException(403, "this is not the room's code; compare it with the one on the projector")
        try:
            token, name = protocol.read_token(body.get("token")), protocol.read_name(body.get("name"))
            learner = self.table.join(token, name, now)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except FullError as error:
            raise HTTPException(403, str(error)) from None
        return JSONResponse({"name": learner.name})

    async def report(self, http: Request) -> Response:
        body = await _learners_body(http)
        learner, now = self._learner(body), time.time()
        if wait := self._reports.wait(learner.key, now):
            raise _too_many("too many reports; wait a little", wait)
        self._reports.take(learner.key, now)
        try:
            sent, statuses = protocol.read_report(body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        self.table.update(learner, statuses, sent, now)
        return JSONResponse({})

    async def leave(self, http: Request) -> Response:
        self.table.remove(self._learner(await _learners_body(http)))
        return JSONResponse({})

    def _learner(self, body: dict[str, Any]) -> Learner:
        token = body.get("token")
        learner = self.table.find(token) if isinstance(token, str) and token.isascii() else None
        if learner is None:
            raise HTTPException(401, "the room was closed, or you were removed from it")
        return learner

    # --- The teacher ---

    async def show(self, http: Request) -> Response:
        """The page. With the key in the address it becomes a cookie, so that no projector shows the key."""
        if _same(http.query_params.get("key", ""), self.key):
            opened = RedirectResponse("/", 303)
            opened.set_cookie(self.cookie, self.key, httponly=True, samesite="strict")
            return opened
        if not self._is_teacher(http):
            text = f'Learners join in a notebook: join("{self.invitation}", "your name").\n'
            text += "The teacher's page is at the address that `lora-from-scratch room` has printed.\n"
            return PlainTextResponse(text, 403)
        return Response(self.page, media_type="text/html", headers=_page_headers(self.page))

    async def events(self, http: Request) -> Response:
        """The contents of the page, whenever they change, as server-sent events."""
        self._require_teacher(http)
        return StreamingResponse(self._views(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _views(self) -> AsyncIterator[str]:
        while not self.is_closing():
            version, sent = self.table.version, time.monotonic()
            view = self.table.view(time.time()) | {"invitation": str(self.invitation)}
            yield f"data: {json.dumps(view)}\n\n"
            while not self.is_closing() and time.monotonic() - sent < AT_LEAST_EVERY:
                await asyncio.sleep(REFRESH)
                if self.table.version != version:
                    break

    async def remove(self, http: Request) -> Response:
        self._require_teacher(http)
        number = (await _body(http)).get("number")
        for learner in list(self.table.learners.values()):
            if learner.number == number:
                self.table.remove(learner)
        return JSONResponse({})

    def _require_teacher(self, http: Request) -> None:
        origin = http.headers.get("origin")
        own = origin in (None, f"http://{http.headers.get('host')}")
        if not (own and http.headers.get("sec-fetch-site", "same-origin") == "same-origin" and self._is_teacher(http)):
            raise HTTPException(403, "this is for the teacher's page only")

    def _is_teacher(self, http: Request) -> bool:
        return _same(http.cookies.get(self.cookie, ""), self.key)

    # --- Keeping ---

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        keeping = asyncio.create_task(self._keep_on()) if self.keep else None
        try:
            yield
        finally:
            if keeping is not None:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
                await self._keep()

    async def _keep_on(self) -> None:
        kept = -1
        while True:
            if self.table.version != kept:
                kept = self.table.version
                await self._keep()
            await asyncio.sleep(KEEP_EVERY)

    async def _keep(self) -> None:
        assert self.keep is not None
        document = {"code": self.invitation.code, **self.table.as_json()}
        try:
            await run_in_threadpool(write_json, self.keep, document)
        except OSError as error:
            print(f"warning: the room could not be kept in {self.keep}: {error.strerror or error}", file=sys.stderr)


async def _learners_body(http: Request) -> dict[str, Any]:
    if "origin" in http.headers or "sec-fetch-site" in http.headers:
        raise HTTPException(403, NOT_A_BROWSER)
    return await _body(http)


async def _body(http: Request) -> dict[str, Any]:
    """The body of a request, a JSON object.

    Raises:
        HTTPException: it is none, is too long, or takes too long to arrive.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the body must be JSON (Content-Type: application/json)")
    body = b""
    try:
        async with asyncio.timeout(TIME_FOR_A_BODY):
            async for chunk in http.stream():
                body += chunk
                if len(body) > protocol.MOST_BYTES:
                    raise HTTPException(413, f"the body must have at most {protocol.MOST_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, "the body did not arrive in time") from None
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return document


async def _refuse(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _too_many(message: str, wait: float) -> HTTPException:
    return HTTPException(429, message, {"Retry-After": str(int(wait) + 1)})


def _same(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), secret.encode())


def _page_headers(page: bytes) -> dict[str, str]:
    """The page may run its own script and style, and load nothing but its events."""
    allowed = []
    for tag in (b"script", b"style"):
        found = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1]).digest()).decode()
        allowed.append(f"{tag.decode()}-src 'sha256-{digest}'")
    policy = "; ".join(["default-src 'none'", *allowed, "connect-src 'self'", "img-src data:", "base-uri 'none'"])
    return {
        "Content-Security-Policy": f"{policy}; form-action 'none'; frame-ancestors 'none'",
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
