"""Train where one rank cannot decode what it sampled: RANK RECIPE ..."""

import os
import sys

from ditmoe_ds import train
from ditmoe_ds.ending import end
from ditmoe_ds.evaluation import during_training

rank, *rest = sys.argv[1:]


def decode(*_):
    raise MemoryError("no memory left")


if os.environ["RANK"] == rank:
    during_training.decode = decode
end(train.main(rest))
