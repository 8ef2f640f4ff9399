"""The average's formula; that it is sharded, saved and resumed is seen in test_run.py."""

from types import SimpleNamespace

import pytest
import torch

from ditmoe_ds.distributed.ema import EMA, EMAConfig


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_decay_every_and_warmup(every, warmup):
    master = torch.zeros(4)
    ema = EMA([SimpleNamespace(master=master)], EMAConfig(decays=(0.9, 0.5), every=every, warmup=warmup))
    wanted = {0.9: 0.0, 0.5: 0.0}
    for step in range(1, 8):
        master.fill_(step)
        ema.update()
        if step % every == 0:
            for decay in wanted:
                now = min(decay, step / (9 + step)) if warmup else decay
                wanted[decay] = now**every * wanted[decay] + (1 - now**every) * step
        for decay, value in wanted.items():
            assert ema.averages[f"ema_{decay}"][0].tolist() == pytest.approx([value] * 4)
