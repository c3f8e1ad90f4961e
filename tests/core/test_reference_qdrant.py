"""Qdrant's embedded mode gives the neighbours of the search on the device."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_reference_set import made, rows

from sd_dejavu.demo.reference import bundled_reference
from sd_dejavu.reference import qdrant
from sd_dejavu.reference.features import Metric
from sd_dejavu.reference.qdrant import QdrantSearch
from sd_dejavu.reference.reference_set import ReferenceSet

Both = tuple[ReferenceSet, QdrantSearch]

METRICS: tuple[Metric, ...] = ("cosine", "normalised L2")


class Server(BaseHTTPRequestHandler):
    """As much of Qdrant's REST interface as is used, answered with numpy: the client talks to it as to a server."""

    collections: ClassVar[dict[str, dict[str, Any]]] = {}
    requests: ClassVar[list[tuple[str, str, Any]]] = []
    key: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.reply(None, "GET")

    def do_PUT(self) -> None:
        self.reply(self.body(), "PUT")

    def do_POST(self) -> None:
        self.reply(self.body(), "POST")

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, body: Any, verb: str) -> None:
        path = self.path.partition("?")[0]
        self.requests.append((verb, path, body))
        self.key.append(self.headers.get("api-key"))
        answer = json.dumps({"result": self.result(path, verb, body), "status": "ok", "time": 0.0}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def result(self, path: str, verb: str, body: Any) -> Any:
        _, _, name, *rest = path.split("/")
        here = self.collections.get(name)
        if rest == ["exists"]:
            return {"exists": here is not None}
        if not rest and verb == "PUT":
            self.collections[name] = {"distance": body["vectors"]["distance"], "ids": [], "vectors": []}
            return True
        assert here is not None
        if rest == ["points"] and verb == "PUT":
            here["ids"] += body["batch"]["ids"]
            here["vectors"] += body["batch"]["vectors"]
            return {"operation_id": 0, "status": "completed"}
        if rest == ["points", "count"]:
            return {"count": len(here["ids"])}
        if rest == ["points"]:
            return [{"id": n, "vector": here["vectors"][here["ids"].index(n)]} for n in body["ids"]]
        assert rest == ["points", "query", "batch"]
        return [{"points": self.nearest(here, search)} for search in body["searches"]]

    def nearest(self, here: dict[str, Any], search: Any) -> list[dict[str, Any]]:
        vectors, query = np.array(here["vectors"]), np.array(search["query"]["nearest"])
        euclid = here["distance"] == "Euclid"
        scores = np.sqrt(((vectors - query) ** 2).sum(1)) if euclid else vectors @ query
        best = np.argsort(scores if euclid else -scores)[: search["limit"]]
        return [{"id": here["ids"][n], "version": 0, "score": float(scores[n])} for n in best]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(scope="module", params=METRICS)
def embedded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    reference = made(rows(150, 24), request.param)
    with QdrantSearch(reference, str(tmp_path_factory.mktemp("q"))) as search:
        yield reference, search


@pytest.mark.parametrize("k", [1, 5, 60])
def test_the_same_neighbours_as_on_the_device(embedded: Both, k: int) -> None:
    reference, search = embedded
    queries = rows(7, 24, seed=3)
    expected, found = reference.search(queries, k), search.search(queries, k)
    assert found.index.tolist() == expected.index.tolist()
    assert found.similarity.numpy() == pytest.approx(expected.similarity.numpy(), abs=1e-5)
    assert (found.index.dtype, found.similarity.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("metric", METRICS)
def test_a_server_is_asked_for_exact_neighbours(server: str, metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interface is played by numpy here: this says what is sent and what is made of the answers."""
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    monkeypatch.setattr(qdrant, "UPLOAD_ROWS", 64)
    reference, queries = made(rows(200, 8, seed=4), metric), rows(3, 8, seed=5)
    with pytest.warns(UserWarning, match="insecure"):  # a key over http
        opened = QdrantSearch(reference, server)
    with opened as search:
        found, expected = search.search(queries, 6), reference.search(queries, 6)
        index = found.index[:, 2]
        assert search.similarity(queries, index).tolist() == pytest.approx(found.similarity[:, 2].tolist(), abs=1e-5)
    assert found.index.tolist() == expected.index.tolist()
    assert found.similarity.numpy() == pytest.approx(expected.similarity.numpy(), abs=1e-5)
    asked = [body for _, path, body in Server.requests if path.endswith(f"{search.collection}/points/query/batch")]
    assert all(one["params"]["exact"] is True for body in asked for one in body["searches"])
    assert asked
    assert set(Server.key) == {"secret"}


def test_the_same_on_the_bundled_models_images(tmp_path: Path) -> None:
    reference = bundled_reference()
    queries = torch.nn.functional.normalize(reference.embeddings[::7] + 0.02 * rows(17, 1024), dim=1)
    expected = reference.search(queries, 3)
    with QdrantSearch(reference, str(tmp_path / "q")) as search:
        assert search.search(queries, 3).index.tolist() == expected.index.tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_pairwise_similarity_and_its_gradient_are_the_sets_own(tmp_path: Path, metric: Metric) -> None:
    reference, index = made(rows(80, 6), metric), torch.tensor([70, 3, 3])
    gradients = []
    with QdrantSearch(reference, str(tmp_path / "q")) as search:
        for way in (reference, search):
            query = rows(3, 6, seed=2).requires_grad_(True)
            value = way.similarity(query, index)
            gradients.append((value.tolist(), *torch.autograd.grad(value.sum(), query)))
    assert gradients[1][0] == pytest.approx(gradients[0][0], abs=1e-5)
    assert gradients[1][1].numpy() == pytest.approx(gradients[0][1].numpy(), abs=1e-5)


def test_rows_are_uploaded_once_and_a_stopped_upload_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant, "UPLOAD_ROWS", 10)
    reference, sent = made(rows(45, 4)), []

    def stop_at_20(done: int, total: int) -> None:
        sent.append(done)
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QdrantSearch(reference, str(tmp_path / "q"), stop_at_20)
    QdrantSearch(reference, str(tmp_path / "q"), lambda done, total: sent.append(done)).close()
    QdrantSearch(reference, str(tmp_path / "q"), lambda done, total: sent.append(done)).close()
    assert sent == [10, 20, 30, 40, 45]
    with QdrantSearch(reference, str(tmp_path / "q")) as search:
        assert search.search(reference.embeddings, 1).index.flatten().tolist() == list(range(45))


def test_another_set_in_the_same_place_is_another_collection(tmp_path: Path) -> None:
    first, second = made(rows(30, 4)), made(rows(20, 4, seed=9))
    for reference in (first, second):
        with QdrantSearch(reference, str(tmp_path / "q")) as search:
            assert search.search(reference.embeddings[:3], 1).index.flatten().tolist() == [0, 1, 2]


def test_names_and_captions_go_along(tmp_path: Path) -> None:
    with QdrantSearch(made(rows(5, 4)), str(tmp_path / "q")) as search:
        (point,) = search._client.retrieve(search.collection, [3])
    assert point.payload == {"name": "folder/3.png", "caption": "caption 3", "duplicates": 4}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the client leaves its lock file open
def test_faults_are_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = made(rows(5, 4))
    with QdrantSearch(reference, str(tmp_path / "q")) as search:
        with pytest.raises(ValueError, match="queries must be rows"):
            search.search(torch.zeros(1, 3), 1)
        with pytest.raises(ValueError, match="at least 1, not 0"):
            search.search(torch.zeros(1, 4), 0)
        with pytest.raises(ValueError, match=r"Qdrant at .* cannot be used: .*already accessed"):
            QdrantSearch(reference, str(tmp_path / "q"))
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(ValueError, match="needs its client: pip install qdrant-client"):
        QdrantSearch(reference, str(tmp_path / "q"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Qdrant at http://127\.0\.0\.1:9 cannot be used: "):
        QdrantSearch(made(rows(5, 4)), "http://127.0.0.1:9")
