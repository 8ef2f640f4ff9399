"""``ditmoe sample``: a grid of a few images, or many into a folder or npz."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_ds.errors import ConfigError, some
from ditmoe_ds.pipelines.arguments import (
    LONG_PATIENCE,
    add_memory,
    add_opening,
    check_can_be_guided,
    check_guidance,
    check_least,
    make_folder,
    open_named,
)

if TYPE_CHECKING:
    from ditmoe_ds.distributed.topology import ExpertGroup
    from ditmoe_ds.pipelines.run import Run

SAMPLERS = "euler", "heun", "dpm++", "unipc", "ddim", "ddpm"
PICTURES = ".png", ".jpg", ".jpeg", ".webp"


def add_commands(commands: Any) -> None:
    """Add ``sample`` to ``ditmoe``'s subparsers."""
    sample = commands.add_parser("sample", help="sample images from a run's EMA weights, or from a weights folder")
    sample.set_defaults(command=_sample)
    sample.add_argument("run_dir", help="a run directory, a checkpoint folder or a weights folder")
    sample.add_argument("--out", default="grid.png", help="picture to write; with --num a folder for PNGs, or FILE.npz in ADM's layout")
    sample.add_argument("--num", type=int, help="number of images of a set, made by any number of processes; continues or extends the set")
    sample.add_argument("--classes", help="class numbers or names, comma-separated; default: class 0, or with --num all classes in turn")
    sample.add_argument("--prompt", action="append", help="for a text-to-image model; repeat the option for several prompts")
    sample.add_argument("--prompts", help="file with one prompt per line")
    sample.add_argument("--per-class", type=int, default=8, help="without --num: images per class or prompt (one row each)")
    sample.add_argument("--size", metavar="HEIGHTxWIDTH", help="size of the images in pixels; default: the most common in training")
    sample.add_argument("--batch", type=int, default=32, help="with --num: images computed together by a GPU; a CPU computes each alone")
    sample.add_argument("--steps", type=int, default=50, help="of the sampler")
    sample.add_argument("--sampler", choices=SAMPLERS, help="default: euler or, if trained with DDPM, ddim")
    sample.add_argument("--guidance", type=float, default=2.0, help="guidance scale; 1 turns guidance off")
    sample.add_argument("--guidance-interval", default="0,1", metavar="LOW,HIGH", help="guide only at times from LOW to HIGH; 1 is noise")
    sample.add_argument("--autoguidance", metavar="RUN", help="guide away from this worse model, not from the model without condition")
    sample.add_argument("--guided-channels", type=int, metavar="N", help="guide only the first N latent channels (DiT's scripts: 3)")
    sample.add_argument("--seed", type=int, default=0, help="of the noise")
    add_opening(sample)
    add_memory(sample)
    sample.add_argument("--compile", action="store_true", help="compile the blocks with torch.compile")
    sample.add_argument("--expert-parallel", type=int, default=1, metavar="N", help="with --num: N processes share one set of experts")


def _sample(arguments: argparse.Namespace) -> int:
    check_least(arguments, per_class=1)
    check_guidance(arguments.guidance)
    return _grid(arguments) if arguments.num is None else _many(arguments)


def _grid(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.distributed.topology import under_srun
    from ditmoe_ds.distributed.weights import of_step
    from ditmoe_ds.latents.images import save_grid

    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or under_srun() or arguments.expert_parallel > 1:
        raise ConfigError("--num", None, "several processes make many images: say how many")
    if Path(arguments.out).suffix.lower() not in PICTURES:
        raise ConfigError("--out", arguments.out, "a picture, FILE.png; many images, by --num, go into a folder or FILE.npz")
    make_folder(Path(arguments.out).parent)
    run, weak = _open(arguments)
    asked = [one for one in _asked(arguments, run, [0]) for _ in range(arguments.per_class)]
    images = run.sample(asked, guidance=arguments.guidance, **_options(arguments, run, weak))
    save_grid(images, Path(arguments.out), columns=arguments.per_class)
    print(f"{len(asked)} images{of_step(run.step)} in {arguments.out}")
    return 0


def _many(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.diffusion.sampling import make_scheduler, scheduled
    from ditmoe_ds.distributed.topology import World, agreed, check_expert_parallel, decided, expert_group, on_all_ranks
    from ditmoe_ds.distributed.weights import locate, of_step, open_weights
    from ditmoe_ds.pipelines.many import Target, sample_many

    def check(world: World) -> None:
        target = Target(Path(arguments.out))
        if target.out.suffix.lower() in PICTURES:
            raise ConfigError("--out", arguments.out, "with --num a folder, or FILE.npz")
        make_folder(target.out if target.out.is_dir() else target.out.parent)
        check_least(arguments, num=1, batch=1)
        for path in filter(None, (arguments.run_dir, arguments.autoguidance)):
            experts = open_weights(path, arguments.weights).description["model"].get("experts", 0)
            check_expert_parallel(arguments.expert_parallel, experts, world.size, key="--expert-parallel")

    def prepare(group: ExpertGroup | None) -> tuple[Run, Run | None, list[Any], dict[str, Any]]:
        run, weak = _open(arguments, group)
        asked = _asked(arguments, run, list(range(run.model.config.num_classes)))
        scheduled(make_scheduler(run.diffusion, arguments.sampler), run.diffusion, arguments.steps)
        assert run.pipeline  # or it says what is missing
        return run, weak, asked, _options(arguments, run, weak)

    def sample(world: World) -> None:
        named = arguments.run_dir, arguments.autoguidance
        arguments.run_dir, arguments.autoguidance = decided(lambda: [path and str(locate(path)) for path in named])
        agreed(lambda: check(world))
        group = expert_group(arguments.expert_parallel) if arguments.expert_parallel > 1 else None
        run, weak, asked, options = agreed(lambda: prepare(group))
        settings = decided(lambda: _describe(arguments, run, weak, asked, options))
        sample_many(
            run,
            world,
            Target(Path(arguments.out)),
            asked,
            arguments.num,
            arguments.batch,
            settings,
            guidance_scale=arguments.guidance,
            **options,
        )
        if world.rank == 0:
            print(f"{arguments.num} images{of_step(run.step)} in {arguments.out}")

    return on_all_ranks(sample, LONG_PATIENCE)


def _open(arguments: argparse.Namespace, group: ExpertGroup | None = None) -> tuple[Run, Run | None]:
    """The run to sample from, and the one to guide away from.

    Raises:
        ConfigError: the two do not go together; and as ``open_run``.
    """
    from ditmoe_ds.distributed.weights import differently_encoded

    if arguments.compile and arguments.offload_experts:
        raise ConfigError("--compile", True, "compiled blocks cannot wait for weights from the host; leave it or --offload-experts out")
    paths = [arguments.run_dir, *filter(None, [arguments.autoguidance])]
    runs = [open_named(arguments, path, group) for path in paths]
    run, weak = runs[0], runs[1] if len(runs) > 1 else None
    if weak:
        pairs = {name: (getattr(run.diffusion, name), getattr(weak.diffusion, name)) for name in ("objective", "time_scale")}
        for name in ("num_classes", "text_width", "in_channels"):
            pairs[name] = getattr(run.model.config, name), getattr(weak.model.config, name)
        differences = [f"{name}: {ours} -> {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
        if difference := next(iter(differences), None) or differently_encoded(run.latents, weak.latents):
            raise ConfigError("--autoguidance", arguments.autoguidance, f"its model was trained otherwise; {difference}")
    if not weak:
        check_can_be_guided(run, arguments.guidance)
    channels = run.model.config.in_channels
    if arguments.guided_channels is not None and not 1 <= arguments.guided_channels <= channels:
        raise ConfigError("--guided-channels", arguments.guided_channels, f"the latents have {channels}")
    if arguments.compile:
        for one in runs:
            one.model.compile_blocks(graphs=one.device.type == "cuda" and arguments.expert_parallel == 1)
    return run, weak


def _options(arguments: argparse.Namespace, run: Run, weak: Run | None) -> dict[str, Any]:
    """Arguments of ``Run.sample`` and ``sample_many``."""
    height, width = _size(arguments, run)
    return dict(
        height=height,
        width=width,
        seed=arguments.seed,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance_interval=_interval(arguments),
        guided_channels=arguments.guided_channels,
        weak_transformer=weak and weak.model,
    )


def _asked(arguments: argparse.Namespace, run: Run, default: list[int]) -> list[Any]:
    """The classes or prompts to sample, whichever the model takes."""
    classes = run.model.config.num_classes
    if not classes:
        if arguments.classes is not None:
            raise ConfigError("--classes", arguments.classes, "this model takes prompts: --prompt")
        return _prompts(arguments)
    for option in ("prompt", "prompts"):
        if given := getattr(arguments, option):
            raise ConfigError(f"--{option}", given, "this model takes classes: --classes")
    names = run.latents.get("class_names") or []
    asked = default if arguments.classes is None else [_class(part.strip(), names) for part in arguments.classes.split(",")]
    if wrong := [label for label in asked if not 0 <= label < classes]:
        raise ConfigError("--classes", wrong[0], f"classes are 0..{classes - 1}")
    return asked


def _class(given: str, names: list[str]) -> int:
    """The number of a class that is given by number or by name."""
    try:
        return int(given)
    except ValueError:
        if given in names:
            return names.index(given)
        known = f"or names: {some(names)}" if names else "for example 0,1,2; these weights know no names"
        raise ConfigError("--classes", given, f"write numbers with commas, {known}") from None


def _prompts(arguments: argparse.Namespace) -> list[str]:
    lines: list[str] = []
    if arguments.prompts:
        try:
            lines = [line.strip() for line in Path(arguments.prompts).read_text().removesuffix("\n").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("--prompts", arguments.prompts, f"not a readable text file ({error})") from None
    if "" in lines:
        raise ConfigError("--prompts", arguments.prompts, f"line {lines.index('') + 1} is empty; every line must be a prompt")
    found = [*(arguments.prompt or []), *lines]
    if not found:
        raise ConfigError("--prompt", None, "this model takes prompts: --prompt, or --prompts FILE")
    return found


def _size(arguments: argparse.Namespace, run: Run) -> tuple[int, int] | tuple[None, None]:
    """Height and width of the images, if they were given."""
    if arguments.size is None:
        return None, None
    sides = arguments.size.split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError("--size", arguments.size, "write HEIGHTxWIDTH in pixels, for example 192x320; 256 is 256x256")
    height, width = map(int, (sides[0], sides[-1]))
    run.pipeline.latent_shape_of(height, width, key="--size")
    return height, width


def _interval(arguments: argparse.Namespace) -> tuple[float, float]:
    try:
        low, high = map(float, arguments.guidance_interval.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ConfigError("--guidance-interval", arguments.guidance_interval, "write LOW,HIGH within 0 and 1, for example 0.1,0.8")
    return low, high


def _describe(arguments: argparse.Namespace, run: Run, weak: Run | None, asked: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """For ``samples.json``: everything that the images depend on, ``options`` of sampling among it."""
    from ditmoe_ds.diffusion.sampling import SCHEDULERS
    from ditmoe_ds.pipelines.run import versions

    if run.model.config.num_classes:
        conditions: dict[str, Any] = dict(classes=asked)
    else:
        conditions = dict(prompts=len(asked), prompts_sha256=hashlib.sha256("\n".join(asked).encode()).hexdigest())
    return dict(
        format="ditmoe-samples/1",
        num=arguments.num,
        **run.identity(arguments.run_dir),
        **versions(),
        sampler=arguments.sampler or next(iter(SCHEDULERS[run.diffusion.objective])),
        steps=arguments.steps,
        guidance=arguments.guidance,
        guidance_interval=options["guidance_interval"],
        guided_channels=arguments.guided_channels,
        autoguidance=weak and weak.identity(arguments.autoguidance),
        seed=arguments.seed,
        size=arguments.size and (options["height"], options["width"]),
        **conditions,
        vae=run.latents["vae"],
        text_encoder=run.latents.get("text", {}).get("encoder"),
        dtype=arguments.dtype,
        expert_parallel=arguments.expert_parallel,
        device=run.device.type,
    )
