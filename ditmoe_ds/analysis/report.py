"""``report.html``: the numbers of ``analyze`` as one page that needs nothing else, no network and no script."""

import html
from importlib.resources import files
from pathlib import Path
from string import Template

from ditmoe_ds.analysis.figures import hint, picture
from ditmoe_ds.analysis.sections import SECTIONS
from ditmoe_ds.analysis.summary import Numbers

PICTURES = {
    "adaptive_time.png": "over all layers, at the start, middle and end of sampling",
    "adaptive_layer.png": "over all of sampling, by the first, middle and last layer with experts",
}


def write_report(path: Path, title: str, numbers: Numbers, facts: dict[str, str], pictures: dict[str, Path]) -> None:
    """Write the page.

    Args:
        numbers: what ``analyze`` found, with tensors.
        facts: of the run, for the top of the page.
        pictures: what ``adaptive`` drew, if it did.
    """
    parts = {name: content for name, section in SECTIONS.items() if (content := section(numbers))}
    if pictures:
        parts["Compute on sampled images"] = hint(
            "A row per prompt: its image, then the experts that take each token. Red is twice the mean and more, white the mean, blue none."
        ) + "".join(f"<h3>{html.escape(title)}</h3>{picture(pictures[name].read_bytes(), title)}" for name, title in PICTURES.items())
    numbered = list(enumerate(parts.items(), 1))
    page = Template((files("ditmoe_ds.analysis") / "report.html").read_text()).substitute(
        title=html.escape(title),
        facts="".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items()),
        contents="".join(f'<li><a href="#s{i}">{html.escape(name)}</a></li>' for i, (name, _) in numbered),
        sections="\n".join(f'<section id="s{i}"><h2>{html.escape(name)}</h2>{content}</section>' for i, (name, content) in numbered),
    )
    path.write_text(page)
