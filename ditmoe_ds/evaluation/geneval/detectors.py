"""Detectors of objects, through transformers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ditmoe_ds.errors import ConfigError, loading
from ditmoe_ds.evaluation.geneval.scorer import Detected

SIZE = {"shortest_edge": 800, "longest_edge": 1333}
"""Pixels of a picture as the protocol's detector sees it. The converted checkpoints' own setting, 384 x 384, loses small objects."""
SYNONYMS = {
    **{"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard", "motorbike": "motorcycle"},
    **{"aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv", "hair dryer": "hair drier"},
}
"""Names of COCO's classes: the prompts' and some checkpoints' -> COCO's."""


class Detector(Protocol):
    """Finds objects; one picture at a time, so that no result depends on another picture."""

    model: Any
    difference: str
    """How it differs from the protocol's, in words; empty if it does not."""

    def check(self, names: list[str]) -> None:
        """Raises ConfigError if it lacks one of these classes."""

    def __call__(self, image: Image.Image, names: list[str], threshold: float) -> dict[str, list[Detected]]:
        """Of each class, the objects that score more than ``threshold``, in any order."""


def open_detector(path_or_id: str, device: torch.device) -> Detector:
    """Load a detector that transformers knows: of instances (Mask2Former), of boxes, or open-vocabulary.

    Args:
        path_or_id: local folder, or hub id; no code of the model's own is run, and no pickled objects are made.

    Raises:
        DataError: there is no such model.
        ConfigError: it is no detector.
    """
    import transformers  # takes seconds
    from transformers.models.auto import modeling_auto as auto

    config = load("--detector", path_or_id, transformers.AutoConfig)
    box, text = auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
    kinds: tuple[tuple[Any, ...], ...] = (
        (("mask2former",), Instances, transformers.AutoModelForUniversalSegmentation, transformers.AutoImageProcessor),
        (box, Boxes, transformers.AutoModelForObjectDetection, transformers.AutoImageProcessor),
        (text, OpenVocabulary, transformers.AutoModelForZeroShotObjectDetection, transformers.AutoProcessor),
    )
    for types, kind, model, processor in kinds:
        if config.model_type in types:
            loaded = load("--detector", path_or_id, model, weights_only=True)
            return kind(loaded.to(device).eval().requires_grad_(False), load("--detector", path_or_id, processor))
    fix = f"a {config.model_type} detects no objects; use facebook/mask2former-swin-small-coco-instance, a DETR or an OWL, for example"
    raise ConfigError("--detector", path_or_id, fix)


def load(key: str, path_or_id: str, cls: Any, **options: Any) -> Any:
    """``cls.from_pretrained``.

    Raises:
        DataError: there is no such model; names the option ``key``.
    """
    with loading(f"{key}={path_or_id!r}: neither a folder nor a hub id of a readable transformers model"):
        return cls.from_pretrained(path_or_id, trust_remote_code=False, **options)


class _OfKnownClasses:
    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self.numbers = {_plain(label): number for number, label in model.config.id2label.items()}

    def check(self, names: list[str]) -> None:
        unknown = [name for name in names if _plain(name) not in self.numbers]
        if unknown:
            fix = f"does not know {', '.join(unknown[:5])}{' ...' * (len(unknown) > 5)}; use one that was trained on COCO"
            raise ConfigError("--detector", self.model.config.name_or_path, fix)


def _plain(label: str) -> str:
    label = label.lower()
    return SYNONYMS.get(label, label).replace(" ", "").replace("_", "")


class Instances(_OfKnownClasses):
    """Masks of objects. The protocol's detector is a Mask2Former (Swin-S, COCO instances)."""

    def __init__(self, model: Any, processor: Any):
        super().__init__(model, processor)
        seen = model.config.backbone_config
        size = getattr(seen, "embed_dim", None), [*getattr(seen, "depths", [])]
        self.difference = "" if size == (96, [2, 2, 18, 2]) else "a Mask2Former other than that of Swin-S"

    @torch.no_grad()
    def __call__(self, image: Image.Image, names: list[str], threshold: float) -> dict[str, list[Detected]]:
        inputs = self.processor(image, size=SIZE, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        shares = outputs.class_queries_logits[0].softmax(-1)  # (queries, classes + 1)
        found = {}
        for name in names:
            share = shares[:, self.numbers[_plain(name)]]
            likely = share > threshold  # the mask's factor can only lower the score
            # transformers' own post-processing makes masks of 384 x 384, which it stretches: here they are made at the picture's size
            logits = outputs.masks_queries_logits[:, likely].float()
            for size in (inputs.pixel_values.shape[-2:], image.size[::-1]):
                logits = interpolate(logits, size, mode="bilinear", align_corners=False) if likely.any() else logits
            found[name] = [one for one in map(_instance, share[likely], logits[0]) if one and one.score > threshold]
        return found


def _instance(share: Tensor, logits: Tensor) -> Detected | None:
    """An object whose score is the probability of its class times the mean probability of its mask's pixels (H, W)."""
    mask = logits > 0
    if not mask.any():
        return None
    score = share * logits[mask].sigmoid().mean()
    columns, rows = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (0, 1))
    return Detected((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), float(score), mask.cpu().numpy())


class Boxes(_OfKnownClasses):
    """Boxes of objects: DETR and its descendants, YOLOS."""

    difference = "boxes in place of masks"

    @torch.no_grad()
    def __call__(self, image: Image.Image, names: list[str], threshold: float) -> dict[str, list[Detected]]:
        inputs = self.processor(image, return_tensors="pt").to(self.model.device)
        [boxes] = self.processor.post_process_object_detection(self.model(**inputs), threshold, [image.size[::-1]])
        return {name: _detected(boxes, boxes["labels"] == self.numbers[_plain(name)], image) for name in names}


class OpenVocabulary:
    """Boxes of what a text names: OWL-ViT, OWLv2, Grounding DINO. Each class is asked by itself, so none depends on another."""

    difference = "an open-vocabulary detector, boxes in place of masks"

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    def check(self, names: list[str]) -> None:
        """Every class is known."""

    @torch.no_grad()
    def __call__(self, image: Image.Image, names: list[str], threshold: float) -> dict[str, list[Detected]]:
        found = {}
        for name in names:
            inputs = self.processor(images=image, text=[[f"a {name}"]], return_tensors="pt").to(self.model.device)
            outputs, sizes = self.model(**inputs), [image.size[::-1]]
            [boxes] = self.processor.post_process_grounded_object_detection(outputs, threshold=threshold, target_sizes=sizes)
            found[name] = _detected(boxes, boxes["scores"] > threshold, image)
        return found


def _detected(boxes: dict[str, Any], chosen: Tensor, image: Image.Image) -> list[Detected]:
    corners = boxes["boxes"][chosen].clamp(min=0).minimum(boxes["boxes"].new_tensor([*image.size, *image.size]))
    return [Detected(tuple(box), score) for box, score in zip(corners.tolist(), boxes["scores"][chosen].tolist())]
