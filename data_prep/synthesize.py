"""``ditmoe-data synthesize``: a text-to-image pipeline makes images of classes, CLIP selects those that fit.

OUT/request.json          how they are made
OUT/goldfish/000000.png   a class is a sub-folder, as the source folder:OUT takes it
OUT/goldfish.jsonl        written last, so this class is done: prompt, seed, score and pipeline of each image
OUT/.goldfish.partial/    what is made so far of a class that is not done; a restart goes on there
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_prep.units import claim_folder, device_of_rank, worker_from_environment
from ditmoe_ds.errors import ConfigError, DataError, in_a_line, loading
from ditmoe_ds.progress import Progress
from ditmoe_ds.rng import keyed_generator


def synthesize(
    pipeline: str,
    out: str,
    *,
    classes: str,
    per_class: int,
    prompt: str = "a photo of a {}",
    clip: str | None = None,
    keep: float = 1.0,
    size: int = 512,
    steps: int = 30,
    guidance: float = 5.0,
    batch: int = 4,
    seed: int = 0,
    worker: tuple[int, int] | None = None,
) -> None:
    """Make ``per_class`` images of each class. Classes and batches that are done are kept; worker i of n makes every n-th class.

    Args:
        pipeline: folder or hub id of a diffusers text-to-image pipeline; safetensors only.
        classes: file with a class per line: its folder's name, or folder, tab, name for the prompt.
        prompt: ``{}`` stands for the name.
        clip: folder or hub id of a transformers CLIP model, which scores each image against its prompt.
        keep: share of the images made that is kept, the best scores first; below 1 it needs ``clip``.
        size: pixels; the pipeline's own units, such as multiples of 8.

    Raises:
        ConfigError: an impossible value.
        DataError: the classes or a model cannot be read, or ``out`` holds something else.
    """
    names = _classes(classes)
    if prompt.count("{}") != 1:
        raise ConfigError("--prompt", prompt, "write {} once, where the class's name goes")
    if not 0 < keep <= 1 or (keep < 1 and not clip):
        raise ConfigError("--keep", keep, "must be in (0, 1], and below 1 it needs --clip to choose by")
    root, settings = Path(out), dict(size=size, steps=steps, guidance=guidance, seed=seed)
    request = dict(pipeline=pipeline, clip=clip, keep=keep, prompt=prompt, per_class=per_class, classes=names, **settings)
    device = device_of_rank()
    open_models = functools.cache(lambda: (_load_pipeline(pipeline, device), _load_clip(clip, device) if clip else None))
    claim_folder(root, request, first=open_models)
    number, count = worker or worker_from_environment()
    mine = sorted(names)[number::count]
    todo = [folder for folder in mine if not (root / f"{folder}.jsonl").is_file()]
    if not todo:
        print(f"{out}: already complete" if mine else f"{out}: nothing to do for worker {number} of {count}, of {len(names)} classes")
        return
    generate, score = open_models()
    candidates = math.ceil(per_class / keep)
    left = candidates * len(todo)
    with Progress("synthesize", "images", left) as progress:
        for folder in todo:
            if (root / f"{folder}.jsonl").is_file():  # another process has done it meanwhile
                continue
            text = prompt.replace("{}", names[folder])
            partial = _begin(root, folder)
            scores: list[float | None] = []
            for first in range(0, candidates, batch):
                numbers = range(first, min(first + batch, candidates))
                paths = [partial / f"{i:06d}.png" for i in numbers]
                if all(path.is_file() for path in paths):  # else the whole batch is made anew: in another one, images round differently
                    left -= len(paths)
                    progress.total = left
                else:
                    generators = [keyed_generator(seed, "synthesize", folder, i) for i in numbers]
                    options = dict(generator=generators, height=size, width=size, num_inference_steps=steps, guidance_scale=guidance)
                    try:
                        part = generate([text] * len(numbers), **options).images
                    except ValueError as error:  # of a pipeline made for other sizes
                        reason = in_a_line(error)
                        raise DataError(f"--pipeline={pipeline!r}: cannot make {size} pixels in {steps} steps ({reason})") from error
                    for path, image in zip(paths, part, strict=True):
                        _save(image, path)
                    progress.update(len(part))
                scores += score([Image.open(path) for path in paths], text) if score else [None] * len(paths)
            ranked = sorted(range(candidates), key=lambda i: (-(scores[i] or 0), i))
            about = dict(prompt=text, **settings, pipeline=pipeline)
            kept = sorted(ranked[:per_class])
            _finish(root, folder, [dict(file=f"{folder}/{i:06d}.png", number=i, score=scores[i], **about) for i in kept])
    print(f"{out}: {per_class} images of each of {len(todo)} classes")


def _classes(file: str) -> dict[str, str]:
    try:
        lines = [line for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes={file!r}: no readable file ({getattr(error, 'strerror', error)})") from None
    names = {}
    for line in lines:
        folder, _, name = (part.strip() for part in line.partition("\t"))
        if not re.fullmatch(r"\w[\w .-]*", folder) or folder in names:
            raise DataError(f"--classes={file!r}: {folder!r} is no name for a folder, or there twice; write folder, tab, name")
        names[folder] = name or folder
    if not names:
        raise DataError(f"--classes={file!r}: is empty; write a class a line")
    return names


def _begin(root: Path, folder: str) -> Path:
    """Where a class's images are written, with those that were made before."""
    partial = root / f".{folder}.partial"
    shutil.rmtree(root / folder, ignore_errors=True)  # of a process that was killed just before it wrote the record
    partial.mkdir(exist_ok=True)
    return partial


def _save(image: Image.Image, path: Path) -> None:
    """In one rename: what has the name is whole, also where two processes make the same image."""
    unfinished = path.with_name(f".{socket.gethostname()}-{os.getpid()}")
    image.save(unfinished, "PNG")
    unfinished.replace(path)


def _finish(root: Path, folder: str, records: list[dict[str, Any]]) -> None:
    """Keep the images of the records, drop the others and what a killed process was saving."""
    partial, note = root / f".{folder}.partial", root / f".{folder}.jsonl.partial"
    kept = {Path(record["file"]).name for record in records}
    for path in list(partial.iterdir()):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    note.write_text("".join(json.dumps(record) + "\n" for record in records))
    partial.rename(root / folder)
    note.replace(root / f"{folder}.jsonl")


def _load_pipeline(path_or_id: str, device: str) -> Any:
    from diffusers import DiffusionPipeline  # takes seconds

    with loading(f"--pipeline={path_or_id!r}: no readable diffusers pipeline"):
        pipeline = DiffusionPipeline.from_pretrained(path_or_id, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _load_clip(path_or_id: str, device: str) -> Callable[[list[Image.Image], str], list[float]]:
    import transformers

    with loading(f"--clip={path_or_id!r}: no readable CLIP model"):
        model: Any = transformers.CLIPModel.from_pretrained(path_or_id, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
        images_to_pixels = transformers.AutoImageProcessor.from_pretrained(path_or_id, trust_remote_code=False)
    model = model.to(device).eval()
    length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(images: list[Image.Image], text: str) -> list[float]:
        """Cosine of each image's and the text's embedding, in hundredths."""
        tokens = tokenizer([text], truncation=True, max_length=length, return_tensors="pt").to(device)
        pixels = images_to_pixels(images, return_tensors="pt")["pixel_values"].to(device)
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        cosines = torch.nn.functional.normalize(out.image_embeds, dim=-1) @ torch.nn.functional.normalize(out.text_embeds, dim=-1).T
        return (100 * cosines[:, 0]).tolist()

    return score
