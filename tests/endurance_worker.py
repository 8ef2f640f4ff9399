"""Train, and note now and then what this process and its loaders hold: EVERY NOTES RECIPE ... Each rank writes NOTES.RANK."""

import ctypes
import gc
import json
import os
import sys
import threading

import psutil

from ditmoe_ds import train
from ditmoe_ds.ending import end
from ditmoe_ds.training import trainer

every, notes, *rest = sys.argv[1:]
real_step = trainer.Trainer.train_step


class Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    ]


def allocated():
    """Bytes that malloc has given out. The process has more, of whose pages only parts are in use."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo
    found = ask()
    return found.uordblks + found.hblkhd


def train_step(self):
    record = real_step(self)
    if record["step"] % int(every) == 0:
        gc.collect()
        me = psutil.Process()
        children = me.children(recursive=True)
        held = dict(
            megabytes=allocated() / 1e6,
            their_megabytes=sum(child.memory_full_info().uss for child in children) / 1e6,
            children=len(children),
            files=me.num_fds(),
            their_files=sum(child.num_fds() for child in children),
            threads=threading.active_count(),
            objects=len(gc.get_objects()),
            shared_memory=len(os.listdir("/dev/shm")),
        )
        with open(f"{notes}.{self.world.rank}", "a") as file:
            file.write(json.dumps(held) + "\n")
    return record


trainer.Trainer.train_step = train_step
end(train.main(rest))
