"""The door to the routes in Automatic1111 and Forge: who may come in, what they may bring, and what when they leave."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sd_dejavu.hosts.webui.door import (
    LONGEST_BODY,
    Refused,
    Turn,
    body_of,
    check_site,
    check_user,
    sentence,
    while_there,
)

ACCOUNTS = "anna:secret,björn:p w"


class Request:
    """What the door reads of Starlette's; ``body`` comes in two parts, and its client hangs up when told to."""

    def __init__(self, body: bytes = b"", cookies: dict[str, str] | None = None, **headers: str) -> None:
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.cookies = cookies or {}
        self.hung_up = asyncio.Event()
        self.read = 0
        self._body = body

    async def stream(self) -> Any:
        middle = len(self._body) // 2
        for part in (self._body[:middle], self._body[middle:]):
            self.read += len(part)
            yield part

    async def receive(self) -> dict[str, str]:
        await self.hung_up.wait()
        return {"type": "http.disconnect"}


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def signing_in(cookie: str) -> Any:
    """An app as Gradio's: its own function tells who a request comes from, whatever the cookie is called."""

    def get_current_user(request: Request) -> str | None:
        return {"token": "anna"}.get(request.cookies.get(cookie, ""))

    other = SimpleNamespace(name="main", endpoint=lambda request: "everybody")
    return SimpleNamespace(
        auth={"anna": "secret"}, routes=[other, SimpleNamespace(name="get_current_user", endpoint=get_current_user)]
    )


OPEN = SimpleNamespace(routes=[])  # FastAPI's own kind of app, or Gradio's without accounts


# ------------------------------------------------------------------------------------------ who


def test_without_passwords_everybody_comes_in() -> None:
    for api_auth in (None, ""):
        check_user(Request(), OPEN, api_auth)
        check_user(Request(), SimpleNamespace(auth=None, auth_dependency=None, routes=[]), api_auth)


@pytest.mark.parametrize("given", ["anna:secret", "björn:p w"])
def test_a_password_of_the_api_lets_in(given: str) -> None:
    check_user(Request(authorization=basic(given)), OPEN, ACCOUNTS)


@pytest.mark.parametrize(
    "header",
    [
        "",
        basic("anna:Secret"),
        basic("anna:p w"),  # another account's
        basic("anna:"),
        basic("anna"),
        basic(":"),
        basic("carl:secret"),
        basic("anna:secret,björn:p w"),
        basic("anna:secret").replace("Basic", "Bearer"),
        "Basic",
        "Basic ???",
        "Basic anna:secret",
    ],
)
def test_any_other_is_refused(header: str) -> None:
    with pytest.raises(Refused, match="asks for a password") as refused:
        check_user(Request(authorization=header), OPEN, ACCOUNTS)
    assert refused.value.status == 401 and refused.value.headers == {"WWW-Authenticate": "Basic"}


@pytest.mark.parametrize("broken", ["anna", "anna:a:b", ":", ","])
def test_an_account_that_the_host_would_not_take_lets_nobody_in(broken: str) -> None:
    for given in ("anna:", "anna:a:b", "anna:a", ""):
        with pytest.raises(Refused):
            check_user(Request(authorization=basic(given)), OPEN, broken)


@pytest.mark.parametrize("cookie", ["access-token", "access-token-unsecure", "access-token-unsecure-Xy9"])
def test_who_has_signed_in_to_the_page_comes_in(cookie: str) -> None:
    app = signing_in(cookie)
    check_user(Request(cookies={cookie: "token"}), app, None)
    for request in (Request(), Request(cookies={cookie: "forged"}), Request(authorization=basic("anna:secret"))):
        with pytest.raises(Refused) as refused:
            check_user(request, app, None)
        assert refused.value.status == 401 and refused.value.headers == {}  # no password window for a cookie


def test_with_both_either_is_enough() -> None:
    app = signing_in("access-token")
    check_user(Request(cookies={"access-token": "token"}), app, ACCOUNTS)
    check_user(Request(authorization=basic("anna:secret")), app, ACCOUNTS)
    with pytest.raises(Refused):
        check_user(Request(cookies={"access-token": "forged"}, authorization=basic("anna:")), app, ACCOUNTS)


@pytest.mark.parametrize("app", [{"auth": {"anna": "secret"}}, {"auth": None, "auth_dependency": len}])
def test_an_app_that_does_not_tell_its_users_lets_nobody_in(app: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        check_user(Request(cookies={"access-token": "token"}), SimpleNamespace(**app, routes=[]), None)


# ----------------------------------------------------------------------------------------- what


@pytest.mark.parametrize(
    "headers",
    [
        {},  # a program, no browser
        {"origin": "http://host:7860"},
        {"origin": "http://HOST:7860"},
        {"origin": "https://proxy.example", "sec_fetch_site": "same-origin"},  # the browser knows its own address
        {"sec_fetch_site": "none"},
    ],
)
def test_programs_and_the_hosts_own_page_may_ask(headers: dict[str, str]) -> None:
    check_site(Request(host="host:7860", **headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://host:8080"},
        {"origin": "http://host:7860.evil.example"},
        {"origin": "null"},
        {"origin": "http://evil.example", "sec_fetch_site": "none"},
        {"origin": "http://host:7860", "sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_the_page_of_another_site_may_not(headers: dict[str, str]) -> None:
    with pytest.raises(Refused, match="another site") as refused:
        check_site(Request(host="host:7860", **headers))
    assert refused.value.status == 403


def test_sites_that_the_host_lets_in_may_ask() -> None:
    other = Request(host="host:7860", origin="http://mine.example", sec_fetch_site="cross-site")
    check_site(other, "http://a.example,http://mine.example")
    check_site(other, "*")
    check_site(other, None, r"http://.*\.example")
    for origins, pattern in (("http://a.example", None), ("http://mine", None), (None, r"http://mine")):
        with pytest.raises(Refused):
            check_site(other, origins, pattern)


def test_a_body_is_an_object_in_json() -> None:
    request = Request(b'{"count": 120, "negative_prompt": "\xc3\xa9"}', content_type="application/json; charset=utf-8")
    assert asyncio.run(body_of(request)) == {"count": 120, "negative_prompt": "é"}
    assert asyncio.run(body_of(Request(b"{}", content_type="Application/JSON"))) == {}


@pytest.mark.parametrize("kind", [{}, {"content_type": "text/plain"}, {"content_type": "application/jsonp"}])
def test_a_body_of_another_kind_is_refused_unread(kind: dict[str, str]) -> None:
    request = Request(b'{"count": 120}', **kind)
    with pytest.raises(Refused, match="application/json") as refused:
        asyncio.run(body_of(request))
    assert refused.value.status == 415 and request.read == 0


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"x"', b"{", b"[" * 50_000, b'{"a": "\\ud800"}', b"\xff\xfe{}"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refused, match=r"takes the defaults$") as refused:
        asyncio.run(body_of(Request(body, content_type="application/json")))
    assert refused.value.status == 400


def test_a_body_that_is_too_long_is_not_read_to_its_end() -> None:
    request = Request(b" " * (4 * LONGEST_BODY), content_type="application/json")
    with pytest.raises(Refused, match=str(LONGEST_BODY)) as refused:
        asyncio.run(body_of(request))
    assert refused.value.status == 413 and request.read == 2 * LONGEST_BODY


def test_errors_are_told_in_a_line_without_the_machines_folders() -> None:
    error = ValueError(
        "/home/anna/webui/dejavu/references/cats.safetensors cannot be read:\n  see /home/anna/x, /home/anna"
    )
    told = sentence(error, ["/home/anna", "/home/anna/webui/", "/"])
    assert told == "dejavu/references/cats.safetensors cannot be read: see x, a folder of the host"


# ------------------------------------------------------------------------------------- how long


class State:
    """The host's, of its job: an interruption is of the job that is on."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.interrupted = threading.Event()

    def begin(self, job: str) -> None:
        self.calls.append(f"begin {job}")

    def end(self) -> None:
        self.calls.append("end")

    def interrupt(self) -> None:
        self.calls.append("interrupt")
        self.interrupted.set()


@pytest.fixture
def state() -> Iterator[State]:
    found = State()
    yield found
    found.interrupted.set()  # no thread waits for ever


def test_what_is_done_is_given_back(state: State) -> None:
    turn = Turn(state)

    def work() -> str:
        with turn.job("ours"):
            return "done"

    async def asked() -> str:
        return await while_there(Request(), turn, work)

    assert asyncio.run(asked()) == "done" and state.calls == ["begin ours", "end"]


def test_who_hangs_up_ends_the_work_that_is_on(state: State) -> None:
    turn, begun = Turn(state), threading.Event()

    def work() -> None:
        with turn.job("ours"):
            begun.set()
            assert state.interrupted.wait(30)
            raise ValueError("it was stopped")

    async def asked() -> None:
        request = Request()
        answer = asyncio.ensure_future(while_there(request, turn, work))
        await asyncio.to_thread(begun.wait, 30)
        request.hung_up.set()
        await answer

    with pytest.raises(ValueError, match="it was stopped"):
        asyncio.run(asked())
    assert state.calls == ["begin ours", "interrupt", "end"]


def test_who_hangs_up_in_the_queue_has_nothing_begun_and_ends_nobody_elses(state: State) -> None:
    turn, its_turn = Turn(state), threading.Event()

    def work() -> None:
        assert its_turn.wait(30)
        with turn.job("ours"):
            state.calls.append("worked")

    async def asked() -> None:
        request = Request()
        answer = asyncio.ensure_future(while_there(request, turn, work))
        request.hung_up.set()
        while not turn.left:
            await asyncio.sleep(0.01)
        its_turn.set()
        await answer

    with pytest.raises(ValueError, match="hung up"):
        asyncio.run(asked())
    assert state.calls == []


def test_a_turn_that_is_over_interrupts_nothing(state: State) -> None:
    turn = Turn(state)
    with pytest.raises(RuntimeError), turn.job("ours"):
        raise RuntimeError("broken")
    turn.leave()
    assert state.calls == ["begin ours", "end"]
