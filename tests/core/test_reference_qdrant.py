"""Qdrant's embedded mode gives the neighbours of the search on the device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_reference_set import made, rows

from sd_dejavu.demo.reference import bundled_reference
from sd_dejavu.reference import qdrant
from sd_dejavu.reference.features import Metric
from sd_dejavu.reference.qdrant import QdrantSearch


@pytest.mark.parametrize("metric", ["cosine", "normalised L2"])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_the_same_neighbours_as_on_the_device(tmp_path: Path, metric: Metric, k: int) -> None:
    reference, queries = made(rows(600, 24), metric), rows(7, 24, seed=3)
    expected = reference.search(queries, k)
    with QdrantSearch(reference, str(tmp_path / "q")) as search:
        found = search.search(queries, k)
    assert found.index.tolist() == expected.index.tolist()
    assert found.similarity.numpy() == pytest.approx(expected.similarity.numpy(), abs=1e-5)
    assert (found.index.dtype, found.similarity.dtype) == (torch.int64, torch.float32)


def test_the_same_on_the_bundled_models_pictures(tmp_path: Path) -> None:
    reference = bundled_reference()
    queries = torch.nn.functional.normalize(reference.embeddings[::7] + 0.02 * rows(17, 1024), dim=1)
    expected = reference.search(queries, 3)
    with QdrantSearch(reference, str(tmp_path / "q")) as search:
        assert search.search(queries, 3).index.tolist() == expected.index.tolist()


@pytest.mark.parametrize("metric", ["cosine", "normalised L2"])
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


def test_faults_are_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = made(rows(5, 4))
    with QdrantSearch(reference, str(tmp_path / "q")) as search:
        with pytest.raises(ValueError, match="queries must be rows"):
            search.search(torch.zeros(1, 3), 1)
        with pytest.raises(ValueError, match="at least 1, not 0"):
            search.search(torch.zeros(1, 4), 0)
        with pytest.raises(ValueError, match="Qdrant at .* cannot be used: .*already accessed"):
            QdrantSearch(reference, str(tmp_path / "q"))
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(ValueError, match="needs its client: pip install qdrant-client"):
        QdrantSearch(reference, str(tmp_path / "q"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Qdrant at http://127.0.0.1:9 cannot be used: "):
        QdrantSearch(made(rows(5, 4)), "http://127.0.0.1:9")
