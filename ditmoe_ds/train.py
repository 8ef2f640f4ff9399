"""Train from a recipe: ``deepspeed --module ditmoe_ds.train RECIPE.yaml [key=value ...]``; also under torchrun and srun."""

import os
import sys
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ditmoe_ds.ending import end
from ditmoe_ds.training.interruption import Interruption
from ditmoe_ds.training.output import outlive_readers
from ditmoe_ds.training.startup import Startup


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 when done or interrupted (then ``interrupted.json`` is in the run directory), 2 after one line about
    a user's mistake."""
    arguments = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank")]
    if any(argument.startswith("dry_run=") for argument in arguments):
        from ditmoe_ds.planning.dry_run import main as dry_run

        return dry_run(arguments) if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0 else 0
    outlive_readers()
    startup, interruption = Startup(), Interruption()  # before the long imports: a signal may come that early
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not the user's
    from ditmoe_ds.distributed.lookout import Lookout
    from ditmoe_ds.distributed.topology import World, agreed, alike, decided, on_all_ranks
    from ditmoe_ds.launching.facts import old_locks
    from ditmoe_ds.source import source
    from ditmoe_ds.training.hub import fetched
    from ditmoe_ds.training.plan import ask, read_plan
    from ditmoe_ds.training.recipe import read_recipe

    startup.lap("import")

    def train(world: World) -> None:
        with Lookout(world) as lookout:
            startup.lap("join")
            for lock in old_locks() if world.local_rank == 0 else ():
                print(f"DeepSpeed waits for {lock} when it compiles; if no other process builds its extensions, remove it", flush=True)
            asked = decided(lambda: ask(read_recipe(arguments)))
            plan = agreed(partial(read_plan, arguments, world.size, asked, slice(world.rank, None, world.size)))
            del asked  # it may have a manifest of 50 MB
            ours = dict(recipe=asdict(plan.recipe), data_sha256=plan.data_digest(), deepspeed=plan.ds_config, processes=plan.begun_on)
            ours["weights"] = plan.weights.description if plan.weights else {}
            code = source() if world.local_rank == 0 else {}  # git is slow on a file server, and not everywhere
            alike(ours | {key: value for key, value in code.items() if value})
            lookout.stacks = Path(plan.recipe.run_dir) / "stacks"
            from ditmoe_ds.training.trainer import Callback, Trainer

            callbacks: list[Callback] = [startup, lookout]
            if plan.recipe.train.fd_every:
                from ditmoe_ds.evaluation.during_training import FrechetDistance

                callbacks.append(fetched(world, lambda: FrechetDistance(plan, world.device)))
            trainer = Trainer(plan, world, interruption, callbacks)
            lookout.before_end = trainer.saver.wait
            startup.lap("build")
            trainer.run()

    return on_all_ranks(train)


if __name__ == "__main__":
    end(main())
