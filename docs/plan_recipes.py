"""Renew what ``ditmoe plan`` says in the headers of recipes: the lines under each ``# ditmoe plan ...``.

python docs/plan_recipes.py [recipes/*.yaml]
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from ditmoe_ds.cli import main

ASKED = re.compile(r"# ditmoe (plan .+)\n(#   .*\n)*")


def renewed(recipe: str) -> str:
    """The text of a recipe with what its plans say now."""

    def answer(asked: re.Match[str]) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main([*shlex.split(asked[1]), "--comment"]) == 0, asked[1]
        return f"# ditmoe {asked[1]}\n{said.getvalue()}"

    return ASKED.sub(answer, recipe)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(Path("recipes").glob("*.yaml"))):
        path.write_text(renewed(path.read_text()))
