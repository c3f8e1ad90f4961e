"""Search against numpy in double precision, values worked by hand, and the two files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_dejavu.reference import reference_set
from sd_dejavu.reference.features import Grey, Metric, Pixels
from sd_dejavu.reference.reference_set import ReferenceSet, Thumbnails, files_of


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def made(embeddings: Tensor, metric: Metric = "cosine", features: str = "grey 32") -> ReferenceSet:
    count = len(embeddings)
    return ReferenceSet(
        torch.nn.functional.normalize(embeddings, dim=1) if metric == "cosine" else embeddings,
        tuple(f"caption {n}" for n in range(count)),
        tuple(f"folder/{n}.png" for n in range(count)),
        torch.arange(1, count + 1),
        torch.zeros(count, dtype=torch.int64),
        Thumbnails.of([bytes([n % 256]) * (n % 5) for n in range(count)]),
        features,
        metric,
        0.9,
        {"source": "made up"},
    )


def by_numpy(reference: ReferenceSet, queries: Tensor) -> np.ndarray:
    """Similarity of every query to every row in double precision, [B, N]."""
    e, q = reference.embeddings.double().numpy(), queries.double().numpy()
    if reference.metric == "cosine":
        return q @ e.T
    distance = np.sqrt(((q[:, None] - e[None]) ** 2).sum(2))
    return -distance / (0.5 * np.sort(distance, axis=1)[:, :50].mean(1, keepdims=True))


# -------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("metric", ["cosine", "normalised L2"])
@pytest.mark.parametrize("elements", [1 << 25, 16 * 70, 1])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_search_is_exact_whatever_the_chunk(
    metric: Metric, elements: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of all rows, of 70, and of as few as the search allows."""
    monkeypatch.setattr(reference_set, "CHUNK_ELEMENTS", elements)
    reference, queries = made(rows(300, 16), metric), rows(5, 16, seed=1)
    expected = by_numpy(reference, queries)
    order = np.argsort(-expected, axis=1)[:, :k]
    found = reference.search(queries, k)
    assert found.index.tolist() == order.tolist()
    assert found.similarity.numpy() == pytest.approx(np.take_along_axis(expected, order, 1), abs=1e-5)


def test_memory_of_a_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No intermediate of more elements than a chunk has, but for the candidates of k."""
    monkeypatch.setattr(reference_set, "CHUNK_ELEMENTS", 1000)
    seen = []
    real = reference_set._dot

    def spy(queries: Tensor, part: Tensor) -> Tensor:
        seen.append((part.numel(), len(queries) * len(part)))
        return real(queries, part)

    monkeypatch.setattr(reference_set, "_dot", spy)
    made(rows(500, 8)).search(rows(20, 8), 3)
    assert len(seen) == 10
    assert max(max(sizes) for sizes in seen) <= 1000


def test_normalised_l2_by_hand() -> None:
    """60 rows at distance 1..60 on a line: the nearest 50 have the mean 25.5, half of it is 12.75."""
    reference = made(torch.arange(1.0, 61.0)[:, None], "normalised L2")
    found = reference.search(torch.zeros(1, 1), 3)
    assert found.similarity[0].tolist() == pytest.approx([-1 / 12.75, -2 / 12.75, -3 / 12.75])
    assert found.index[0].tolist() == [0, 1, 2]
    assert reference.denominator(torch.zeros(1, 1)).tolist() == pytest.approx([12.75])
    assert reference.similarity(torch.zeros(1, 1), torch.tensor([59])).tolist() == pytest.approx([-60 / 12.75])


def test_small_sets_take_the_mean_over_all_they_have() -> None:
    reference = made(torch.tensor([[1.0], [3.0]]), "normalised L2")
    found = reference.search(torch.zeros(1, 1), 9)
    assert found.similarity[0].tolist() == pytest.approx([-1, -3])  # half the mean of 1 and 3 is 1


def test_the_very_same_row_has_the_distance_0_even_among_large_numbers() -> None:
    """By products of such rows in fp32 the distance would come out as tens."""
    reference = made(1e4 + rows(80, 32), "normalised L2")
    assert reference.search(reference.embeddings[7:9], 1).similarity.flatten().tolist() == [0, 0]
    assert reference.search(reference.embeddings[7:9], 1).index.flatten().tolist() == [7, 8]


def test_a_set_of_one_row_repeated_is_no_division_by_zero() -> None:
    reference = made(torch.ones(60, 4), "normalised L2")
    assert reference.search(torch.ones(1, 4), 2).similarity.tolist() == [[0, 0]]


def test_of_equals_the_first_row_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_set, "CHUNK_ELEMENTS", 16)
    reference = made(torch.eye(4)[[0, 1, 0, 2, 0, 3, 0]])
    assert reference.search(torch.eye(4)[:1], 4).index.tolist() == [[0, 2, 4, 6]]


@pytest.mark.parametrize("metric", ["cosine", "normalised L2"])
def test_pairwise_similarity_is_that_of_the_search_and_its_gradient_that_of_the_formula(metric: Metric) -> None:
    """d(q.e)/dq = e; d(-|q - e| / c)/dq = -(q - e) / (|q - e| c) with the denominator c held constant."""
    reference = made(rows(90, 6), metric)
    query = rows(3, 6, seed=2).requires_grad_(True)
    found = reference.search(query, 1)
    assert not found.similarity.requires_grad
    index = torch.tensor([4, 50, 89])
    value = reference.similarity(query, index)
    assert value.detach().numpy() == pytest.approx(by_numpy(reference, query.detach())[range(3), index], abs=1e-5)
    nearest = reference.similarity(query.detach(), found.index[:, 0])
    assert nearest.tolist() == pytest.approx(found.similarity[:, 0].tolist(), abs=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), query)
    q, e = query.detach().double().numpy(), reference.embeddings[index].double().numpy()
    if metric == "cosine":
        expected = e
    else:
        distance = np.linalg.norm(q - e, axis=1, keepdims=True)
        every = np.sqrt(((q[:, None] - reference.embeddings.double().numpy()[None]) ** 2).sum(2))
        expected = -(q - e) / distance / (0.5 * np.sort(every, axis=1)[:, :50].mean(1, keepdims=True))
    assert gradient.numpy() == pytest.approx(expected, abs=1e-5)


def test_the_gradient_at_the_very_row_is_no_nan() -> None:
    reference = made(rows(60, 6), "normalised L2")
    query = reference.embeddings[3:4].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reference.similarity(query, torch.tensor([3])).sum(), query)
    assert gradient.tolist() == [[0] * 6]


@pytest.mark.parametrize(
    ("queries", "k", "sentence"),
    [
        (torch.zeros(1, 5), 1, r"queries must be rows \[B, 4\] of the features 'grey 32', not of the shape \(1, 5\)"),
        (torch.zeros(4), 1, r"not of the shape \(4,\)"),
        (torch.zeros(1, 4), 0, "at least 1, not 0"),
        (torch.full((1, 4), torch.nan), 1, "NaN or infinity"),
    ],
)
def test_wrong_queries(queries: Tensor, k: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        made(rows(9, 4)).search(queries, k)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"captions": ("one",)}, "a set of 9 embeddings cannot have 1 captions"),
        ({"metric": "cosinus"}, "the metric must be one of cosine, normalised L2, not 'cosinus'"),
        ({"embeddings": torch.zeros(9)}, r"must be rows \[N, D\], not of the shape \(9,\)"),
        ({"embeddings": torch.zeros(9, 2, dtype=torch.int64)}, "floating-point"),
    ],
)
def test_sets_that_do_not_fit_together(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(made(rows(9, 4)), **changes)


# --------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["set", "set.json", "set.safetensors"])
def test_what_is_saved_is_loaded(tmp_path: Path, name: str) -> None:
    saved = replace(made(rows(9, 4)), captions=("Déjà\nvu \u2028 😀", *(f"c{n}" for n in range(8))))
    saved.save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.json", "set.safetensors"]
    loaded = ReferenceSet.load(tmp_path / name)
    for field in ("embeddings", "duplicates", "near_duplicates"):
        assert torch.equal(getattr(loaded, field), getattr(saved, field))
    for field in ("captions", "names", "features", "metric", "near_threshold", "details", "fingerprint"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert list(loaded.thumbnails) == list(saved.thumbnails)
    assert loaded.thumbnails[-1] == bytes([8]) * 3
    assert loaded.thumbnails[2:4] == [bytes([2]) * 2, bytes([3]) * 3]


def test_a_name_with_dots_keeps_them() -> None:
    assert files_of(Path("a/my.set.v2")) == (Path("a/my.set.v2.safetensors"), Path("a/my.set.v2.json"))


def test_features_are_checked_on_load(tmp_path: Path) -> None:
    made(rows(9, 4)).save(tmp_path / "set")
    assert len(ReferenceSet.load(tmp_path / "set", Grey())) == 9
    with pytest.raises(ValueError, match=r"made with the features 'grey 32' .* not with 'pixels 32'"):
        ReferenceSet.load(tmp_path / "set", Pixels())


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "set.json"
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))

    return edit


def retensored(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "set.safetensors"
        tensors = {name: value.clone() for name, value in load_file(file).items()}
        fingerprint = json.loads((folder / "set.json").read_text())["fingerprint"]
        change(tensors)
        save_file(tensors, file, metadata={"dejavu-reference-set": fingerprint})

    return edit


def of_another_set(folder: Path) -> None:
    made(rows(9, 4, seed=5)).save(folder / "other")
    (folder / "other.safetensors").replace(folder / "set.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda f: (f / "set.json").unlink(), "cannot be read: No such file"),
    "no tensors": (lambda f: (f / "set.safetensors").unlink(), "set.safetensors is missing: keep it beside"),
    "not JSON": (lambda f: (f / "set.json").write_text("{"), "not valid JSON"),
    "not text": (lambda f: (f / "set.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "a list": (lambda f: (f / "set.json").write_text("[]"), "is not a Déjà Vu reference set"),
    "another format": (edited(lambda d: d.update(format="dejavu-calibration")), "is not a Déjà Vu reference set"),
    "another version": (edited(lambda d: d.update(schema_version=2)), "has schema version 2, this program reads 1"),
    "cut tensors": (lambda f: (f / "set.safetensors").write_bytes(b"\0" * 20), "not a sound safetensors file"),
    "foreign tensors": (lambda f: save_file({"a": torch.zeros(1)}, f / "set.safetensors"), "it lacks duplicates"),
    "another set's tensors": (of_another_set, "are not of one reference set"),
    "no fingerprint": (edited(lambda d: d.pop("fingerprint")), "no fingerprint"),
    "no rows": (edited(lambda d: d.pop("rows")), "damaged"),
    "a row too few": (edited(lambda d: d["rows"].pop()), "a set of 9 embeddings cannot have 8 captions and 8 names"),
    "a caption of numbers": (edited(lambda d: d["rows"][0].update(caption=3)), "3 is not text"),
    "an absolute name": (edited(lambda d: d["rows"][0].update(name="/etc/passwd")), "'/etc/passwd' is not relative"),
    "a name leading out": (edited(lambda d: d["rows"][0].update(name="a/../../b")), "is not relative"),
    "a drive": (edited(lambda d: d["rows"][0].update(name="C:x.png")), "is not relative"),
    "an unknown metric": (edited(lambda d: d.update(metric="hamming")), "not 'hamming'"),
    "NaN rows": (retensored(lambda t: t["embeddings"].fill_(torch.nan)), "NaN or infinity"),
    "negative counts": (retensored(lambda t: t["duplicates"].fill_(0)), "not counts"),
    "rows in float8": (
        retensored(lambda t: t.update(embeddings=t["embeddings"].to(torch.float8_e4m3fn))),
        "must be floating-point numbers of 16 to 64 bits, not torch.float8_e4m3fn",
    ),
    "rows that are far too long": (retensored(lambda t: t["embeddings"].mul_(1e30)), "are not of unit length"),
    "rows that are too short": (retensored(lambda t: t["embeddings"].mul_(0.5)), "are not of unit length"),
    "counts without an end": (retensored(lambda t: t["duplicates"].fill_(2**62)), "not counts"),
    "a threshold of 400 digits": (
        edited(lambda d: d.update(near_threshold=10**400)),
        "must be a finite number, not 1000",
    ),
    "a threshold in text": (edited(lambda d: d.update(near_threshold="0.9")), "must be a finite number, not '0.9'"),
    "a threshold that is none": (edited(lambda d: d.update(near_threshold=float("nan"))), "finite number, not nan"),
    "details in a list": (edited(lambda d: d.update(details=[])), "no details"),
    "copies in a dictionary": (edited(lambda d: d["details"].update(copies={})), "copies is no list of entries"),
    "copies of numbers": (edited(lambda d: d["details"].update(copies=[3])), "copies is no list of entries"),
    "a copy without a caption": (
        edited(lambda d: d["details"].update(copies=[{"name": "a.png", "of": "folder/1.png"}])),
        "no 'caption'",
    ),
    "a copy of nothing": (
        edited(lambda d: d["details"].update(copies=[{"name": "a.png", "caption": "", "of": "b.png"}])),
        "a copy of 'b.png', which it does not hold",
    ),
    "a copy that leads out": (
        edited(lambda d: d["details"].update(copies=[{"name": "../a", "caption": "", "of": "folder/1.png"}])),
        "'../a' is not relative",
    ),
    "none skipped": (edited(lambda d: d["details"].update(skipped=None)), "skipped is no list of entries"),
    "skipped without a reason": (edited(lambda d: d["details"].update(skipped=[{"name": "a"}])), "no 'reason'"),
    "a source of numbers": (edited(lambda d: d["details"].update(source=[1])), "source is [1]"),
    "made with a list": (edited(lambda d: d["details"].update(made_with=[1])), "made_with is [1]"),
    "features without a name": (edited(lambda d: d.update(features=" ")), "its features have no name"),
    "half a character": (edited(lambda d: d["rows"][0].update(caption="\ud800")), "surrogates not allowed"),
    "a caption of a megabyte": (edited(lambda d: d["rows"][0].update(caption="a" * 2**20)), "caption is too long"),
    "JSON without a bottom": (lambda f: (f / "set.json").write_text("[" * 100_000), "nested too deep"),
    "broken thumbnails": (retensored(lambda t: t["thumbnail_ends"].fill_(99)), "thumbnails are not whole"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_are_told_in_a_sentence(tmp_path: Path, fault: str) -> None:
    made(rows(9, 4)).save(tmp_path / "set")
    change, sentence = FAULTS[fault]
    change(tmp_path)
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        ReferenceSet.load(tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "set.json") in str(caught.value) or str(tmp_path / "set.safetensors") in str(caught.value)


def test_rows_of_one_grey_and_rows_in_half_precision_are_sound(tmp_path: Path) -> None:
    saved = made(rows(9, 4))
    saved.embeddings[3] = 0
    saved.save(tmp_path / "set")
    retensored(lambda t: t.update(embeddings=t["embeddings"].half()))(tmp_path)
    assert ReferenceSet.load(tmp_path / "set").embeddings.dtype == torch.float16


def test_distances_that_leave_fp32_are_refused(tmp_path: Path) -> None:
    """1e20 squared is infinite in fp32, and the similarity would be infinity through infinity."""
    made(rows(60, 4) * 1e20, "normalised L2", "pixels 32").save(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set\.json is damaged \(embeddings hold values beyond 1e\+09\)"):
        ReferenceSet.load(tmp_path / "set")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_never_saved(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"set\.safetensors is not saved: its embeddings hold NaN or infinity"):
        replace(made(rows(9, 4)), embeddings=torch.full((9, 4), value)).save(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
