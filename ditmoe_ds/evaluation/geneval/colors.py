"""Colours of objects by CLIP, as GenEval asks for them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ditmoe_ds.evaluation.geneval.detectors import load
from ditmoe_ds.evaluation.geneval.prompts import COLORS
from ditmoe_ds.evaluation.geneval.scorer import Detected

BACKGROUND = "#999"
"""Background of an object whose colour is asked for."""
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorClassifier:
    """Colours of objects by CLIP, zero-shot: the object on grey, cropped to its box, against texts of each of ``COLORS``.

    Args:
        path_or_id: a CLIP; the protocol's is ``openai/clip-vit-large-patch14``.

    Raises:
        DataError: there is no such model, or it is no CLIP.

    Attributes:
        difference: how it differs from the protocol's, in words; empty if it does not.
    """

    def __init__(self, path_or_id: str, device: torch.device):
        import transformers

        model = load("--clip", path_or_id, transformers.CLIPModel, weights_only=True)
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor = load("--clip", path_or_id, transformers.CLIPProcessor)
        vision = model.config.vision_config
        size = vision.num_hidden_layers, vision.hidden_size, vision.patch_size
        self.difference = "" if size == (24, 1024, 14) else "a CLIP other than ViT-L/14"
        self.texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Image.Image, name: str, objects: list[Detected]) -> list[str]:
        """The colour of each of these objects of the class ``name``."""
        crops = [crop(image, one) for one in objects]
        inputs = self.processor(images=crops, return_tensors="pt").to(self.model.device)
        seen = self.model.get_image_features(**inputs).pooler_output
        return [COLORS[number] for number in (seen @ self._colors_of(name).T).argmax(1).tolist()]

    def _colors_of(self, name: str) -> Tensor:
        """(colours, width): the direction of each colour's templates."""
        if name not in self.texts:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            inputs = self.processor(text=texts, padding=True, return_tensors="pt").to(self.model.device)
            encoded = normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)
            self.texts[name] = normalize(encoded.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1), dim=-1)
        return self.texts[name]


def crop(image: Image.Image, found: Detected) -> Image.Image:
    """The object, on grey where its mask is known, cut to its box (at least a pixel of it)."""
    if found.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(found.mask))
    left, top, right, bottom = (int(np.rint(side)) for side in found.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
