"""The command line as a user meets it: output, exit status, one sentence for bad input."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sd_dejavu import mitigations
from sd_dejavu.calibration.profile import Profile
from sd_dejavu.cli import demo, mitigate
from sd_dejavu.cli.common import from_arguments
from sd_dejavu.cli.main import main, parser
from sd_dejavu.core.settings import Checked, option
from sd_dejavu.core.verdict import Verdict
from sd_dejavu.demo import bundled
from sd_dejavu.demo.evaluation import held_out_pairs
from sd_dejavu.hosts.diffusers.adapter import DiffusersModel
from sd_dejavu.mitigations import Outcome

MEMORISED = held_out_pairs("hard")[0].caption
ORDINARY = bundled.held_out_ordinary(3, seed=8)[1]


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SD_DEJAVU_HOME", str(tmp_path / "home"))


def json_lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_check_flags_the_memorised_prompt_only(capsys):
    assert main(["check", "--json", MEMORISED, ORDINARY]) == 0
    memorised, ordinary = json_lines(capsys)
    assert memorised["prompt"] == MEMORISED
    assert memorised["flagged"] is True
    assert memorised["p_value"] <= 0.01
    assert ordinary["flagged"] is False
    assert ordinary["words"] == []
    assert {w["text"] for w in memorised["words"]} == set(MEMORISED.split())
    assert all(0 <= w["significance"] <= 1 for w in memorised["words"])
    assert len(memorised["score_per_step"]) == 1


def test_fail_on_flag_gives_status_3(capsys):
    assert main(["check", "--fail-on-flag", MEMORISED]) == 3
    assert main(["check", "--fail-on-flag", ORDINARY]) == 0
    assert "Likely a replay" in capsys.readouterr().out


@pytest.mark.parametrize("score", ["first step", "first 5 steps"])
def test_same_seed_same_answer_whatever_the_batch_size(capsys, score):
    answers = []
    for batch in ("1", "3", "64"):
        assert (
            main(["check", "--json", "--score", score, "--seed", "3", "--batch-size", batch, MEMORISED, ORDINARY]) == 0
        )
        answers.append([row["score"] for row in json_lines(capsys)])
    for other in answers[1:]:
        assert other == pytest.approx(answers[0], rel=1e-5)


def test_a_negative_prompt_changes_later_steps_but_not_the_first(capsys):
    plain = ["check", "--json", "--images", "1", "--steps", "10", MEMORISED]
    main([*plain, "--score", "first 5 steps"])
    main([*plain, "--score", "first 5 steps", "--negative", "red ball"])
    plain, with_negative = json_lines(capsys)
    assert plain["score_per_step"][0] == pytest.approx(with_negative["score_per_step"][0], rel=1e-5)
    assert plain["score_per_step"][4] != pytest.approx(with_negative["score_per_step"][4], rel=1e-3)


def test_scores_against_the_negative_prompt_get_no_p_value_from_a_profile_of_the_empty_one(capsys):
    main(["check", "--json", "--negative", "red ball", "--without", "negative prompt", MEMORISED])
    (row,) = json_lines(capsys)
    assert row["p_value"] is None
    assert row["flagged"] is None
    assert "calibrat" in row["why"]


@pytest.mark.parametrize("view", ["confirmed gradient", "input gradient", "output gradient", "leave one out"])
def test_explain_gives_every_word_in_every_view(capsys, view):
    assert main(["explain", "--json", "--view", view, MEMORISED]) == 0
    (row,) = json_lines(capsys)
    assert row["view"] == view
    assert [w["text"] for w in row["words"]] == MEMORISED.split()
    assert max(w["significance"] for w in row["words"]) == 1


def test_explain_prints_a_table(capsys):
    assert main(["explain", "--view", "leave one out", MEMORISED]) == 0
    assert "score" in capsys.readouterr().out


def test_mitigate_lowers_the_score(capsys):
    assert main(["mitigate", "--json", MEMORISED]) == 0
    assert main(["mitigate", "--json", "--method", "remove-trigger", MEMORISED]) == 0
    assert main(["check", "--json", "--explain", "never", MEMORISED]) == 0
    optimised, removed, checked = json_lines(capsys)
    for row in (optimised, removed):
        assert row["score_after"] < 0.5 * row["score"]
    assert removed["prompt_after"] != MEMORISED
    # The loss is the mean over four images, as the score of check; a mitigation's score is that of the worst one.
    assert optimised["losses"][0] == pytest.approx(checked["score"], rel=1e-3)
    assert optimised["score"] == removed["score"] > checked["score"]


@pytest.mark.parametrize(
    "method", ["guidance-transition", "start-token", "attenuate-tokens", "batch-wise-noise", "amg"]
)
def test_every_kind_of_mitigation_is_drawn(method, tmp_path, capsys):
    given = ["mitigate", "--json", "--images", "1", "--steps", "3", "--target", "0.3", "--out", str(tmp_path)]
    assert main([*given, "--method", method, MEMORISED]) == 0
    (row,) = json_lines(capsys)
    assert row["method"] == method and row["prompt_after"] == MEMORISED
    plain, drawn = (tmp_path / f"prompt-1-image-1{end}.png" for end in ("", f"-{method}"))
    assert plain.read_bytes() != drawn.read_bytes()


def test_a_reference_set_of_the_users_own_guides(tmp_path, capsys):
    assert main(["refset", "build", "bundled", str(tmp_path / "set"), "--features", "grey"]) == 0
    given = ["mitigate", "--method", "amg", "--target", "0.3", "--reference", str(tmp_path / "set.json"), MEMORISED]
    assert main(given) == 0
    assert "amg: steer away" in capsys.readouterr().out


def test_mitigate_draws_images_and_a_report(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["mitigate", "--images", "1", "--steps", "5", "--target", "0.3", "--out", str(out), MEMORISED]) == 0
    assert (out / "prompt-1-image-1.png").is_file()
    assert (out / "prompt-1-image-1-optimise-tokens.png").is_file()
    assert "Déjà Vu" in (out / "report.html").read_text(encoding="utf-8")


def test_calibrate_is_found_again_by_check(tmp_path, capsys):
    """A setting the bundled profile does not cover, calibrated by the user."""
    setting = ["--steps", "25", "--without", "negative prompt", "--negative", "red ball", "--images", "1"]
    assert main(["calibrate", "--json", "--count", "120", *setting]) == 0
    (summary,) = json_lines(capsys)
    assert summary["prompts"] == 120
    assert main(["check", "--json", *setting, MEMORISED]) == 0
    (row,) = json_lines(capsys)
    assert row["nulls"] == 120
    assert row["flagged"] is True


@pytest.mark.parametrize("score", ["first step", "all steps"])
def test_check_makes_the_calibration_it_lacks(capsys, score):
    setting = ["--images", "1", "--steps", "3", "--score", score]  # of which no calibration comes with the model
    assert main(["check", *setting, ORDINARY]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "No verdict" in told and "or check with --calibrate-first 100" in told
    assert main(["check", "--json", *setting, "--calibrate-first", "99", MEMORISED, ORDINARY]) == 0
    memorised, ordinary = json_lines(capsys)
    assert memorised["nulls"] == ordinary["nulls"] == 99 and ordinary["flagged"] is False
    # Kept: a run that measures none finds it.
    assert main(["check", "--json", *setting, MEMORISED]) == 0
    (again,) = json_lines(capsys)
    assert again["p_value"] == memorised["p_value"] and again["p_value"] is not None
    assert main(["check", "--calibrate-first", "-1", ORDINARY]) == 2
    assert "--calibrate-first must be 0 or more" in capsys.readouterr().err


def test_calibrate_keeps_the_one_that_holds_more(tmp_path, capsys):
    kept = tmp_path / "kept.json"
    few = ["calibrate", "--json", "--out", str(kept), "--images", "1", "--steps", "3", "--count", "20"]
    many = [*few[:-1], "30"]
    assert main(many) == 0 == main(many)  # as many replace it
    before = kept.read_bytes()
    capsys.readouterr()
    assert main(few) == 2
    told = capsys.readouterr().err
    assert "it holds 30 ordinary prompts" in told and "the new one 20" in told and told.count("\n") == 1
    assert kept.read_bytes() == before
    assert main([*few, "--replace"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 20 and kept.read_bytes() != before


def test_bench_writes_its_rows(tmp_path, capsys):
    positives, negatives = tmp_path / "p.txt", tmp_path / "n.csv"
    positives.write_text("\n".join(p.caption for p in held_out_pairs("hard")[:4]))
    negatives.write_text("prompt\n" + "\n".join(f'"{c}"' for c in bundled.held_out_ordinary(6, seed=3)))
    files = ["--positives", str(positives), "--negatives", str(negatives)]
    out = ["--json", str(tmp_path / "b.json"), "--csv", str(tmp_path / "b.csv")]
    assert main(["bench", *files, *out, "--steps", "5"]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(r["detector"], r["steps"], r["images"]) for r in rows if r["detector"] == "magnitude"] == [
        ("magnitude", 1, 1),
        ("magnitude", 1, 4),
        ("magnitude", 5, 1),
        ("magnitude", 5, 4),
    ]
    assert {"letter_case", "tiled_l2"} <= {r["detector"] for r in rows}
    for row in rows:
        assert row["auc_interval"][0] <= row["auc"] <= row["auc_interval"][1]
        assert row["seconds_per_prompt"] > 0
    with (tmp_path / "b.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


class Images(HTMLParser):
    def __init__(self):
        super().__init__()
        self.count, self.scripts = 0, 0

    def handle_starttag(self, tag, attributes):
        self.count += tag == "img"
        self.scripts += tag == "script"


def test_demo_needs_no_arguments_and_takes_prompts(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--images", "1", "a <b>red</b> boat"]) == 0
    text = capsys.readouterr().out
    assert "Likely a replay" in text
    page = (out / "report.html").read_text(encoding="utf-8")
    parser = Images()
    parser.feed(page)
    assert parser.scripts == 0
    assert parser.count >= 3 * 4  # three prompts: plain, where, two mitigations
    assert "a &lt;b&gt;red" in page or "&lt;b&gt;red&lt;/b&gt;" in page
    assert "<b>red</b>" not in page


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["check", ""], "empty"),
        (["check", "red " * 700], "too long"),
        (["check", "--model", "/nowhere/model.safetensors", "a"], "does not exist"),
        (["check", "--prompts-file", "/nowhere/list.txt"], "/nowhere/list.txt"),
        (["check", "--alpha", "0", "a"], "alpha"),
        (["check", "--images", "0", "a"], "images"),
        (["check", "--steps", "5000", "a"], "steps"),
        (["check", "--device", "cuda:9", "a"], "cuda"),
        (["check", "--profile", "/nowhere/profile.json", "a"], "/nowhere/profile.json"),
        (["mitigate", "--target", "-1", "a"], "target"),
        (["bench", "--positives", "/nowhere/p.txt"], "both"),
        (["demo", " "], "empty"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(capsys, arguments, part):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


# ------------------------------------------------------------------------------- out of memory

LONG = ("a red boat on the river " * 20).strip()  # of two chunks of tokens, for which memory does not suffice here


@pytest.fixture
def no_room_for_long_prompts(monkeypatch):
    plain = DiffusersModel._denoised

    def denoised(self, x, sigma, conditioning):
        if conditioning.rows.shape[1] > 77:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, x, sigma, conditioning)

    monkeypatch.setattr(DiffusersModel, "_denoised", denoised)


@pytest.mark.parametrize("command", [["check"], ["check", "--score", "first 5 steps"], ["explain"]])
def test_out_of_memory_costs_one_prompt_and_not_the_run(capsys, no_room_for_long_prompts, command):
    assert main([*command, "--json", "--images", "1", "a boat", LONG, "a red boat"]) == 4
    first, none, last = json_lines(capsys)
    assert first["score"] > 0 and last["score"] > 0
    assert none["score"] is None and none["flagged"] is None and none["words"] == []
    assert "not enough memory" in none["why"] and "float16" in none["why"]
    if command == ["explain"]:
        assert "no words: there is not enough memory" in none["why_no_words"]
        assert len(last["words"]) == 3 and "why_no_words" not in last


def test_words_that_do_not_fit_leave_the_verdict(capsys, monkeypatch):
    plain = DiffusersModel._denoised

    def denoised(self, x, sigma, conditioning):
        if conditioning.rows.requires_grad:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(self, x, sigma, conditioning)

    monkeypatch.setattr(DiffusersModel, "_denoised", denoised)
    assert main(["check", MEMORISED]) == 4
    shown = capsys.readouterr().out
    assert "Likely a replay" in shown and "no words: there is not enough memory" in shown
    assert main(["check", "--fail-on-flag", MEMORISED]) == 3


def test_a_prompt_that_cannot_be_mitigated_says_so_and_the_next_one_is(capsys, no_room_for_long_prompts):
    given = ["mitigate", "--json", "--images", "1", "--method", "remove-trigger", "--target", "0.3", LONG, "a red boat"]
    assert main(given) == 4
    none, other = json_lines(capsys)
    assert none["prompt"] == LONG and "not mitigated: there is not enough memory" in none["why"]
    assert "score" not in none and other["score_after"] <= other["score"]


def test_ordinary_prompts_that_do_not_fit_are_left_out_of_a_calibration(tmp_path, capsys, no_room_for_long_prompts):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["a boat", LONG, *bundled.held_out_ordinary(30, seed=3)]))
    given = ["calibrate", "--json", "--prompts-file", str(file), "--images", "1", "--steps", "3", "--full-runs", "2"]
    assert main(given) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["prompts"] == 31
    assert captured.err.startswith("sd-dejavu: not measured: a red boat") and captured.err.count("\n") == 1
    file.write_text(LONG)
    assert main([*given, "--replace"]) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_a_calibration_like_given_prompts_says_so_and_is_checked_against_them(tmp_path, capsys):
    file, out = tmp_path / "mine.txt", tmp_path / "made.json"
    file.write_text("\n".join(bundled.held_out_ordinary(60, seed=3)))
    given = ["calibrate", "--like", str(file), "--count", "150", "--images", "1", "--out", str(out)]
    assert main(given) == 0
    captured = capsys.readouterr()
    assert "150 ordinary prompts, recombined from yours, at sigma" in captured.out and captured.err == ""
    assert "stranger" not in captured.out
    assert Profile.load(out).ordinary == "recombined"
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--prompts-file", str(file)])
    assert "not allowed with argument" in capsys.readouterr().err
    file.write_text("a boat")
    assert main([*given, "--replace"]) == 2
    assert "too few words in common for 150 others" in capsys.readouterr().err


def test_a_list_is_told_when_the_ordinary_prompts_are_strangers(tmp_path, capsys):
    profile, strangers = Profile.load(bundled.CALIBRATION), tmp_path / "strangers.json"
    nulls = [
        replace(n, scores={k: tuple(2 * v for v in values) for k, values in n.scores.items()}) for n in profile.nulls
    ]
    replace(profile, nulls=tuple(nulls)).save(strangers)
    file = tmp_path / "mine.txt"
    file.write_text("\n".join([*bundled.held_out_ordinary(15, seed=3), MEMORISED]))
    for path, told in ((strangers, True), (bundled.CALIBRATION, False)):
        assert main(["check", "--prompts-file", str(file), "--json", "--explain", "never", "--profile", str(path)]) == 0
        captured = capsys.readouterr()
        assert ("stranger to this model than your prompts" in captured.err) is told
        assert len(captured.out.splitlines()) == 16
    assert main(["check", "--explain", "never", "--profile", str(strangers), ORDINARY]) == 0
    assert capsys.readouterr().err == ""  # of one prompt nothing is known


def test_a_bench_counts_what_was_not_measured(tmp_path, capsys, no_room_for_long_prompts):
    positives, negatives = tmp_path / "p.txt", tmp_path / "n.txt"
    positives.write_text("\n".join([MEMORISED, LONG]))
    negatives.write_text("a boat\na red boat")
    files = ["--positives", str(positives), "--negatives", str(negatives)]
    assert main(["bench", *files, "--json", "-", "--steps", "2", "--detectors", "magnitude", "letter_case"]) == 4
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["rows"]
    assert {(r["detector"], r["not_measured"]) for r in rows} == {("magnitude", 1), ("letter_case", 0)}
    assert captured.err == "sd-dejavu: 1 prompts were not measured: memory did not suffice\n"


def test_out_of_memory_anywhere_else_is_one_sentence_and_status_2(capsys, monkeypatch):
    def no_room(*given):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(DiffusersModel, "__init__", no_room)
    assert main(["check", "a boat"]) == 2
    captured = capsys.readouterr()
    assert "bundled model does not fit: there is not enough memory" in captured.err and captured.err.count("\n") == 1


def test_demo_takes_a_device_and_a_precision(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "METHODS", {})
    seen, plain, sigmas = [], DiffusersModel._denoised, DiffusersModel.sigmas
    monkeypatch.setattr(
        DiffusersModel, "_denoised", lambda self, *given: (seen.append(self._unet.dtype), plain(self, *given))[1]
    )
    # The first step decides; in these precisions a CPU takes long for the others.
    monkeypatch.setattr(DiffusersModel, "sigmas", lambda self, steps: [*sigmas(self, steps)[:3], 0.0])
    given = ["--device", "cpu", "--dtype", "bfloat16", "--images", "1", "--out", str(tmp_path / "demo")]
    assert main(["demo", *given]) == 0
    shown = capsys.readouterr().out
    assert "Likely a replay" in shown and "Not flagged" in shown
    assert set(seen) == {torch.bfloat16}
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--device", "cuda:9"]) == 2
    assert main(["demo", "--dtype", "int8"]) == 2
    assert not Path("dejavu-demo").exists()  # what is refused leaves nothing
    assert "use one of float32, float16, bfloat16" in capsys.readouterr().err


def test_a_broken_line_is_named(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a boat"}\n{"prompt": \n')
    assert main(["check", "--prompts-file", str(path)]) == 2
    assert "line 2" in capsys.readouterr().err


def test_a_profile_of_another_setting_is_refused(tmp_path, capsys):
    assert main(["check", "--profile", str(bundled.CALIBRATION), "--steps", "10", "a boat"]) == 2
    assert "another setting" in capsys.readouterr().err


def test_the_installed_command_runs(tmp_path):
    command = shutil.which("sd-dejavu", path=str(Path(sys.executable).parent))
    assert command is not None, "install the project first: pip install '.[test]'"
    done = subprocess.run(
        [command, "check", "--json", "-"], input=MEMORISED, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["flagged"] is True
    assert done.stderr == ""


def test_help_tells_the_defaults_that_are_taken():
    (commands,) = (action for action in parser()._actions if isinstance(action.choices, dict))
    for name, command in commands.choices.items():
        for action in command._actions:
            taken, told = action.default, (action.help or "").rpartition("(default: ")[2].rstrip(")")
            if "(default: " in (action.help or "") and isinstance(taken, (str, int, float)) and taken != "":
                shown = f"{taken:g}" if isinstance(taken, float) else str(taken)
                assert told.partition(",")[0] == shown, f"{name} {action.option_strings}"


# --------------------------------------------------------------------- what others wrote, at a terminal

HOSTILE = ("\x1b]0;pwned\x07 a red boat", "a \\[/foo] boat", "[/b][bold]boat \x9b31m\r\u2028 \x7f\u202e")


def shown(capsys):
    """All that was printed, which steers no terminal."""
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert not [c for c in text if c == "\u202e" or (c != "\n" and unicodedata.category(c) in ("Cc", "Cs"))]
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    "command",
    [
        ["check", "--explain", "always"],
        ["explain", "--view", "leave one out"],
        ["mitigate", "--method", "remove-trigger", "--target", "0.3"],
    ],
    ids=lambda command: command[0],
)
def test_prompts_bring_no_markup_and_steer_no_terminal(capsys, command):
    assert main([*command, "--images", "1", *HOSTILE]) == 0
    text = shown(capsys)
    assert "\\[/foo]" in text and "pwned" in text and "[/b]" in text
    for prompt in HOSTILE:
        assert main([*command, "--json", "--images", "1", prompt]) == 0
        captured = capsys.readouterr()
        assert "\x9b" not in captured.out and "\x7f" not in captured.out and "\x1b" not in captured.out
        assert json.loads(captured.out)["prompt"] == prompt.strip()


def test_folders_may_be_called_anything(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "x[/b] \x1b]0;pwned\x07 \\[red]"
    few = ["--images", "1", "--steps", "2"]
    training, captions = Path("set"), Path("captions.txt")
    image = training / f"{name.replace('/', '')}.png"
    training.mkdir()
    bundled.make_sheet(np.zeros((1, 64, 64, 3), dtype=np.uint8)).save(image)
    image.with_suffix(".txt").write_text(HOSTILE[0])
    captions.write_text("\n".join([MEMORISED, HOSTILE[1]]))
    case = SimpleNamespace(verdict=Verdict(HOSTILE[1], 1.0, 0.5, False, 0.01), mitigated=())
    monkeypatch.setattr(demo, "run_case", lambda *given, **options: case)
    monkeypatch.setattr(demo, "save_images", lambda *given: None)
    monkeypatch.setattr(demo, "render_cases", lambda *given: "")
    for command in (
        ["mitigate", "--target", "0.3", "--method", "remove-trigger", *few, "--out", name, "a boat"],
        ["calibrate", "--count", "25", *few, "--out", f"{name}.json"],
        ["demo", "--images", "1", "--out", name],
        ["refset", "build", str(training), f"{name}-set", "--features", "grey"],
        ["refset", "search", f"{name}-set.json", str(image)],
        ["audit", "--dataset", str(captions), "--nulls", "25", "--worst", "0", *few, "--out", f"{name}-audit"],
    ):
        assert main(command) == 0, shown(capsys)
        text = shown(capsys).replace("\n", "")
        assert "\\[red]" in text and "pwned" in text, command


def test_messages_about_what_was_typed_steer_no_terminal(tmp_path, capsys):
    for arguments in (["--view", HOSTILE[0], "a"], ["--pwned\x1b]0;x\x07"], ["--images", "two\npwned"]):
        with pytest.raises(SystemExit, match="2"):
            main(["explain", *arguments])
        text = shown(capsys)
        assert "error: " in text and "pwned" in text and text.count("\n") == 1
    assert main(["check", "--model", "x\n\x1b]0;pwned\x07", "a boat"]) == 2
    assert shown(capsys).count("\n") == 1
    assert main(["check", "--prompts-file", f"{HOSTILE[0]}.txt"]) == 2
    assert shown(capsys).count("\n") == 1


# ------------------------------------------------------------------------------- numbers out of range


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("check", "alpha", ("nan", "inf", "-inf", "1e-320", "9e-10", "0", "-1", "1", "1000000000000", "x")),
        ("check", "images", ("nan", "0", "-1", "1000000000000", "1e3")),
        ("check", "steps", ("inf", "0", "-1", "1000000000000")),
        ("check", "seed", ("-1", "99999999999999999999")),
        ("check", "guidance-scale", ("nan", "inf", "-1", "1000000000000")),
        ("check", "batch-size", ("0", "-1", "1000000000000", "nan")),
        ("calibrate", "count", ("0", "-1", "1000000000000", "inf")),
        ("calibrate", "full-runs", ("-1", "nan", "1000000000000")),
        ("calibrate", "alpha", ("1e-320",)),
        ("compare", "pairs", ("0", "1000000000000")),
        ("compare", "ordinary", ("0", "1000000000000")),
        ("compare", "images", ("0", "65", "1000000000000")),
        ("compare", "seed", ("-1", "99999999999999999999")),
        ("bench", "negatives-count", ("0", "1000000000000")),
        ("demo", "images", ("0", "1000000000000")),
        ("demo", "seed", ("-1", "99999999999999999999")),
        ("mitigate", "target", ("nan", "inf", "0", "-1")),
        ("mitigate", "target-quantile", ("nan", "inf", "-1", "2")),
        ("mitigate", "learning-rate", ("nan", "inf", "0", "1e-320")),
        ("mitigate", "iterations", ("0", "1000000000000")),
        ("audit", "false-discovery-rate", ("nan", "inf", "1e-320", "0", "1")),
        ("audit", "nulls", ("0", "1000000000000")),
    ],
)
def test_numbers_are_checked_before_the_work(capsys, monkeypatch, command, option, values):
    monkeypatch.setattr(DiffusersModel, "_denoised", lambda *given: pytest.fail("measured all the same"))
    what = {"check": ["a"], "mitigate": ["a"], "audit": ["--dataset", "captions.txt"]}
    for value in values:
        with pytest.raises(SystemExit) as left:  # argparse leaves by itself, and main's own refusals are made to
            raise SystemExit(main([command, *what.get(command, []), f"--{option}={value}"]))
        assert left.value.code == 2, (option, value)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert "must" in last or "invalid" in last, last
        assert option.split("-")[0] in last, last


@pytest.mark.parametrize(
    "command", [["check", "a"], ["bench"], ["calibrate"], ["demo"], ["compare"], ["mitigate", "a"]]
)
@pytest.mark.parametrize("device", ["meta", "abacus", "cuda:99"])
def test_a_device_that_cannot_be_used_is_one_sentence(capsys, command, device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"device {device!r}" in error


# ------------------------------------------------------------------------------- prompts too long

TOO_LONG = "red " * 700


@pytest.mark.parametrize("command", [["check"], ["explain"], ["check", "--score", "first 5 steps"]])
def test_a_prompt_that_is_too_long_costs_its_own_result_and_is_named(capsys, command):
    prompts = ["a boat"] * 65 + [TOO_LONG, "a red boat"]
    if command != ["check"]:
        prompts = prompts[63:]
    assert main([*command, "--json", "--images", "1", "--steps", "5", *prompts]) == 4
    *others, none, last = json_lines(capsys)
    assert len(others) == len(prompts) - 2 and all(row["score"] > 0 for row in (*others, last))
    number = len(prompts) - 1
    start = f"prompt {number} (red red red red red red red red red red ...): the prompt is too long: 700 tokens"
    assert none["why"].startswith(start) and none["score"] is None and none["flagged"] is None


def test_only_prompts_that_are_too_long(capsys):
    assert main(["check", "--json", TOO_LONG, TOO_LONG]) == 4
    assert [row["score"] for row in json_lines(capsys)] == [None, None]
    assert main(["mitigate", "--target", "0.3", TOO_LONG]) == 2
    assert "the prompt is too long: 700 tokens" in capsys.readouterr().err


def test_mitigations_of_the_others_come_too(capsys):
    given = ["mitigate", "--json", "--images", "1", "--method", "remove-trigger", "--target", "0.3"]
    assert main([*given, TOO_LONG, "a red boat"]) == 4
    none, other = json_lines(capsys)
    assert none["why"].startswith("not mitigated: prompt 1 (red red") and other["score_after"] <= other["score"]


def test_a_calibration_leaves_out_what_is_too_long_and_long_work_is_refused_before(tmp_path, capsys):
    file, ordinary = tmp_path / "prompts.txt", tmp_path / "ordinary.txt"
    file.write_text("\n".join(["a boat", TOO_LONG, *bundled.held_out_ordinary(30, seed=3)]))
    ordinary.write_text("a boat\na red boat")
    given = ["--images", "1", "--steps", "3"]
    assert main(["calibrate", "--json", "--prompts-file", str(file), *given]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["prompts"] == 31
    assert captured.err.startswith("sd-dejavu: not measured: prompt 2 (red red") and captured.err.count("\n") == 1
    assert main(["bench", "--positives", str(file), "--negatives", str(ordinary), *given]) == 2
    assert "error: prompts.txt, prompt 2 (red red" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "demo"), "a boat", TOO_LONG]) == 2
    captured = capsys.readouterr()
    assert "prompt 4 (red red" in captured.err and not captured.out
    file.write_text(TOO_LONG)
    assert main(["calibrate", "--prompts-file", str(file), *given]) == 2
    assert "prompt 1 (red red" in capsys.readouterr().err


# ------------------------------------------------------------------------------- files, pipes and options


def test_a_damaged_profile_in_the_data_folder_is_passed_over_with_a_line(tmp_path, capsys):
    folder = tmp_path / "home" / "calibration"
    folder.mkdir(parents=True)
    fingerprint = Profile.load(bundled.CALIBRATION).setting.model
    (folder / f"{fingerprint}-00000000.json").write_text("[" * 100_000)
    assert main(["check", "--json", MEMORISED]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["flagged"] is True
    assert captured.err.startswith("sd-dejavu: passed over: the calibration profile ")
    assert f"{fingerprint}-00000000.json is not valid JSON" in captured.err and captured.err.count("\n") == 1


def test_output_and_input_are_utf8_whatever_the_code_page(monkeypatch):
    prompt = "a red boat 猫 é"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "sd_dejavu.cli.main", "check"]
    done = subprocess.run([*command, "-"], input=prompt.encode(), capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "猫 é" in done.stdout.decode("utf-8") and "Déjà Vu" in done.stdout.decode("utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="cp1252"))
    assert main(["check", "--model", "猫", prompt]) == 2
    sys.stderr.flush()
    assert "the model 猫 does not exist" in written.getvalue().decode("utf-8")


@dataclass(frozen=True)
class Colliding(Checked):
    """Settings of a method that shares the names of others and of the command itself."""

    steps: int = option(3, "shared with the measurement", minimum=1, maximum=9)
    iterations: int = option(4, "shared with a method", minimum=1, maximum=9)
    prompts: int = option(5, "shared with what has no flag", minimum=1, maximum=9)
    out: bool = option(False, "shared with the command")
    own: float = option(0.5, "its own", minimum=0, maximum=1)


def test_methods_may_share_the_names_of_their_settings(capsys, monkeypatch):
    seen = []

    def work(model, conditioning, start, settings):
        seen.append(settings)
        return Outcome.unchanged(conditioning, 1.0)

    methods = mitigations.available()
    new = mitigations.Mitigation("new-method", "steer", "prompt", "none", Colliding, work)
    monkeypatch.setattr(mitigate, "available", lambda: methods | {"new-method": new})
    given = ["mitigate", "--json", "--images", "1", "--target", "0.3", "--method", "new-method", "a boat"]
    assert main(given) == 0
    flags = ["--new-method-steps", "7", "--new-method-iterations", "8", "--prompts", "6", "--own", "0.25"]
    assert main([*given, "--steps", "20", "--iterations", "9", *flags, "--new-method-out"]) == 0
    assert seen == [Colliding(), Colliding(7, 8, 6, True, 0.25)]
    assert main([*given, "--new-method-steps", "10"]) == 2
    assert "steps must be at least 1 and at most 9, not 10" in capsys.readouterr().err


OPTIONS_OF_0_1_0 = {
    "optimise-tokens": {"iterations": 7, "learning_rate": 0.5, "checkpointing": True},
    "remove-trigger": {"max_words": 2, "keep": 0.5},
    "random-word": {"insertions": 1},
    "per-sample-noise": {"noise_iterations": 3, "noise_rate": 0.5},
    "batch-wise-noise": {"noise_rounds": 4, "noise_strength": 0.1, "noise_radius": 0.2, "guidance_from": 0.3},
    "start-token": {"start_factor": 2.0, "mask_padding": False},
    "attenuate-tokens": {"attenuation": 0.9, "outlier_deviations": 5.0},
    "guidance-transition": {"before_transition": "opposite"},
    "amg": {"despecification": 1.0, "deduplication": 2.0, "dissimilarity": 3.0, "threshold": 0.2},
}


def test_the_options_of_methods_keep_their_names():
    """A new method may take none of them away."""
    flags = []
    for values in OPTIONS_OF_0_1_0.values():
        for name, value in values.items():
            flag = name.replace("_", "-")
            switched = {True: [f"--{flag}"], False: [f"--no-{flag}"]}
            flags += switched[value] if isinstance(value, bool) else [f"--{flag}", str(value)]
    given = parser().parse_args(["mitigate", "a boat", *flags])
    for name, values in OPTIONS_OF_0_1_0.items():
        settings = mitigations.available()[name].settings
        found = from_arguments(settings, given, mitigate._users(settings)[0])
        assert {name: getattr(found, name) for name in values} == values


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
def test_an_output_that_takes_nothing_is_one_sentence_and_status_2():
    command = [sys.executable, "-m", "sd_dejavu", "check", "--images", "1", "--json", "a boat"]
    ended, other_end = os.pipe()
    os.close(ended)
    full = os.open("/dev/full", os.O_WRONLY)
    for out, why in ((full, "No space left on device"), (other_end, "Broken pipe")):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.PIPE, text=True)
        os.close(out)
        assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1
