"""Train with a lookout of little patience: main(["RANK", "STEP", recipe, ...]) lets that rank raise an error after that step."""

import sys

from ditmoe_ds import train
from ditmoe_ds.distributed import lookout
from ditmoe_ds.training import trainer

lookout.BEAT, lookout.SILENCE = 0.5, 4.0
rank, step, *rest = sys.argv[1:]
real_step = trainer.Trainer.train_step


def train_step(self):
    if str(self.world.rank) == rank and str(self.step) == step:
        raise RuntimeError("the card fell off the bus")
    return real_step(self)


trainer.Trainer.train_step = train_step
sys.exit(train.main(rest))
