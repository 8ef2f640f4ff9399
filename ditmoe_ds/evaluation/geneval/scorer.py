"""GenEval's verdicts (arXiv 2310.11513): whether the objects that were found in a picture are those that its prompt asks for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ditmoe_ds.evaluation.geneval.prompts import PROMPTS, RELATIONS, Clause, Prompt
from ditmoe_ds.evaluation.metrics import wilson

MOST = 16
"""Most objects of one class that count."""
MARGIN = 0.1
"""Share of both objects' sizes by which their centres may differ and still count as level."""


class Detected(NamedTuple):
    """An object that a detector found."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom, in pixels."""
    score: float
    mask: np.ndarray | None = None
    """(H, W) bool, of the picture's size; None where the detector knows boxes only."""


class Limits(NamedTuple):
    """Which detections count. The defaults are the protocol's."""

    threshold: float = 0.3
    """Objects score more than this."""
    counting: float = 0.9
    """The same for prompts of the task ``counting``."""
    overlap: float = 1.0
    """Of two boxes of a class with at least this intersection over union, the weaker is dropped; 1 keeps all."""


def kept(found: Sequence[Detected], task: str, limits: Limits) -> list[Detected]:
    """The objects of one class that count in ``task``, strongest first."""
    threshold = limits.counting if task == "counting" else limits.threshold
    strongest = sorted((one for one in found if one.score > threshold), key=lambda one: -one.score)[:MOST]
    chosen: list[Detected] = []
    for one in strongest:
        if limits.overlap == 1 or all(_overlap(one.box, other.box) < limits.overlap for other in chosen):
            chosen.append(one)
    return chosen


def judge(prompt: Prompt, found: dict[str, list[Detected]], colors_of: Callable[[str, list[Detected]], list[str]]) -> list[str]:
    """What is wrong with a picture; nothing, if it is right.

    Colour and position are asked of the strongest objects only, as many as are wanted; an object too many matters where the
    prompt excludes it.

    Args:
        found: the objects that count, by class, strongest first.
        colors_of: colours of objects of a class.
    """
    wrong: list[str] = []
    matched: list[list[Detected] | None] = []
    for clause in prompt.include:
        objects = found.get(clause.name, [])[: clause.count]
        reason = _lacks(clause, objects, matched, colors_of)
        wrong += [reason] if reason else []
        matched.append(None if reason else objects)
    for clause in prompt.exclude:
        count = len(found.get(clause.name, []))
        if count >= clause.count:
            wrong.append(f"expected {clause.name}<{clause.count}, found {count}")
    return wrong


def _lacks(clause: Clause, objects: list[Detected], matched: list[list[Detected] | None], colors_of: Callable) -> str | None:
    if len(objects) < clause.count:
        return f"expected {clause.name}>={clause.count}, found {len(objects)}"
    if clause.color:
        colors = colors_of(clause.name, objects)
        if colors.count(clause.color) < clause.count:
            return f"expected {clause.color} {clause.name}>={clause.count}, found {', '.join(colors)}"
    if clause.position:
        wanted, number = clause.position
        others = matched[number]
        if others is None:
            return f"expected {clause.name} {wanted} another object, which is not as expected"
        for one in objects:
            for other in others:
                relations = relation(one.box, other.box)
                if wanted not in relations:
                    return f"expected {clause.name} {wanted} the other, found {' and '.join(sorted(relations)) or 'neither side'}"
    return None


def relation(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """On which sides of box ``b`` box ``a`` is: up to two of ``RELATIONS``.

    The offset of the centres is shortened along each axis by ``MARGIN`` of both sizes, and divided by the length that it had before. More
    than 0.5 along an axis is a side.
    """
    boxes = np.array([a, b], float).reshape(2, 2, 2)  # box, corner, axis
    offset = np.subtract(*boxes.mean(1))
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    shortened = np.sign(offset) * np.maximum(np.abs(offset) - MARGIN * sizes, 0)
    if (np.abs(shortened) < 1e-3).all():
        return set()
    dx, dy = shortened / np.linalg.norm(offset)
    return {name for name, is_so in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if is_so}


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes whose last pixels belong to them, as the published evaluator counts."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return shared / (area(*a) + area(*b) - shared)


def summary(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of pictures with ``tag``, ``metadata`` (the prompt) and ``correct``.

    Returns:
        ``tasks``: of each ``right``, ``images``, ``prompts``, ``score`` and ``ci95`` (Wilson's, as if pictures of one prompt were
        independent); ``overall``: the mean of the tasks' scores; ``images_right`` and ``prompts_right`` (any of its pictures):
        shares of all.
    """
    by_task: dict[str, list[bool]] = {task: [] for task in PROMPTS}
    by_prompt: dict[tuple[str, str], bool] = defaultdict(bool)
    for verdict in verdicts:
        by_task[verdict["tag"]].append(verdict["correct"])
        by_prompt[verdict["tag"], verdict["metadata"]] |= verdict["correct"]
    tasks: dict[str, dict[str, Any]] = {
        task: dict(
            right=sum(hits),
            images=len(hits),
            prompts=sum(tag == task for tag, _ in by_prompt),
            score=sum(hits) / len(hits),
            ci95=wilson(sum(hits), len(hits)),
        )
        for task, hits in by_task.items()
        if hits
    }
    return dict(
        overall=sum(numbers["score"] for numbers in tasks.values()) / len(tasks),
        tasks=tasks,
        images_right=sum(verdict["correct"] for verdict in verdicts) / len(verdicts),
        prompts_right=sum(by_prompt.values()) / len(by_prompt),
    )
