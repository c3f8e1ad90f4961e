"""Detectors by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_dejavu.denoiser import seeded_noise
from sd_dejavu.detectors import Observed, available
from sd_dejavu.detectors.tiled_l2 import tiled_distance


def test_released_detectors_keep_their_names_and_what_they_need() -> None:
    assert {"letter_case", "magnitude", "tiled_l2"} <= available().keys()
    assert available()["letter_case"].needs == "prompt"
    assert all(detector.name == name and detector.help for name, detector in available().items())


def test_one_file_more_is_one_detector_more(tmp_path: Path) -> None:
    """In a process of its own: registers may be read once."""
    (tmp_path / "aardvark.py").write_text(
        "from sd_dejavu.detectors import Detector\n"
        "DETECTORS = (Detector('aardvark', 'the first of all', 'prompt', lambda observed: len(observed.prompt)),)\n"
    )
    script = (
        "import sys; from sd_dejavu import detectors as d; d.__path__.append(sys.argv[1]); known = d.available(); "
        "print(*sorted(known), known['aardvark'].score(d.Observed('a boat')))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == [*sorted([*available(), "aardvark"]), "6"], done.stderr


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        ("The Great Wave off Kanagawa", 4 / 5),
        ("a small boat", 0.0),
        ("Été 4K - Paris, iPhone", 2 / 3),  # '4K' and '-' start with no letter
        ("1234 !", 0.0),
        ("", 0.0),
    ],
)
def test_letter_case_is_the_share_of_capitalised_words(prompt: str, share: float) -> None:
    assert available()["letter_case"].score(Observed(prompt)) == pytest.approx(share)


def test_the_magnitude_detector_averages_what_was_run() -> None:
    detector = available()["magnitude"]
    assert detector.score(Observed("", torch.tensor([[1.0, 2.0], [3.0, 6.0]]))) == 3
    with pytest.raises(ValueError, match="needs the readings"):
        detector.score(Observed(""))


def test_tiled_distance_is_the_rms_of_the_worst_tile() -> None:
    a, b = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    b[1, 2, 4], b[1, 3, 5] = 0.6, 0.8  # both in the tile of rows 2-3, columns 4-5, of 12 elements
    b[0, 7, 7] = 0.9  # alone in its tile
    assert tiled_distance(a, b).item() == pytest.approx(((0.36 + 0.64) / 12) ** 0.5)
    assert tiled_distance(b, a).item() == tiled_distance(a, b).item()


def test_tiled_distance_equals_a_loop_over_tiles_and_leaves_the_rest_out() -> None:
    a, b = seeded_noise((3, 14, 9), 0, 2)
    tiles = [
        np.sqrt(np.mean((a - b)[:, 3 * i : 3 * i + 3, 2 * j : 2 * j + 2].numpy() ** 2))
        for i in range(4)
        for j in range(4)
    ]
    assert tiled_distance(a, b).item() == pytest.approx(float(max(tiles)))
    b[:, 12:], b[:, :, 8:] = 99, 99  # beyond the last whole tile
    assert tiled_distance(a, b).item() == pytest.approx(float(max(tiles)))


def test_tiled_l2_scores_minus_the_mean_over_all_pairs() -> None:
    # Even pictures of .1, .2 and .5: the distances of the pairs are .1, .4 and .3.
    pictures = torch.tensor([0.1, 0.2, 0.5]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
    detector = available()["tiled_l2"]
    assert detector.score(Observed("", pictures=pictures)) == pytest.approx(-0.8 / 3)
    for too_few in (None, pictures[:1]):
        with pytest.raises(ValueError, match="at least 2 images"):
            detector.score(Observed("", pictures=too_few))
