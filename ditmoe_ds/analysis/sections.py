"""The sections of the report: each is a function of the numbers, and empty where they have nothing to say."""

from collections.abc import Callable

import torch
from torch import Tensor

from ditmoe_ds.analysis.figures import RISING, bars, columns, heat, hint, lines, number, panels, scale, table
from ditmoe_ds.analysis.summary import Numbers

TIME = ("image (t = 0)", "noise (t = 1)")
SIGNIFICANT = 0.05
FEW = 10
"""Samples of a class: with fewer, what its permutations tell of each image hides much of what it tells."""


def by_layer(numbers: Numbers, values: Tensor, draw: Callable[[Tensor, str], str], width: int = 150) -> str:
    """A panel per layer of values (L, ...)."""
    titles = [f"layer {layer}" for layer in numbers["layers"]]
    return panels([(title, draw(one, title)) for title, one in zip(titles, values, strict=True)], width)


def dependence(numbers: Numbers) -> str:
    """Mutual information of the choice of expert with time, position and class."""
    layers = [f"layer {layer}" for layer in numbers["layers"]]
    rows, charts, words = [], [], []
    for axis, found in numbers["information"].items():
        last = {key: values[-1] for key, values in found.items()}
        z, p, above = ("none" if last["z"] is None else f"{last['z']:.1f}"), f"{last['p']:.3f}", f"{100 * last['share']:.2f} %"
        rows.append([axis, number(last["bits"]), number(last["baseline"]), above, z, p])
        if axis in numbers["fixed"]:
            words.append(f"the {axis} explains none, by construction: every expert takes equally many tokens of every image")
            continue
        few = axis == "class" and numbers["samples"] < FEW * numbers["classes"]  # shuffled labels, too, then tell images apart
        least = f"at least {above}, of so few samples ({numbers['samples']}) of {numbers['classes']} classes," if few else above
        words.append(f"the {axis} explains {least if last['p'] < SIGNIFICANT else 'none beyond chance'} (p\u00a0=\u00a0{p})")
        chart = bars(found["bits"][:-1], found["baseline_high"][:-1], layers, (layers[0], layers[-1]), f"information of the {axis}", "bit")
        charts.append(f"<div><h3>{axis}</h3>{chart}</div>")
    most, permutations = numbers["information"]["position"]["experts"][-1], numbers["permutations"]
    return (
        hint(f"Of the uncertainty about the expert, in the mean over layers, {'; '.join(words)}.")
        + table(["mean over layers", "bits", "shuffled", "above, of entropy", "z", "p"], rows)
        + hint(
            f"Mutual information of a selection's expert with its label, of at most {number(most)} bits. Shuffled: its mean over "
            f"{permutations} permutations of the labels (classes between images, times within an image, positions by shifting an image's "
            "grid), which is what chance alone gives. z: standard deviations from there. p: the share of permutations that reach the "
            f"value; with this many permutations it cannot be below {1 / (permutations + 1):.3f}."
        )
        + columns(charts)
        + hint("The same by layer. The line across a bar is what 95 % of the permutations stay below.")
    )


def _shares(numbers: Numbers, axis: str, how: str) -> str:
    share, even = numbers["share"][axis], 1 / numbers["experts"]
    layer, row, expert = (int(i) for i in torch.unravel_index(share.nan_to_num(0).argmax(), share.shape))
    names = numbers["class_names"] or range(share.shape[1])
    place = dict(
        timestep=lambda: f"at t = {numbers['timesteps'][row]:.2f}",
        position=lambda: f"at row {row // numbers['sides'][1]}, column {row % numbers['sides'][1]}",
        **{"class": lambda: f"of class {names[row]}"},
    )[axis]()
    most = f"{100 * share[layer, row, expert]:.0f} % of the selections {place}"
    strongest = (
        f"The strongest preference: in layer {numbers['layers'][layer]}, expert {expert} gets {most}; even would be {100 * even:.0f} %."
    )
    return hint(f"{how} {strongest}") + scale("0", f"{even:.2f} (even)", f"{2 * even:.2f} and more")


def over_time(numbers: Numbers) -> str:
    """Shares by noise level."""
    if "timestep" in numbers["fixed"]:
        return ""
    high = 2 / numbers["experts"]
    head = _shares(numbers, "timestep", "A row per expert, from image (left) to noise (right): its share of the selections then.")
    return head + by_layer(numbers, numbers["share"]["timestep"], lambda one, name: heat(one.T, 0, high, f"{name}, time", ratio=1.4))


def over_positions(numbers: Numbers) -> str:
    """Shares by patch."""

    def maps(one: Tensor, name: str) -> str:
        drawn = [heat(one[:, e].view(numbers["sides"]), 0, high, f"{name}, expert {e}, position") for e in range(one.shape[1])]
        return f'<div class="maps">{"".join(drawn)}</div>'

    high = 2 / numbers["experts"]
    head = _shares(numbers, "position", "A map of the image per expert: its share of the selections at each patch, over all times.")
    return head + by_layer(numbers, numbers["share"]["position"], maps, 220)


def over_classes(numbers: Numbers) -> str:
    """Shares by class."""
    if "class" not in numbers["share"] or "class" in numbers["fixed"]:
        return ""
    high, names = 2 / numbers["experts"], numbers["class_names"] or []
    order = f" ({', '.join(names)})" if 0 < len(names) <= 12 else ""
    how = f"A row per expert, a column per class{order}: its share of the selections. Grey: no sample of that class."
    head = _shares(numbers, "class", how)
    return head + by_layer(numbers, numbers["share"]["class"], lambda one, name: heat(one.T, 0, high, f"{name}, class", ratio=1.4))


def balance(numbers: Numbers) -> str:
    """Loads, and the entropy of the experts' shares."""
    if "timestep" in numbers["fixed"]:
        return ""
    load, entropies = numbers["load"], numbers["entropy"]
    even, most = 1 / numbers["experts"], torch.tensor(float(numbers["experts"])).log2().item()
    fullest = load.amax(1)
    worst = int(fullest.argmax())
    least = entropies.min().item()
    loads = heat(load.T, 0, 2 * even, "load of each expert by layer", ratio=2.4)
    calm = heat(entropies, min(0.8 * most, least), most, "entropy by layer and time", "Blues", ratio=2.4)
    left = hint(
        f"A column per layer, a row per expert: its share of all selections. The fullest, in layer {numbers['layers'][worst]}, has "
        f"{fullest[worst] / even:.2f} times the even share."
    )
    right = hint(
        f"Entropy of the experts' shares: a row per layer, from image (left) to noise (right). {number(least)} to "
        f"{number(entropies.max().item())} of {number(most)} bits: less means fewer experts do the work then."
    )
    loads += scale("0", "even", "twice and more")
    calm += scale(f"{number(min(0.8 * most, least))} bits", "", f"{number(most)} (all alike)", "Blues")
    return columns([f"<div>{left}{loads}</div>", f"<div>{right}{calm}</div>"])


def training(numbers: Numbers) -> str:
    """Loss and load over the steps."""
    curves = numbers["training"]
    if not curves:
        return ""
    ends = (f"step {curves['steps'][0]}", f"step {curves['steps'][-1]}")
    loss = curves["loss"].tolist()
    left = hint(f"Training loss, mean of each {curves['every']} steps: {number(loss[0])} to {number(loss[-1])}.") + lines(
        {"loss": loss}, ends, "training loss"
    )
    key = "max_over_mean" if numbers["routing"] == "token" else "takers_std"
    values = curves["router"][key]  # (L, places)
    high = max(values.max().item(), values.min().item() + 0.1)
    means = values.mean(0)
    what = dict(
        max_over_mean="The fullest expert's load over the mean load (1 is even)",
        takers_std="How unevenly compute is spread over tokens (standard deviation of the experts per token)",
    )[key]
    first, last = number(means[0].item()), number(means[-1].item())
    text = f"{what}: a row per layer, left to right the steps. Mean over layers {first} at first, {last} last."
    low = values.min().item() if key == "takers_std" else 1.0
    right = hint(text) + heat(values, low, high, "load over training", RISING, ratio=2.4) + scale(number(low), "", number(high), RISING)
    return columns([f"<div>{left}</div>", f"<div>{right}</div>"])


def pairs(numbers: Numbers) -> str:
    """Which experts take the same tokens."""
    lifts = numbers["lift"]
    if lifts.isnan().all():
        return ""
    strongest, low, high = lifts.nan_to_num(0).amax(), lifts.nan_to_num(1).amin().item(), 2.0
    layer, one, other = (int(i) for i in torch.unravel_index(lifts.nan_to_num(0).argmax(), lifts.shape))
    return (
        hint(
            "How often two experts take the same token, over how often their loads alone imply: 1 is independence, red pairs seek each "
            f"other, blue ones avoid each other. From {number(low)} to {number(strongest.item())}; the closest pair: experts {one} and "
            f"{other} in layer {numbers['layers'][layer]}."
        )
        + scale("0", "1", "2 and more")
        + by_layer(numbers, lifts, lambda lift, name: heat(lift, 0, high, f"{name}, pairs of experts"), 110)
    )


def similarity(numbers: Numbers) -> str:
    """Cosines between experts."""
    diagonal = torch.eye(numbers["experts"], dtype=torch.bool)
    titles = dict(outputs="answers to the same tokens", w1="weights into the hidden units (w1)", w2="weights out of them (w2)")
    means = {name: numbers["similarity"][name][:, ~diagonal].mean().item() for name in titles}

    def matrices(name: str) -> str:
        drawn = by_layer(numbers, numbers["similarity"][name], lambda one, layer: heat(one, -1, 1, f"{layer}, {titles[name]}"), 110)
        return f"<h3>{titles[name]}</h3>{drawn}"

    return (
        hint(
            "Cosines between the experts of a layer: 1 (red) alike, 0 (white) unrelated, -1 (blue) opposite. Between different experts "
            f"the mean is {means['outputs']:.2f} of their answers, {means['w1']:.2f} of w1 and {means['w2']:.2f} of w2. Weights can differ "
            "where answers do not: hidden units have no order."
        )
        + scale("-1", "0", "1")
        + matrices("outputs")
        + f"<details><summary>weights, layer by layer</summary>{matrices('w1')}{matrices('w2')}</details>"
    )


def compute(numbers: Numbers) -> str:
    """How expert choice spreads its compute."""
    if numbers["routing"] != "expert":
        return ""
    spread = {key: values.mean(0).tolist() for key, values in numbers["takers"].items()}
    names = dict(untaken="tokens that no expert takes", std="standard deviation of experts per token", gini="Gini coefficient")
    charts = [
        f"<div><h3>{title}</h3>{lines({title: spread[key]}, TIME, title)}"
        + hint(f"{number(spread[key][0])} near the image, {number(spread[key][-1])} near noise.")
        + "</div>"
        for key, title in names.items()
    ]
    mean = numbers["experts_per_token"]
    maps = numbers["takers_by_position"]
    return (
        hint(f"Experts choose: the mean is fixed at {number(mean)} experts per token at every time; how unequally tokens share it is not.")
        + columns(charts)
        + "<h3>where in the image</h3>"
        + hint(f"Mean experts per token by patch: from {number(maps.min().item())} to {number(maps.max().item())}.")
        + scale("0", f"{number(mean)} (mean)", f"{number(2 * mean)} and more")
        + by_layer(numbers, maps, lambda one, name: heat(one.view(numbers["sides"]), 0, 2 * mean, f"{name}, experts per token"), 110)
    )


SECTIONS: dict[str, Callable[[Numbers], str]] = {
    "What the choice of expert depends on": dependence,
    "By noise level": over_time,
    "By patch position": over_positions,
    "By class": over_classes,
    "Load": balance,
    "During training": training,
    "Experts that are chosen together": pairs,
    "Experts that are alike": similarity,
    "Compute over tokens": compute,
}
