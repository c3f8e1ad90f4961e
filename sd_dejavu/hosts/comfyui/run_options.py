"""What other packs and the host put into the options of a run, beside what we put there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from .api import GuidanceArguments, Options

_POST_CFG = "sampler_post_cfg_function"
AGAIN = "dejavu_again"  # key in the options of an evaluation that a monitor has made again, otherwise
_CACHE = "easycache"  # of the host's EasyCache and LazyCache, for their state and for their wrappers

Function = Callable[[GuidanceArguments], Tensor]


@contextmanager
def in_guidance(options: Options, first: Sequence[Function] = (), last: Sequence[Function] = ()) -> Iterator[None]:
    """While open, these take part in guidance; then they alone are taken out, whatever others did to the list since.

    Where another pack left something that is no list, it stays for the host to refuse.
    """
    own = [*first, *last]
    if isinstance(options.get(_POST_CFG, []), list):
        options[_POST_CFG] = [*first, *options.get(_POST_CFG, []), *last]
    try:
        yield
    finally:
        found = options.get(_POST_CFG)
        if isinstance(found, list):  # with ==, what others left there might not compare
            options[_POST_CFG] = [function for function in found if all(function is not mine for mine in own)]


def uncached(options: Options) -> Options:
    """The options of a run for an evaluation of our own, which the host's cache between steps shall not see.

    It would keep what each conditioning gave, with the graph of its gradients, and take our evaluations for steps.
    """
    transformer = options.get("transformer_options", {})
    if _CACHE not in transformer:
        return options
    wrappers = {
        kind: {key: functions for key, functions in known.items() if key != _CACHE}
        for kind, known in transformer.get("wrappers", {}).items()
    }
    return {**options, "transformer_options": {**transformer, "wrappers": wrappers}}


def forget_steps(options: Options) -> None:
    """Let the host's cache between steps begin anew: it follows the conditioning that it saw first."""
    cache = options.get("transformer_options", {}).get(_CACHE)
    if cache is not None:
        cache.reset()
        cache.relative_transformation_rate = (
            None  # as in a new one: with the 0 of a reset, all further steps are skipped
        )
