"""The Inception network of FID: the graph of 2015-12-05 that the ADM evaluator runs. The parameters are named as in torch-fidelity.

Not torchvision's network: the averages leave padding out, the last block has a maximum where others average, and there are 1,008 classes.
Written here and not taken from torch-fidelity, which unpickles its weights, lacks sFID's features and needs torchvision.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 299
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


class Inception(nn.Module):
    """Features of images (B, H, W, 3) uint8: see ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = Block(288, halve, [[C("branch3x3", 384, 3)], THRICE_3X3])
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        last = [C("branch7x7x3_1", 192, 1), C("branch7x7x3_2", 192, (1, 7)), C("branch7x7x3_3", 192, (7, 1)), C("branch7x7x3_4", 192, 3)]
        self.Mixed_7a = Block(768, halve, [[C("branch3x3_1", 192, 1), C("branch3x3_2", 320, 3)], last])
        self.Mixed_7b = _block_8(1280, average)
        self.Mixed_7c = _block_8(2048, maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """What the ADM evaluator takes from the graph.

        Args:
            images: (B, H, W, 3) uint8, resized here as the graph does.

        Returns:
            ``pool``: (B, 2048), of FID. ``spatial``: (B, 2023), of sFID (arXiv 2103.03841): the first 7 channels of ``mixed_6/conv``
            in the order (row, column, channel) of the published statistics. ``logits``: (B, 1008), of IS, without the bias.
        """
        x = (resize(images.permute(0, 3, 1, 2).float(), SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean((2, 3))
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class C(NamedTuple):
    """A convolution of a block."""

    name: str
    outputs: int
    kernel: int | tuple[int, int]


THRICE_3X3 = [C("branch3x3dbl_1", 64, 1), C("branch3x3dbl_2", 96, 3), C("branch3x3dbl_3", 96, 3)]


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class Block(nn.Module):
    """Branches side by side; their outputs are concatenated.

    Args:
        pool: before the last branch. With ``halve``, every branch ends with stride 2 and the last is the pooling alone.
        branches: of convolutions one after the other.
        forks: of each branch: convolutions side by side, at its end.
        pooled: outputs of the convolution after the pooling, if there is one.
    """

    def __init__(
        self, inputs: int, pool: Callable[[Tensor], Tensor], branches: list[list[C]], forks: list[list[C]] | None = None, pooled: int = 0
    ):
        super().__init__()
        self.pool, self.branches, self.forks, self.pooled = pool, branches, forks or [[]] * len(branches), pooled
        for branch, fork in zip(self.branches, self.forks, strict=True):
            width = inputs
            for step in branch:
                shrinks = pool is halve and step is branch[-1]
                self.add_module(step.name, Convolution(width, step.outputs, step.kernel, 1 + shrinks, not shrinks))
                width = step.outputs
            for step in fork:
                self.add_module(step.name, Convolution(width, step.outputs, step.kernel))
        if pooled:
            self.branch_pool = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, fork in zip(self.branches, self.forks, strict=True):
            y = x
            for step in branch:
                y = getattr(self, step.name)(y)
            outputs += [getattr(self, step.name)(y) for step in fork] if fork else [y]
        pooled = self.pool(x)
        return torch.cat([*outputs, self.branch_pool(pooled) if self.pooled else pooled], 1)


def _block_35(inputs: int, pooled: int) -> Block:
    """Of 35 x 35 positions."""
    branches = [[C("branch1x1", 64, 1)], [C("branch5x5_1", 48, 1), C("branch5x5_2", 64, 5)], THRICE_3X3]
    return Block(inputs, average, branches, pooled=pooled)


def _block_17(width: int) -> Block:
    """Of 17 x 17 positions."""
    once = [C("branch7x7_1", width, 1), C("branch7x7_2", width, (1, 7)), C("branch7x7_3", 192, (7, 1))]
    kernels: list[tuple[int, int | tuple[int, int]]] = [(width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))]
    twice = [C(f"branch7x7dbl_{i}", outputs, kernel) for i, (outputs, kernel) in enumerate(kernels, 1)]
    return Block(768, average, [[C("branch1x1", 192, 1)], once, twice], pooled=192)


def _block_8(inputs: int, pool: Callable[[Tensor], Tensor]) -> Block:
    """Of 8 x 8 positions."""
    branches = [[C("branch1x1", 320, 1)], [C("branch3x3_1", 384, 1)], [C("branch3x3dbl_1", 448, 1), C("branch3x3dbl_2", 384, 3)]]
    forks = [
        [C(f"{name}{letter}", 384, kernel) for letter, kernel in (("a", (1, 3)), ("b", (3, 1)))]
        for name in ("branch3x3_2", "branch3x3dbl_3")
    ]
    return Block(inputs, pool, branches, [[], *forks], pooled=192)


def resize(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, C, size, size) as TensorFlow 1 does bilinearly: pixel i is at i times the ratio, without half-pixel centres."""
    for axis in (3, 2):
        length = images.shape[axis]
        place = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        low = place.long()
        weight = (place - low).view(-1, *[1] * (3 - axis))
        left, right = images.index_select(axis, low), images.index_select(axis, (low + 1).clamp(max=length - 1))
        images = left + (right - left) * weight
    return images
