"""``python broken_off.py MODEL DATASET UNBROKEN BROKEN KILLS OPTION...``: the same fine-tuning into two folders.

The one into BROKEN is killed KILLS times on its way and then left to finish. Each attempt is a process of its own,
forked here so that the libraries are imported once; it is sent SIGKILL a random moment after its training log has
grown by a random length. Prints how many were killed while they trained.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)  # before any work: threads do not survive the fork

import accelerate  # noqa: E402, F401
import diffusers  # noqa: E402, F401
import peft  # noqa: E402, F401

from sd_dejavu.cli.main import main  # noqa: E402
from sd_dejavu.hosts.diffusers.load import load  # noqa: E402, F401


def attempt(command: list[str]) -> int:
    child = os.fork()
    if child == 0:
        os._exit(main(command))
    return child


def broken_off(command: list[str], log: Path, rng: random.Random) -> bool:
    """Whether the attempt was killed before it had finished."""
    child = attempt(command)
    length = (log.stat().st_size if log.exists() else 0) + rng.randint(1, 150)
    moment = rng.uniform(0, 0.15)
    while not (log.exists() and log.stat().st_size >= length):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    model, dataset, unbroken, broken, kills, *options = sys.argv[1:]
    common = ["finetune", "--model", model, "--dataset", dataset, *options, "--out"]
    rng = random.Random(int(kills))
    killed = sum(broken_off([*common, broken], Path(broken) / "training.csv", rng) for _ in range(int(kills)))
    children = [attempt([*common, out]) for out in (broken, unbroken)]
    print(f"killed {killed} times")
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
