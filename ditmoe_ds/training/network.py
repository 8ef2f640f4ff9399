"""The network of a rank."""

from ditmoe_ds.models.dit import DiT
from ditmoe_ds.models.tensor_plan import tensor_plan
from ditmoe_ds.training.recipe import Recipe


def arrange(model: DiT, recipe: Recipe) -> None:
    """Make a whole network, on the meta device, into the one that a rank trains: cut by tensor parallelism, and recomputing what the recipe
    says."""
    model.checkpoint_activations = recipe.train.activation_checkpointing
    if recipe.parallel.tensor > 1:
        from ditmoe_ds.distributed import tensor_parallel  # megatron-core, which only this needs

        tensor_parallel.cut(model, *tensor_plan(model))
