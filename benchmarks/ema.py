"""What does updating the averages only every n-th step change? One training, several averages side by side.

python benchmarks/ema.py [RECIPE] [key=value ...]     (needs the demo's latents: make demo)

Every average starts with the same weights and sees the same run. Its validation loss is what the trainer reports for EMA;
its distance is that to the average updated at every step, as a share of that one's distance from the raw weights.
"""

import argparse
import json
import sys
import tempfile
import time

import torch

from ditmoe_ds.distributed.ema import EMA, EMAConfig, kind
from ditmoe_ds.distributed.topology import join, leave
from ditmoe_ds.training.callbacks import Validation
from ditmoe_ds.training.plan import read_plan
from ditmoe_ds.training.trainer import Trainer

KINDS, EVERY = ((0.9, False), (0.99, False), (0.9999, True)), (1, 4, 16)
"""Decays, with and without warm-up; how often they are updated."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    alone = ["parallel.expert=1", "parallel.zero_stage=2", "checkpoint.every=1000000", "train.sample_every=0", "train.validate_every=1"]
    with tempfile.TemporaryDirectory() as run_dir:
        world = join()
        plan = read_plan([arguments.recipe, *alone, f"run_dir={run_dir}", *arguments.overrides], world.size)
        trainer = Trainer(plan, world)
        averages = {(d, warm, n): EMA(trainer.shards, EMAConfig((d,), every=n, warmup=warm)) for d, warm in KINDS for n in EVERY}
        seconds = dict.fromkeys(averages, 0.0)
        steps = plan.recipe.train.steps
        trainer.engine.train()
        while trainer.step < steps:
            record = trainer.train_step()
            for key, ema in averages.items():
                start = time.perf_counter()
                ema.update()
                seconds[key] += time.perf_counter() - start
            if trainer.step % 20 == 0:
                print(f"step {trainer.step}/{steps}  loss {record['loss']:.4f}", file=sys.stderr, flush=True)
        trainer.loader.close()

        raw = torch.cat([shard.master for shard in trainer.shards])
        rows = [dict(weights="raw", val_loss=validation_loss(trainer, EMA(trainer.shards, EMAConfig(decays=(0.0,)))))]
        for (decay, warm, every), ema in averages.items():
            flat, base = (torch.cat(e.averages[kind(decay)]) for e in (ema, averages[decay, warm, 1]))
            distance = ((flat - base).norm() / (base - raw).norm()).item()
            rows.append(
                dict(
                    weights=f"EMA {decay}{' with warm-up' * warm}, every {every}",
                    val_loss=validation_loss(trainer, ema),
                    distance=round(distance, 4),
                    ms_per_step=round(1000 * seconds[decay, warm, every] / steps, 2),
                )
            )
        parameters = raw.numel()
        leave()
    print(json.dumps(dict(parameters=parameters, steps=steps, torch=torch.__version__, rows=rows), indent=1))


def validation_loss(trainer: Trainer, ema: EMA) -> float:
    trainer.ema = ema
    record: dict[str, float] = {}
    Validation(trainer.plan)(trainer, record)
    return round(record["val_loss"], 5)


if __name__ == "__main__":
    main()
