"""How long it takes until the first step is done, and where the time goes."""

import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # this module is imported before torch, for which listening for signals must not wait
    from ditmoe_ds.training.callbacks import Record
    from ditmoe_ds.training.trainer import Trainer


class Startup:
    """Seconds by part, from the start of the process on. A callback: the first step ends it, and rank 0 prints it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.done = False
        self._last = psutil.Process().create_time()

    def lap(self, part: str) -> None:
        now = time.time()
        self.seconds[part], self._last = now - self._last, now

    def __call__(self, trainer: "Trainer", record: "Record") -> None:
        if self.done:
            return
        self.lap("first step")
        self.seconds["first batch"] = record["data_wait"] * trainer.plan.recipe.train.global_batch / record["images_per_s"]
        self.seconds["first step"] -= self.seconds["first batch"]
        self.done = True
        if trainer.world.rank == 0:
            parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())
            print(f"start-up {sum(self.seconds.values()):.1f} s: {parts}", flush=True)
