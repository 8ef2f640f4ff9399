"""Pictures for GenEval in the published layout: making them, and scoring a folder of them, whoever made it.

``00000/metadata.jsonl`` is the first line of the prompt file, ``00000/samples/0000.png`` the first of its pictures, and so on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.evaluation.geneval.colors import ColorClassifier
from ditmoe_ds.evaluation.geneval.detectors import Detector
from ditmoe_ds.evaluation.geneval.prompts import IMAGES, PROMPTS, Prompt, read_prompts
from ditmoe_ds.evaluation.geneval.scorer import Detected, Limits, judge, kept, summary
from ditmoe_ds.evaluation.images import check_png, open_picture
from ditmoe_ds.pipelines.parts import DESCRIPTION, describe, read_description, save_png, write
from ditmoe_ds.pipelines.run import Run

Colors = Callable[[Image.Image, str, list[Detected]], list[str]]
"""As ``ColorClassifier``."""


@dataclass
class Pictures:
    """The pictures of one prompt."""

    prompt: Prompt
    files: list[Path]


def begin(folder: Path, settings: dict[str, Any], prompts: list[Prompt], images: int) -> list[int]:
    """Note in a folder how its pictures are made, or compare with what is noted there.

    Returns:
        Numbers of the prompts whose pictures are not all there.

    Raises:
        ConfigError: it holds pictures that were made differently.
    """
    asked = hashlib.sha256("\n".join(prompt.line for prompt in prompts).encode()).hexdigest()
    describe(folder / DESCRIPTION, dict(**settings, images=images, prompts=asked), "SAMPLES", folder)
    return [number for number in range(len(prompts)) if not all(_picture(folder, number, i).is_file() for i in range(images))]


def generate(
    run: Run, prompts: list[Prompt], numbers: Iterable[int], folder: Path, *, images: int, steps: int, guidance: float, seed: int
) -> None:
    """Make the pictures of the prompts with these numbers.

    The pictures of a prompt are one batch, and picture i of prompt p has the noise of index p * images + i: neither a restart
    nor the number of processes changes them.
    """
    for number in numbers:
        sampled = run.sample([prompts[number].text] * images, steps=steps, guidance=guidance, seed=seed, first=number * images)
        _picture(folder, number, 0).parent.mkdir(parents=True, exist_ok=True)
        write(_place(folder, number) / "metadata.jsonl", prompts[number].line + "\n")
        for i, picture in enumerate(sampled):
            save_png(_picture(folder, number, i), picture)


def _place(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}"


def _picture(folder: Path, number: int, i: int) -> Path:
    return _place(folder, number) / "samples" / f"{i:04d}.png"


def read_folder(folder: Path) -> list[Pictures]:
    """The prompts and the pictures of a folder, in order.

    Raises:
        DataError: there are none, a prompt has none, or a prompt or a picture cannot be read.
    """
    places = sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()) if folder.is_dir() else []
    if not places:
        raise DataError(f"{folder}: no folders 00000, 00001, ... of pictures; GenEval's layout is in docs/geneval.md")
    found = []
    for place in places:
        prompts = read_prompts(place / "metadata.jsonl")
        files = sorted(path for path in (place / "samples").glob("*.png") if path.stem.isdigit())
        if len(prompts) != 1 or not files:
            raise DataError(f"{place}: {len(prompts)} prompts in metadata.jsonl, {len(files)} pictures in samples; one and some are needed")
        for file in files:
            check_png(file)  # or hours of verdicts are lost
        found.append(Pictures(prompts[0], files))
    return found


def check_writable(folder: Path) -> None:
    """Before hours of scoring. Raises ConfigError if ``report`` cannot write there."""
    if not os.access(folder, os.W_OK):
        raise ConfigError("SAMPLES", str(folder), "scores are written there, which this user may not; copy the pictures to another")


def score(folder: Path, parts: Iterable[Pictures], detector: Detector, colors: Colors, limits: Limits) -> list[dict[str, Any]]:
    """Judge pictures.

    Returns:
        Of each what the published evaluator writes: ``filename`` (in the folder), ``tag``, ``prompt``, ``correct``, ``reason``,
        ``metadata`` (the prompt's line) and ``details`` (JSON: by class, boxes and scores of the objects that count).

    Raises:
        DataError: a picture cannot be read.
    """
    verdicts = []
    for part in parts:
        for file in part.files:
            image = open_picture(file)
            found = detector(image, part.prompt.names, min(limits.threshold, limits.counting))
            counted = {name: kept(objects, part.prompt.task, limits) for name, objects in found.items()}
            wrong = judge(part.prompt, counted, partial(colors, image))
            verdicts.append(
                dict(
                    filename=file.relative_to(folder).as_posix(),
                    tag=part.prompt.task,
                    prompt=part.prompt.text,
                    correct=not wrong,
                    reason="\n".join(wrong),
                    metadata=part.prompt.line,
                    details=json.dumps({name: [[*one.box, one.score] for one in objects] for name, objects in counted.items() if objects}),
                )
            )
    return verdicts


def differences(pictures: Sequence[Pictures], detector: Detector, colors: ColorClassifier, limits: Limits) -> list[str]:
    """How an evaluation differs from the published one, apart from its implementation. Prompts are told apart by their tasks alone, models
    by their size."""
    found = []
    counts = Counter(part.prompt.task for part in pictures)
    if counts != PROMPTS:
        found.append(f"{len(pictures)} prompts that are not the published {sum(PROMPTS.values())}")
    if any(len(part.files) != IMAGES for part in pictures):
        found.append(f"not {IMAGES} pictures of each prompt")
    found += [model.difference for model in (detector, colors) if model.difference]
    if limits != Limits():
        found.append(", ".join(f"{key} {value}" for key, value in limits._asdict().items() if value != Limits._field_defaults[key]))
    return found


def report(folder: Path, verdicts: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Write ``geneval.jsonl``, a line per picture, and ``geneval.json``, which it returns: ``summary``, ``settings``, and how the
    pictures were made, if the folder says."""
    numbers = dict(**summary(verdicts), **settings, made=read_description(folder / DESCRIPTION))
    write(folder / "geneval.jsonl", "".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    write(folder / "geneval.json", json.dumps(numbers, indent=1) + "\n")
    return numbers
