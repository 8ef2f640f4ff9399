"""Train from a recipe: ``deepspeed --module ditmoe_ds.train RECIPE.yaml [key=value ...]``; also under torchrun and srun."""

import os
import sys
import warnings


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line about a user's mistake."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not the user's
    from ditmoe_ds.distributed.topology import AgreedError, agreed, join, leave
    from ditmoe_ds.errors import UserError
    from ditmoe_ds.training.recipe import read_plan

    arguments = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank")]
    world = join()
    code = 0
    try:
        plan = agreed(lambda: read_plan(arguments, world.size))
        from ditmoe_ds.training.trainer import Trainer

        Trainer(plan, world).run()
    except AgreedError as error:
        code = 2
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
    except UserError as error:
        # the others do not know and may be waiting for this rank: leave without them, the launcher ends the job
        print(f"error on rank {world.rank}: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
