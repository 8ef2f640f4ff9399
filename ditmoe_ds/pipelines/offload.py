"""Sampling from models whose experts do not fit on the device."""

import torch
from torch import nn

from ditmoe_ds.moe.experts import PackedExperts


def keep_experts_on_the_host(model: nn.Module, device: torch.device) -> None:
    """Copy each layer's experts, which lie in host memory, to ``device`` when the layer runs, and let the copy go after it.

    The device holds the experts of one layer at a time. From page-locked memory (see ``empty_on_host``) the host does not wait for the
    copy; the device does, before it computes the layer.
    """
    for module in model.modules():
        if isinstance(module, PackedExperts):
            parameters = list(module.parameters())
            _visit(module, parameters, [parameter.data for parameter in parameters], device)


def _visit(module: nn.Module, parameters: list[nn.Parameter], hosts: list[torch.Tensor], device: torch.device) -> None:
    def fetch(*_: object) -> None:
        for parameter, host in zip(parameters, hosts, strict=True):
            parameter.data = host.to(device, non_blocking=True)

    def let_go(*_: object) -> None:
        for parameter, host in zip(parameters, hosts, strict=True):
            parameter.data = host

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(let_go)
