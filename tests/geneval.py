"""Prompts for GenEval."""

import json


def write_prompts(path, *prompts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


def wants(tag, *include, exclude=(), prompt="a photo"):
    """A line of the prompt file; clauses are (class, count, color or position or nothing)."""
    clauses = []
    for name, count, *more in include:
        clauses.append({"class": name, "count": count} | {("color" if isinstance(m, str) else "position"): m for m in more})
    tree = dict(tag=tag, include=clauses, prompt=prompt)
    return tree | ({"exclude": [{"class": name, "count": count} for name, count in exclude]} if exclude else {})
