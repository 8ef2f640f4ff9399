"""DeepSpeed's own settings: the file that a recipe names, and what in it is the recipe's or must stay as it is."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from packaging.version import Version
from pydantic import ValidationError

from ditmoe_ds.distributed.topology import ParallelConfig
from ditmoe_ds.errors import ConfigError

SUPPORTED = (Version("0.19.8"), Version("0.20"))
"""DeepSpeed from the first and below the second: older releases apply gradients that are not finite at ZeRO 1 to 3, newer are untested."""

OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.global_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.optimizer.grad_clip",
    "optimizer": "train.optimizer",
    "scheduler": "train.optimizer.warmup_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
}
"""DeepSpeed settings that the recipe owns, and where."""

FIXED = {
    "zero_optimization.round_robin_gradients": (False, "DeepSpeed then misreports where a weight's master lies: wrong ones are saved"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "what stays on the GPU has an optimizer of its own, whose state is not saved"),
    "zero_optimization.cpu_offload": (False, "write offload_optimizer, with device cpu"),
    "zero_optimization.cpu_offload_param": (False, "weights on the host were not tried with experts"),
    "zero_optimization.compute_grad_norm": (True, "it tells of gradients that are not finite"),
    "zero_optimization.zenflow": (None, "its optimizer keeps state of its own, which is not saved"),
    "managed_gradient_accumulation": (True, "the optimizer would step after every micro-batch"),
    "gradient_allreduce_op": ("mean", "the gradient, so clipping, would depend on the number of processes"),
    "prescale_gradients": (False, "DeepSpeed's stages 2 and 3 cannot"),
    "zero_optimization.offload_param.device": ("none", "weights on the host were not tried with experts"),
    "zero_optimization.contiguous_gradients": (True, "DeepSpeed has no other way with experts"),
    "zero_optimization.reduce_scatter": (True, "DeepSpeed has no other way with experts"),
    "zero_optimization.stage3_module_granularity_threshold": (0, "weights are gathered by layer here"),
    "zero_optimization.leaf_module": (None, "weights are gathered by layer here"),
    "zero_optimization.stage3_allgather_sequential": (False, "weights are gathered by layer here"),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": (False, "weights are gathered by layer here"),
    "zero_optimization.zero_quantized_weights": (False, "weights travel as they are here"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "weights travel as they are here"),
    "zero_optimization.zero_hpz_partition_size": (1, "a second partition in the node is not saved, nor tried"),
    "zero_optimization.zero_quantized_gradients": (False, "DeepSpeed has no quantized gradients with experts"),
    "torch_autocast.enabled": (False, "train.precision says what is computed in"),
    "sequence_parallel_size": (1, "no image is divided among ranks here"),
}
"""DeepSpeed settings that have to stay as they are here, and why."""

ALIASES = {name: field.alias for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}
"""Of settings of ZeRO that have two names, the one that is used here, by the other."""


def read_ds_config(parallel: ParallelConfig) -> dict[str, Any]:
    """Read the DeepSpeed file that the recipe names.

    Raises:
        ConfigError: no such file, invalid JSON, another ZeRO stage than the recipe's, or a setting the recipe owns.
    """
    if not SUPPORTED[0] <= Version(deepspeed.__version__) < SUPPORTED[1]:
        raise ConfigError(
            "deepspeed",
            deepspeed.__version__,
            f"this code overrides DeepSpeed internals; install {SUPPORTED[0]} <= deepspeed < {SUPPORTED[1]}",
        )
    named = Path(parallel.deepspeed.replace("{zero_stage}", str(parallel.zero_stage)))
    wrong = partial(ConfigError, "parallel.deepspeed", str(named))
    path = next((p for p in (named, Path(__file__).parents[2] / named) if p.is_file()), None)
    if path is None:
        raise wrong("no such file here or beside the installed package")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise wrong(f"not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise wrong("no JSON object of DeepSpeed's settings")
    for key, value in config.items():
        if key in OWNED:
            raise wrong(f"remove {key!r}; the recipe sets it as {OWNED[key]}")
        if key in ("zero_optimization", "data_types", "torch_autocast") and not isinstance(value, dict | None):
            raise wrong(f"{key}={json.dumps(value)}: holds settings, in braces")
    zero = config.get("zero_optimization") or {}  # both names of one setting are left for DeepSpeed to refuse
    config["zero_optimization"] = {key if (name := ALIASES.get(key, key)) in zero else name: value for key, value in zero.items()}
    stage = _setting(config, "zero_optimization.stage", 0)
    if stage != parallel.zero_stage:
        raise ConfigError("parallel.zero_stage", parallel.zero_stage, f"{named} says stage {stage}; make them agree")
    for key, (allowed, reason) in FIXED.items():
        if (value := _setting(config, key, allowed)) not in (allowed, None):
            raise wrong(f"{key}={json.dumps(value)}: {reason}; remove it")
    if _setting(config, "zero_optimization.offload_optimizer.device", None) == "nvme":
        raise wrong('zero_optimization.offload_optimizer.device="nvme": what lies there is not saved; write cpu')
    if stage < 2 and _setting(config, "data_types.grad_accum_dtype", None):
        raise wrong(f"data_types.grad_accum_dtype: DeepSpeed's stage {stage} cannot; remove it, or take stage 2")
    try:
        zero_settings(config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise wrong(f"{place}={json.dumps(first['input'])}: {first['msg']}") from None
    except AssertionError as error:  # an old name of a setting is there beside the new one
        raise wrong(str(error)) from None
    return config


def zero_settings(config: dict[str, Any]) -> DeepSpeedZeroConfig:
    """The ZeRO section as DeepSpeed reads it, with its defaults."""
    return DeepSpeedZeroConfig(**(config.get("zero_optimization") or {}))


def offloads(ds_config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lies in host memory."""
    return _setting(ds_config, "zero_optimization.offload_optimizer.device", "none") != "none"


def _setting(config: dict[str, Any], key: str, default: Any) -> Any:
    *sections, leaf = key.split(".")
    for section in sections:
        config = config.get(section) or {}
        if not isinstance(config, dict):
            return default  # not valid, as DeepSpeed will say
    return config.get(leaf, default)
