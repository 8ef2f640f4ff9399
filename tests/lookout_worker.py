"""Train with a lookout of little patience and a slow disk. RANK STEP ERROR RECIPE ...: that rank raises that error (a key of ERRORS) after
that step, or sleeps (hang)."""

import os
import sys
import time

from ditmoe_ds import train
from ditmoe_ds.distributed import checkpoint, lookout
from ditmoe_ds.ending import end
from ditmoe_ds.errors import DataError
from ditmoe_ds.training import trainer

ERRORS = {
    "failure": RuntimeError("the card fell off the bus"),
    "mistake": DataError("shard.tar: ends early"),
    "long": DataError("members " + "x" * 99_999),
}
lookout.BEAT, lookout.SILENCE, lookout.GATHER = 1.5, 6.0, 0.2
rank, step, error, *rest = sys.argv[1:]
real_step = trainer.Trainer.train_step


def train_step(self):
    if str(self.step) == step:  # not before: a start may take as long
        lookout.LONG = float(os.environ.get("LONG", lookout.LONG))
    if str(self.world.rank) == rank and str(self.step) == step:
        if error == "hang":
            time.sleep(1e6)
        raise ERRORS[error]
    return real_step(self)


def slow_write(*arguments):
    time.sleep(float(os.environ.get("SLOW_DISK", "0")))
    return real_write(*arguments)


trainer.Trainer.train_step = train_step
real_write, checkpoint.write = checkpoint.write, slow_write
end(train.main(rest))
