"""A step's micro-batches, loaded and copied to the device while the step before is computed."""

import time
from collections.abc import Iterator

import torch
from torch.utils._pytree import tree_leaves

from ditmoe_ds.errors import UserError
from ditmoe_ds.latents.condition import Conditioner
from ditmoe_ds.training.step import Prepared


class Ahead:
    """Loads the next step's micro-batches while this step computes; on a GPU, copies them and encodes captions on a stream of its own.

    Args:
        loader: of one rank's micro-batches.
        accumulation: micro-batches of a step.
    """

    def __init__(self, loader: Iterator[Prepared], accumulation: int, device: torch.device, conditioner: Conditioner):
        self.loader, self.accumulation, self.device, self.conditioner = loader, accumulation, device, conditioner
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the encoder's weights may still be on their way
        self.ready: list[Prepared] | UserError | None = None
        self.waited = 0.0
        """Seconds spent waiting for samples since the last ``take``."""

    def begin(self) -> None:
        """Start to load the next step's micro-batches. ``take`` and ``check`` raise what fails here, so that the current step is still
        finished."""
        start = time.monotonic()
        try:
            loaded = [next(self.loader) for _ in range(self.accumulation)]
        except UserError as error:
            self.ready = error
            return
        self.waited += time.monotonic() - start
        with torch.cuda.stream(self.stream):
            self.ready = [batch.to(self.device, self.conditioner) for batch in loaded]

    @property
    def failed(self) -> bool:
        """Whether ``begin`` could not load what is next."""
        return isinstance(self.ready, UserError)

    def check(self) -> None:
        """Raise what failed in ``begin``."""
        if isinstance(self.ready, UserError):
            raise self.ready

    def take(self) -> list[Prepared]:
        """The next step's micro-batches, for use on the current stream.

        Raises:
            UserError: as the loader's.
        """
        self.waited = 0.0
        if self.ready is None:
            self.begin()
        self.check()
        batches, self.ready = self.ready, None
        assert isinstance(batches, list)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for leaf in tree_leaves(batches):
                if isinstance(leaf, torch.Tensor) and leaf.is_cuda:  # indices stay on the host
                    leaf.record_stream(current)
        return batches
