"""GenEval's prompts (arXiv 2310.11513): what each asks of its pictures."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditmoe_ds.errors import DataError

PROMPTS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
"""The tasks, and how many of the 553 published prompts each has."""
IMAGES = 4
"""Pictures of each prompt."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Clause:
    """A number of objects of a class, perhaps of a colour, perhaps on one side of the objects of an earlier clause."""

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
    """A picture with that many, or more, is wrong."""
    line: str
    """As it was read."""

    @property
    def names(self) -> list[str]:
        """The classes that matter."""
        return list(dict.fromkeys(clause.name for clause in self.include + self.exclude))


def read_prompts(path: Path) -> list[Prompt]:
    """Read ``evaluation_metadata.jsonl``, or the ``metadata.jsonl`` of one prompt.

    Raises:
        DataError: it cannot be read, or a line is no prompt; names the line.
    """
    try:
        with path.open() as file:
            lines = [line.rstrip("\n") for line in file]  # str.splitlines would cut at more than line feeds
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); the published prompts are prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval"
        ) from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(_prompt(line))
        except json.JSONDecodeError as error:
            wanted = "GenEval's lines are JSON objects with tag, include and prompt"
            raise DataError(f"{path}, line {number}: {error}; {wanted}") from None
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
