"""Draw what the two routers do: with the same scores, and in two trained models.

python docs/routers.py --out docs/images/routers.png
python docs/routers.py --runs TOKEN_CHOICE_RUN EXPERT_CHOICE_RUN --prompt "a red circle" --out docs/images/routers_trained.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

from ditmoe_ds.analysis.routing import taken_by, watched
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.moe.routing import RouterConfig, expert_choice, token_choice
from ditmoe_ds.pipelines.run import open_run

TOKENS, EXPERTS, FACTOR = 12, 4, 2
STEPS, SHOWN = 25, 18


def draw_scores(path: str) -> None:
    """One table of scores, and what each router takes of it."""
    scores = (2 * torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))).softmax(-1)
    routers = {
        f"token choice: each row its {FACTOR} best": token_choice(scores, FACTOR, RouterConfig())[0],
        f"expert choice: each column its {TOKENS * FACTOR // EXPERTS} best": expert_choice(scores[None], (FACTOR, 1), RouterConfig()),
    }
    figure, panels = plt.subplots(1, 2, figsize=(8.2, 5.4), layout="constrained", facecolor="white")
    for panel, (title, assignment) in zip(panels, routers.items(), strict=True):
        taken = taken_by(assignment, TOKENS)
        panel.imshow(scores, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for token, expert in taken.nonzero().tolist():
            panel.add_patch(Rectangle((expert - 0.46, token - 0.46), 0.92, 0.92, fill=False, edgecolor="#d9730d", linewidth=2.2))
        panel.set_title(title, fontsize=11)
        panel.set_xticks(range(EXPERTS), [f"expert {e}\ntakes {taken[:, e].sum()}" for e in range(EXPERTS)])
        panel.set_yticks(range(TOKENS), [f"token {t}" for t in range(TOKENS)])
        beside = panel.secondary_yaxis("right")
        beside.set_yticks(range(TOKENS), [f"x {taken[t].sum()}" for t in range(TOKENS)])
        for axis in (panel, beside):
            axis.tick_params(length=0)
    figure.suptitle("the same scores (softmax over experts), two ways to choose", fontsize=12)
    figure.savefig(path, dpi=110)


def draw_runs(runs: list[str], prompt: str, path: str, **options: str | None) -> None:
    """An image of each run, which of its tokens every expert of one layer takes, and by how many experts each is taken."""
    rows = []
    for folder in runs:
        run = open_run(folder, **options)
        config: DiTConfig = run.model.config
        with watched(run.model) as taken:
            image = run.sample([prompt], steps=STEPS, guidance=3.0, seed=0)[0]
        side = [length // config.patch for length in run.shape[1:]]
        layers = len(config.sparse_layers)
        maps = taken[SHOWN * layers + layers // 2][: side[0] * side[1]].cpu().view(*side, -1)  # the conditional half comes first
        rows.append((config.routing, image, maps))
    experts = rows[0][2].shape[-1]
    figure, panels = plt.subplots(len(rows), experts + 2, figsize=(1.35 * (experts + 2), 3.4), layout="constrained", facecolor="white")
    for line, (routing, image, maps) in zip(panels, rows, strict=True):
        line[0].imshow(image)
        line[0].set_title(f"{routing} choice", fontsize=9)
        for e in range(experts):
            line[1 + e].imshow(maps[..., e], cmap="Oranges", vmin=0, vmax=1.4)
            line[1 + e].set_title(f"expert {e}: {maps[..., e].sum()}", fontsize=9)
        counts = maps.sum(-1)
        line[-1].imshow(counts, cmap="RdBu_r", vmin=0, vmax=2 * counts.float().mean())
        line[-1].set_title(f"experts: {counts.min()} to {counts.max()}", fontsize=9)
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    figure.suptitle(f'"{prompt}", layer {layers // 2 + 1} of {layers} with experts, step {SHOWN + 1} of {STEPS}', fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs=2, help="token choice, expert choice; without them: the table of scores")
    parser.add_argument("--prompt", default="a photo of a red circle")
    parser.add_argument("--vae")
    parser.add_argument("--text-encoder")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    if arguments.runs:
        draw_runs(arguments.runs, arguments.prompt, arguments.out, vae=arguments.vae, text_encoder=arguments.text_encoder)
    else:
        draw_scores(arguments.out)


if __name__ == "__main__":
    main()
