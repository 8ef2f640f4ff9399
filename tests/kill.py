"""Train, and have one rank killed (SIGKILL) some seconds after its process begins to save: main([rank, step, seconds, recipe, ...])."""

import os
import signal
import threading

from ditmoe_ds import train
from ditmoe_ds.distributed.checkpoint import Saver

real_save = Saver.save


def main(arguments):
    rank, step, seconds, *rest = arguments

    def save(self, at, *others):
        if os.environ["RANK"] == rank and at > int(step) and not hasattr(self, "doomed"):
            self.doomed = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL))
            self.doomed.start()
        real_save(self, at, *others)

    Saver.save = save
    return train.main(rest)
