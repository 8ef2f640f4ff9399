"""Train where one rank cannot decode what it sampled, or cannot read a held-out sample: RANK decode|read RECIPE ..."""

import os
import sys

from ditmoe_ds import train
from ditmoe_ds.ending import end
from ditmoe_ds.errors import DataError
from ditmoe_ds.evaluation import during_training
from ditmoe_ds.training import callbacks

rank, what, *rest = sys.argv[1:]


def decode(*_):
    raise MemoryError("no memory left")


def read(*_):
    raise DataError("val-000003.tar: cannot be read (Stale file handle)")


if os.environ["RANK"] == rank and what == "decode":
    during_training.decode = callbacks.decode = decode
elif os.environ["RANK"] == rank:
    callbacks.Validation._losses = read
end(train.main(rest))
