"""ComfyUI: its models as a denoiser for the core, a monitor that watches its samplers, and work before sampling.

Nothing here outlives a run: the monitor works through wrappers that the host itself registers on a clone of the
model, and gradients are taken through aliases of the weights that are put back before anything else runs.
"""

from .audit import audit_lora
from .before_sampling import calibrate, examine, mitigate
from .guidance import anti_memorization, transition
from .initial_noise import adjust_noise
from .model import with_model
from .monitor import Monitor
from .page import LiveReport, add_routes, keep_in_image, link_encoders_of_prompts, tell, wait_until_told
from .repair import repair_lora
from .text import conditioning_of, encode_text
from .training import HostFilter

__all__ = [
    "HostFilter",
    "LiveReport",
    "Monitor",
    "add_routes",
    "adjust_noise",
    "anti_memorization",
    "audit_lora",
    "calibrate",
    "conditioning_of",
    "encode_text",
    "examine",
    "keep_in_image",
    "link_encoders_of_prompts",
    "mitigate",
    "repair_lora",
    "tell",
    "transition",
    "wait_until_told",
    "with_model",
]
