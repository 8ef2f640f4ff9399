"""Models by hub id: a hub answers a site only so many times in an hour, which a thousand ranks would use up at each start."""

from collections.abc import Callable
from typing import TypeVar

from ditmoe_ds.distributed.topology import World, in_turns
from ditmoe_ds.errors import UserError

T = TypeVar("T")


def fetched(world: World, load: Callable[[], T]) -> T:
    """What ``load`` returns on each rank: the first of each host asks the hub, and the others take what is then in the host's cache.
    Raises as ``agreed``. Collective."""
    return in_turns(world, load, lambda: _from_cache(load))


def _from_cache(load: Callable[[], T]) -> T:
    """As ``load``, which asks the hub only if something is not in the cache, as where each rank has one of its own."""
    from huggingface_hub import constants

    asks_none = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True  # all libraries of Hugging Face look it up before they ask
    try:
        return load()
    except UserError:
        pass
    finally:
        constants.HF_HUB_OFFLINE = asks_none
    return load()
