"""Our routes in a real Automatic1111 and a real Forge that ask for passwords: nobody gets in, nothing gets lost."""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import miniature
import pytest
import webui_server
from webui_server import WebUIServer
from webui_watched import errors_of_ours

PACK = Path(__file__).parents[2]
ROUTES = {
    "/dejavu/reports": None,
    "/dejavu/calibrate": {},
    "/dejavu/audit": {"references": "training"},
    "/dejavu/repair": {"references": "training"},
}
SMALL = {"count": 20, "width": 64, "height": 64, "steps": 4}
BASIC = {"Authorization": "Basic " + base64.b64encode(b"anna:secret").decode()}


@pytest.fixture(scope="module")
def locked(
    webui_kind: webui_server.Kind, webui_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WebUIServer]:
    """A host with a page and an API that both ask for a password."""
    install = webui_server.find_install(webui_kind)
    assert install is not None
    home = webui_server.make_home(tmp_path_factory.mktemp(webui_kind.folder), PACK, [], webui_models)
    options = ["--ckpt", str(webui_models / "Stable-diffusion" / miniature.SD15_EVERYWHERE)]
    options += ["--api-auth", "anna:secret", "--gradio-auth", "bert:hidden"]
    with WebUIServer(webui_kind, install, home, options) as server:
        yield server


def ask(server: WebUIServer, path: str, body: Any = None, /, **headers: str) -> tuple[int, str]:
    """(status, text) of the answer; a body that is no text is sent as JSON."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, str):
        body, given = json.dumps(body), {"Content-Type": "application/json"} | given
    request = Request(server.url + path, None if body is None else body.encode(), given)
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()


def cookie_of(server: WebUIServer, user: str, password: str) -> str:
    """What the host's page gives a browser that signs in."""
    request = Request(server.url + "/login", urlencode({"username": user, "password": password}).encode())
    with build_opener(ProxyHandler({})).open(request, timeout=60) as answer:
        return "; ".join(value.partition(";")[0] for value in answer.headers.get_all("Set-Cookie"))


def kept(server: WebUIServer) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (server.home / "dejavu").rglob("*.json")}


def is_at(server: WebUIServer) -> str:
    job: str = json.loads(ask(server, "/sdapi/v1/progress?skip_current_image=true", **BASIC)[1])["state"]["job"]
    return job


@pytest.mark.parametrize("path", ROUTES)
def test_without_a_password_nothing_is_told_and_nothing_begins(locked: WebUIServer, path: str) -> None:
    assert ask(locked, "/sdapi/v1/options")[0] == 401  # as the host's own routes
    wrong = {"Authorization": "Basic " + base64.b64encode(b"anna:hidden").decode()}
    for headers in ({}, wrong, {"Cookie": "access-token=x; access-token-unsecure=x"}):
        status, text = ask(locked, path, ROUTES[path], **headers)
        assert status == 401 and "asks for a password" in text, headers
        assert str(locked.home) not in text
    assert is_at(locked) == "" and kept(locked) == {}


@pytest.mark.parametrize("path", ROUTES)
def test_the_apis_password_and_a_users_cookie_let_in(locked: WebUIServer, path: str) -> None:
    answers = {
        "/dejavu/reports": (200, "[]"),
        "/dejavu/calibrate": (400, "count must be"),
        "/dejavu/audit": (400, "no"),
        "/dejavu/repair": (400, "no LoRA is chosen"),
    }
    body = {"count": 3} if path == "/dejavu/calibrate" else ROUTES[path]
    for headers in (BASIC, {"Cookie": cookie_of(locked, "bert", "hidden")}):
        status, text = ask(locked, path, body, **headers)
        assert status == answers[path][0] and answers[path][1] in text, text


@pytest.mark.parametrize("path", ["/dejavu/calibrate", "/dejavu/audit", "/dejavu/repair"])
def test_another_sites_page_may_not_ask(locked: WebUIServer, path: str) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}, {"Origin": "null"}):
        status, text = ask(locked, path, ROUTES[path], **BASIC, **headers)
        assert status == 403 and "another site" in text
    # What a page can send without the host's leave: text, and nothing that tells what it is.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, text = ask(locked, path, json.dumps(ROUTES[path]), Content_Type=kind, **BASIC)
        assert status == 415 and "application/json" in text
    connection = http.client.HTTPConnection(locked.url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, b'{"count": 20}', BASIC)  # no content type at all
    assert connection.getresponse().status == 415
    connection.close()
    assert is_at(locked) == "" and kept(locked) == {}
    status, text = ask(locked, path, {"colour": 1}, **BASIC, Origin=locked.url)
    assert status == 400 and "no argument colour" in text  # its own page may


@pytest.mark.parametrize(
    ("path", "values"),
    [
        *(("/dejavu/calibrate", {"width": value}) for value in (0, -8, 7, 65, 10**6, None, "64")),
        *(("/dejavu/calibrate", {"steps": value}) for value in (0, -1, 10**6, 2.5)),
        *(("/dejavu/calibrate", {"count": value}) for value in (None, 0, 10**12, "many", [20])),
        *(("/dejavu/calibrate", {name: "nonsense"}) for name in ("sampler_name", "scheduler", "replace")),
        *(("/dejavu/calibrate", {"whole_runs": value}) for value in (-1, 21, 2.5, "all")),
        *(("/dejavu/calibrate", {"networks": value}) for value in ("a fox", None)),
        *(("/dejavu/calibrate", {"guidance_scale": value}) for value in (-1, "7", None)),
        ("/dejavu/calibrate", []),
        *(("/dejavu/audit", {name: 10**12}) for name in ("width", "steps", "images", "nulls", "sample", "worst")),
        *(("/dejavu/repair", {name: 10**12}) for name in ("width", "steps", "images", "captions", "ordinary")),
        *(("/dejavu/repair", {"save_as": value}) for value in ("", "../x", 5, None)),
        ("/dejavu/audit", {"seed": -1}),
        ("/dejavu/audit", {"references": None}),
        ("/dejavu/audit", {"references": "gone"}),
        ("/dejavu/audit", {"references": "../calibration"}),
    ],
)
def test_what_makes_no_sense_is_a_sentence_and_no_fault(locked: WebUIServer, path: str, values: Any) -> None:
    status, text = ask(locked, path, {**SMALL, **values} if values and path == "/dejavu/calibrate" else values, **BASIC)
    assert status == 400 and len(json.loads(text)["detail"]) > 10, text
    assert str(locked.home) not in text and str(Path.home()) not in text


def test_an_empty_body_begins_nothing(locked: WebUIServer) -> None:
    status, text = ask(locked, "/dejavu/calibrate", "", Content_Type="application/json", **BASIC)
    assert status == 400 and "takes the defaults" in text and kept(locked) == {}


def test_who_hangs_up_ends_the_measuring(locked: WebUIServer) -> None:
    connection = http.client.HTTPConnection(locked.url.removeprefix("http://"), timeout=60)
    body = json.dumps({**SMALL, "count": 100_000}).encode()
    connection.request("POST", "/dejavu/calibrate", body, {"Content-Type": "application/json", **BASIC})
    until(lambda: is_at(locked) == "dejavu-calibrate")
    connection.close()
    until(lambda: is_at(locked) == "")
    assert kept(locked) == {} and errors_of_ours(locked) == []


def test_a_calibration_that_holds_more_is_replaced_only_when_asked(locked: WebUIServer) -> None:
    status, text = ask(locked, "/dejavu/calibrate", {**SMALL, "count": 40}, **BASIC)
    assert status == 200 and json.loads(text)["prompts"] == 40
    before = kept(locked)
    status, text = ask(locked, "/dejavu/calibrate", SMALL, **BASIC)
    assert status == 409 and "it holds 40 ordinary prompts" in text and kept(locked) == before
    status, _ = ask(locked, "/dejavu/calibrate", {**SMALL, "count": 40}, **BASIC)
    assert status == 200 and kept(locked).keys() == before.keys()
    status, text = ask(locked, "/dejavu/calibrate", {**SMALL, "replace": True}, **BASIC)
    assert status == 200 and json.loads(text)["prompts"] == 20
    assert kept(locked).keys() == before.keys() and kept(locked) != before


def test_whole_runs_are_added_to_what_is_kept(locked: WebUIServer) -> None:
    for size in (40, 20):
        asked = {**SMALL, "count": size, "width": 128, "whole_runs": 40 - size}
        status, text = ask(locked, "/dejavu/calibrate", asked, **BASIC)
        assert status == 200, text
    assert (json.loads(text)["prompts"], json.loads(text)["whole_runs"]) == (40, 20)
    (file,) = [json.loads(held) for name, held in kept(locked).items() if name == json.loads(text)["file"]]
    assert len(file["band"]) == SMALL["steps"] and file["setting"]["sampler"] == "Euler"
    assert ["all steps" in null["scores"] for null in file["nulls"]] == [True] * 20 + [False] * 20
    status, text = ask(locked, "/dejavu/calibrate", {**SMALL, "count": 40, "width": 128}, **BASIC)
    assert status == 409 and "20 of them as whole runs" in text


def until(done: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)
