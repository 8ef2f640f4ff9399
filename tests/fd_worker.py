"""Train where one rank cannot decode what it sampled, read a held-out sample, or compute its loss: RANK decode|read|loss RECIPE ..."""

import os
import sys

from ditmoe_ds import train
from ditmoe_ds.ending import end
from ditmoe_ds.errors import DataError
from ditmoe_ds.evaluation import during_training
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.training import callbacks

rank, what, *rest = sys.argv[1:]


def decode(*_):
    raise MemoryError("no memory left")


def fail(*_):
    raise DataError("val-000003.tar: cannot be read (Stale file handle)")


if os.environ["RANK"] == rank:
    if what == "decode":
        during_training.decode = callbacks.decode = decode
    elif what == "read":
        LatentDataset.batch = fail
    else:
        callbacks.Validation._losses = fail
end(train.main(rest))
