"""GenEval's protocol (arXiv 2310.11513): what a prompt asks of its picture, and whether the objects found there show it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditmoe_ds.errors import DataError
from ditmoe_ds.evaluation.shapes import wilson

PROMPTS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
"""The tasks, and how many of the 553 published prompts each has."""
IMAGES = 4
"""Of each prompt."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
MOST = 16
"""Objects of one class that are looked at."""
MARGIN = 0.1
"""Share of both objects' sizes by which their centres may differ and still count as level."""


@dataclass(frozen=True)
class Clause:
    """So many objects of a class, perhaps of a colour, perhaps on one side of the objects of an earlier clause."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """Relation, and number of the clause it relates to."""


@dataclass(frozen=True)
class Prompt:
    """One line of the prompt file."""

    task: str
    text: str
    include: tuple[Clause, ...]
    """All of them are wanted."""
    exclude: tuple[Clause, ...]
    """So many, or more, are wrong."""
    line: str
    """As it was read."""

    @property
    def names(self) -> list[str]:
        """The classes that matter."""
        return list(dict.fromkeys(clause.name for clause in self.include + self.exclude))


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
    """The same for prompts of the task counting."""
    overlap: float = 1.0
    """Of two boxes of a class with at least this intersection over union, the weaker goes; 1 leaves all."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read ``evaluation_metadata.jsonl``, or the ``metadata.jsonl`` of one prompt.

    Raises:
        DataError: it cannot be read, or a line is no prompt; names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); the published prompts are prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval"
        ) from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(_prompt(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not prompts:
        raise DataError(f"{path}: no prompts")
    return prompts


def _prompt(line: str) -> Prompt:
    tree = _fields(json.loads(line), "a prompt", {"tag", "include", "prompt"}, {"exclude"})
    if tree["tag"] not in [*PROMPTS]:
        raise ValueError(f"tag {tree['tag']!r} is none of {', '.join(PROMPTS)}")
    if not isinstance(tree["prompt"], str) or not tree["prompt"]:
        raise ValueError(f"prompt {tree['prompt']!r} is no text")
    lists = {key: tree.get(key, []) for key in ("include", "exclude")}
    if not all(isinstance(clauses, list) for clauses in lists.values()) or not tree["include"]:
        raise ValueError("include and exclude are lists, and include is not empty")
    include = tuple(_included(clause, number) for number, clause in enumerate(lists["include"]))
    exclude = tuple(Clause(*_counted(_fields(clause, "exclude", {"class", "count"}))) for clause in lists["exclude"])
    return Prompt(tree["tag"], tree["prompt"], include, exclude, line)


def _included(clause: Any, number: int) -> Clause:
    _fields(clause, "include", {"class", "count"}, {"color", "position"})
    color, position = clause.get("color"), clause.get("position")
    if color not in (None, *COLORS):
        raise ValueError(f"color {color!r} is none of {', '.join(COLORS)}")
    if position is not None:
        if not isinstance(position, list) or len(position) != 2 or position[0] not in RELATIONS or position[1] not in range(number):
            raise ValueError(f"position {position!r} is no [relation, number of an earlier clause]; relations: {', '.join(RELATIONS)}")
        position = (position[0], int(position[1]))
    return Clause(*_counted(clause), color, position)


def _counted(clause: dict[str, Any]) -> tuple[str, int]:
    name, count = clause["class"], clause["count"]
    if not isinstance(name, str) or not name or type(count) is not int or count < 1:
        raise ValueError(f"class {name!r}, count {count!r}: a name and a number of at least 1 are needed")
    return name, count


def _fields(tree: Any, what: str, needed: Set[str], allowed: Set[str] = frozenset()) -> dict[str, Any]:
    if not isinstance(tree, dict) or not needed <= tree.keys() <= needed | allowed:
        raise ValueError(f"{what} is an object with {', '.join(sorted(needed))}{''.join(f' ({key})' for key in sorted(allowed))}: {tree!r}")
    return tree


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

    The offset of the centres, shortened along each axis by ``MARGIN`` of both sizes, is divided by its length before; more
    than half along an axis is a side.
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
