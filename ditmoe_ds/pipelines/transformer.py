"""Our DiT as diffusers saves and loads models."""

from dataclasses import asdict
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ditmoe_ds import config
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.models.dit import DiT, DiTConfig


class DiTMoETransformer(ModelMixin, ConfigMixin):
    """A ``DiT`` and the objective it was trained with.

    Args:
        model: fields of ``DiTConfig``.
        diffusion: fields of ``DiffusionConfig``.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012 (as diffusers declares it)

    @register_to_config
    def __init__(self, model: dict[str, Any], diffusion: dict[str, Any]):
        super().__init__()
        self.dit = DiT(config.build(DiTConfig, model))
        self.diffusion = config.build(DiffusionConfig, diffusion)

    @classmethod
    def of(cls, dit: DiT, diffusion: DiffusionConfig) -> "DiTMoETransformer":
        """Wrap an existing model; its memory is shared."""
        with torch.device("meta"):
            made = cls(asdict(dit.config), asdict(diffusion))
        made.dit = dit
        return made

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """As ``DiT.forward``."""
        return self.dit(x, t, **condition)
