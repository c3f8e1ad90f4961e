"""The overlay's pure parts: vitest in a copy of the folder, and drop_word in JavaScript against Python's."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from sd_dejavu.core.conditioning import Word, split_words
from sd_dejavu.explain.leave_one_out import drop_word

HERE = Path(__file__).parent
WEB = HERE.parents[1] / "web"
PARTS = [
    "a",
    "red",
    "boat",
    ",",
    ";",
    "|",
    "-",
    "(",
    ")",
    "[",
    "]",
    ":",
    "(big:1.3)",
    "()",
    "[]",
    "(",
    ":1.2",
    ")",
    "\\(",
    "\\)",
    "🦄",
    "👩\u200d🚀",
    "تمنه",
    "é",
    "<b>",
    "\xa0",
    "\u3000",
    "\x1c",
    "\x85",
    "\ufeff",
    "\t",
    "\n",
]
DROP_ALL = """
import { acted, placed } from %s
let text = ''
for await (const piece of process.stdin) text += piece
const results = JSON.parse(text).map(({ prompt, words }) =>
  words.map((_, index) => acted('drop', prompt, placed(prompt, words), prompt, index)))
console.log(JSON.stringify(results))
"""


def _missing(tool: str) -> str | None:
    return None if shutil.which(tool) else f"{tool} was not found: the front end's own tests did not run"


def test_front_end_passes_vitest(tmp_path: Path) -> None:
    if why := _missing("npm"):
        pytest.skip(why)
    for needed in (WEB, WEB.parent / "javascript"):
        shutil.copytree(needed, tmp_path / needed.name)
    folder = shutil.copytree(HERE, tmp_path / "tests" / "web", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, capture_output=True, timeout=300)
    done = subprocess.run(["npm", "test"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dropping_a_word_is_what_python_does() -> None:
    if why := _missing("node"):
        pytest.skip(why)
    rng = random.Random(0)
    prompts = ["Study Of A Black Car By Moxgaen", "a (big:1.3) boat", "one, two", "a () b (c)", "x" * 50]
    prompts += ["".join(rng.choice(PARTS) + rng.choice(["", " ", "  "]) for _ in range(12)) for _ in range(400)]
    cases = [(prompt, _words(prompt, rng)) for prompt in prompts]
    script = DROP_ALL % json.dumps((WEB / "prompt.js").as_uri())
    sent = [{"prompt": p, "words": [{"text": w.text, "start": w.start, "end": w.end} for w in ws]} for p, ws in cases]
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", script],
        input=json.dumps(sent),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == [[drop_word(prompt, word) for word in words] for prompt, words in cases]


def _words(prompt: str, rng: random.Random) -> list[Word]:
    """The prompt's words, and stretches that end inside of words as weighted ones do."""
    words = list(split_words(prompt))
    for word in split_words(prompt):
        start = rng.randrange(word.start, word.end)
        words.append(Word(prompt[start : word.end], start, word.end))
    return words
