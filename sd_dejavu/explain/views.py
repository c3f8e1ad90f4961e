"""All views through one door, for front ends that let the user choose."""

from __future__ import annotations

from ..core.conditioning import Conditioning
from ..core.denoiser import Model
from ..core.gradients import with_gradients
from ..core.sampling import predict
from ..core.verdict import Explanation, View
from ..run.measure import Measurement, baseline_of, start_of_run
from . import confirmed_gradient, input_gradient, leave_one_out, output_gradient


def default_view(conditioning: Conditioning) -> View:
    """The gradient through the encoder, confirmed, wherever the encoder is at hand."""
    return "confirmed gradient" if conditioning.reencoding else "output gradient"


def explain(
    model: Model, conditioning: Conditioning, wanted: Measurement, view: View | None = None, batch_size: int = 32
) -> Explanation:
    """Explain one prompt at the first step of the run that ``wanted`` describes. Raises ValueError without words."""
    view = view or default_view(conditioning)
    unconditional = baseline_of(model, wanted)
    x, sigma = start_of_run(model, wanted)
    if view == "leave one out":
        noise, level = model.noise(wanted.seed, wanted.images), float(sigma[0])
        return leave_one_out.explain(model, model.encode, conditioning, unconditional, noise, level, batch_size)
    method = {
        "confirmed gradient": confirmed_gradient,
        "input gradient": input_gradient,
        "output gradient": output_gradient,
    }[view]

    def work() -> Explanation:
        at, levels = x.clone(), sigma.clone()  # a host in inference mode made tensors that cannot be differentiated
        base = predict(model, at, levels, unconditional, batch_size)
        found: Explanation = method.explain(model, at, levels, conditioning, base, batch_size)
        return found

    return with_gradients(model, work)
