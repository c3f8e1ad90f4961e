"""What the monitor takes of the sampling thread in a real ComfyUI: milliseconds a step and a run, and device reads.

The bundled model draws in a process of the host's own Python; time spent in the host inside of our hooks is not ours
and is taken off. On a CPU the time is the thread's own, so that other processes do not count. The verdict is what its
node makes of a run, but for the host's part. A device read is whatever would wait for a card: asking a tensor that the
host made, or that was made from one, for its values. On a CPU nothing waits, so they are counted where they are asked
for.

    python benchmarks/monitor_cost.py [--steps 20] [--runs 5] [--nulls 100000] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "hosts"))


def measured(install: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What :func:`inside` finds in a process of this install."""
    python = next(p for p in (install / "venv/bin/python", install / "venv/Scripts/python.exe") if p.is_file())
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [python, __file__, "--inside", install, "--json", found, "--wanted", json.dumps(wanted)]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
        if ended.returncode:
            raise SystemExit(ended.stderr)
        return dict(json.loads(found.read_text(encoding="utf-8")))


# ------------------------------------------------------------------------------------- in the host


def inside(install: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Runs with and without a monitor; in the host's own Python."""
    sys.path.remove(str(ROOT / "tests" / "hosts"))
    sys.path.insert(0, str(install))
    sys.path += [str(ROOT), str(ROOT / "tests" / "hosts")]  # last: our folder of nodes must not hide the host's module
    sys.argv = ["main.py", *wanted["options"]]
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("utils.extra_config")  # first, as in the host's main module: another 'utils' may come
    import comfy.sample
    import server
    import torch
    from comfy_execution.utils import CurrentNodeContext
    from device_reads import DeviceReads
    from hook_clock import HookClock

    from sd_dejavu.calibration.profile import Null, Profile
    from sd_dejavu.demo import bundled
    from sd_dejavu.hosts.comfyui import LiveReport, Monitor, encode_text, wait_until_told
    from sd_dejavu.hosts.comfyui.demo import load_demo_model
    from sd_dejavu.report.word_image import word_image
    from sd_dejavu.run.monitoring import Monitoring

    torch.set_num_threads(1)
    prompt = bundled.held_out_memorised(("hard",))[0]
    sent: list[Any] = []
    host = SimpleNamespace(client_id="page", sockets={}, send_sync=lambda *message: sent.append(message))
    host.prompt_queue = SimpleNamespace(get_current_queue_volatile=lambda: ([], []))
    server.PromptServer.instance = host

    @contextmanager
    def executing() -> Iterator[None]:
        with torch.inference_mode(), CurrentNodeContext("prompt", "sampler"):
            yield

    with executing():
        model, clip, _ = load_demo_model()
        positive, negative = encode_text(clip, prompt), encode_text(clip, "")
        channels = model.get_model_object("latent_format").latent_channels
        latent = torch.zeros(1, channels, wanted["side"] // 4, wanted["side"] // 4)

    def draw(patcher: Any, seed: int) -> torch.Tensor:
        noise = comfy.sample.prepare_noise(latent, seed)
        given = (wanted["steps"], 7.0, wanted["sampler"], "normal", positive, negative, latent)
        drawn: torch.Tensor = comfy.sample.sample(patcher, noise, *given, seed=seed, disable_pbar=True)
        return drawn

    def watched(profile: Profile | None, explain: str) -> tuple[Monitor, Any]:
        monitor = Monitor(Monitoring(explain=explain), profile, on_progress=LiveReport("monitor"))  # type: ignore[arg-type]
        return monitor, monitor.attach(model)

    with executing():
        monitor, patcher = watched(None, "never")
        draw(patcher, 0)  # warm up, and see the setting
        setting = monitor.runs[-1].state.setting
        assert setting is not None
        # So high that no run is flagged: gradients have another price, and nobody pays it for an ordinary prompt.
        nulls = tuple(Null("sentence", {"first step": (1e6 + n,)}) for n in range(wanted["nulls"]))
        profile = Profile(setting, nulls)
        profile.null_scores("first step", 1)
        found: dict[str, Any] = {"model_steps": wanted["steps"], "nulls": wanted["nulls"]}
        for page in ("closed", "open"):
            host.sockets = {"page": object()} if page == "open" else {}
            steps, runs, verdicts, equal, reads = [], [], [], True, set()
            for seed in range(wanted["runs"]):
                plain = draw(model, seed)
                monitor, patcher = watched(profile, "flagged")
                clock = HookClock(wall=not wanted["options"])
                clock.watch(monitor)
                equal &= bool(torch.equal(draw(patcher, seed), plain))
                steps += clock.steps
                runs.append(clock.hooks)
                began = clock.now()
                report = monitor.report_of(plain)
                report.as_json()
                word_image(report.verdicts[0], report.state.notes)
                verdicts.append(clock.now() - began)
                wait_until_told()
                monitor, patcher = watched(profile, "flagged")
                with DeviceReads(monitor) as counted:
                    draw(patcher, seed)
                reads |= counted.places
            found[page] = {
                "hooks_ms_a_step": round(1000 * statistics.median(steps), 4),
                "hooks_ms_a_run": round(1000 * statistics.median(runs), 3),
                "verdict_ms": round(1000 * statistics.median(verdicts), 3),
                "device_reads": sorted(reads),
                "same_image": equal,
                "score": report.verdicts[0].score,
                "p_value": report.verdicts[0].p_value,
            }
        found["reports_sent"] = len(sent)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--nulls", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--on-the-card", action="store_true", help="leave out the host's --cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--wanted", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        given.json.write_text(json.dumps(inside(given.inside, json.loads(given.wanted))), encoding="utf-8")
        return
    from comfyui_server import find_install, version

    install = find_install()
    if install is None:
        raise SystemExit("ComfyUI was not found: install it where $DEJAVU_COMFYUI says")
    wanted = {name: getattr(given, name) for name in ("steps", "runs", "nulls", "side", "sampler")}
    found = measured(install, {**wanted, "options": [] if given.on_the_card else ["--cpu"]})
    text = json.dumps({"comfyui": version(install), **found}, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
