"""A second extension in Automatic1111 and Forge: it sees each run's x, and begins runs from noise that it is given.

What our mitigations do to a run is done here once more, by other means: noise goes in before the host has scaled it, and
guidance is late because the negative prompt stands in the prompt's place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from webui_server import WebUIServer

SOURCE = """
import modules.shared as shared
from modules import script_callbacks, scripts

known = {}  # what the test wants
seen = []  # (x of the evaluation by image in the sampler's scale, its sigma, whether it is by timesteps)


class Onlooker(scripts.Script):
    def title(self):
        return "Onlooker"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process_before_every_sampling(self, p, *args, x=None, **kwargs):
        if known.get("again"):
            (before, _, by_timesteps), (after, *_) = seen[:2]
            x += (after - before) / (1 if by_timesteps else p.sampler.get_sigmas(p, p.steps)[0])


def evaluated(params):
    forge, by_timesteps = "forge_objects" in dir(shared.sd_model), type(params.denoiser).__name__ == "CFGDenoiserTimesteps"
    images = (params.text_uncond["crossattn"] if isinstance(params.text_uncond, dict) else params.text_uncond).shape[0]
    x, sigma = params.x[-images:].clone(), float(params.sigma[0])
    if by_timesteps and not forge:
        alpha = float(shared.sd_model.alphas_cumprod[int(sigma)])
        sigma = ((1 - alpha) / alpha) ** 0.5
    if by_timesteps and forge:
        x = x / (1 + sigma**2) ** 0.5
    if known.get("record"):
        seen.append((x, sigma, by_timesteps))
    if "late" in known and sigma > known["late"] * known.setdefault("first", sigma):
        params.text_cond = params.text_uncond


def routes(demo, app):
    @app.post("/onlooker")
    def wanted(given: dict):
        known.clear()
        known.update(given)
        if given.get("record"):
            seen.clear()

script_callbacks.on_cfg_denoiser(evaluated)
script_callbacks.on_app_started(routes)
"""


def write(folder: Path) -> Path:
    """The extension's folder, below this one."""
    scripts = folder / "onlooker" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "onlooker.py").write_text(SOURCE, encoding="utf-8")
    return scripts.parent


def want(server: WebUIServer, **wanted: Any) -> None:
    """``record=True``: keep each x from now on. ``again=True``: begin from the noise that the recorded run began with
    the second time. ``late=share``: no guidance above this share of the first sigma. Nothing of it: look on.
    """
    server.post_json("/onlooker", wanted)
