"""Values as JSON has them."""

import math
from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    """Tensors and tuples as lists, and None for NaN and infinities."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
