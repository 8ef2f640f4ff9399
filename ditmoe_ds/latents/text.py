"""Captions to tokens, by a frozen text encoder of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditmoe_ds.errors import ConfigError, DataError


def text_width(path_or_id: str, key: str) -> int:
    """Width of an encoder's tokens, from its config alone.

    Raises:
        DataError: there is no such model.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path_or_id)
    except Exception as error:  # the hub and the configs each fail in their own way
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{key}={path_or_id!r}: neither a folder nor a hub id of a transformers model ({reason})") from error
    return int((config.text_config if config.model_type == "clip" else config).hidden_size)


class TextEncoder:
    """The last hidden states of a T5, CLIP, BERT or other text encoder.

    Args:
        path_or_id: local folder, or hub id; safetensors only, and no code of the model's own.
        max_tokens: longer captions are cut.
        keys: what the user calls these two, for errors.

    Raises:
        DataError: there is no such model, or it is no text encoder.
        ConfigError: it cannot take so many tokens.
    """

    def __init__(
        self, path_or_id: str, max_tokens: int, device: str | torch.device, keys: tuple[str, str] = ("--text", "--text-max-tokens")
    ):
        import transformers  # takes seconds

        try:
            config = transformers.AutoConfig.from_pretrained(path_or_id)
            # A whole CLIP has an image half too, which this class leaves out.
            cls = transformers.CLIPTextModel if config.model_type == "clip" else transformers.AutoModelForTextEncoding
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path_or_id)
            model: Any = cls.from_pretrained(path_or_id, use_safetensors=True, dtype=torch.float32)
        except Exception as error:  # the hub, the configs and the weights each fail in their own way
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{keys[0]}={path_or_id!r}: neither a folder nor a hub id with a readable text encoder ({reason})") from error
        self.model = model.to(device).eval().requires_grad_(False)
        positions = getattr(self.model.config, "max_position_embeddings", max_tokens)
        if max_tokens > positions:
            raise ConfigError(keys[1], max_tokens, f"at most {positions} with this encoder")
        self.name, self.max_tokens = path_or_id, max_tokens
        self.width = int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> list[Tensor]:
        """For each caption (tokens, width) bfloat16 on the CPU, without padding; an empty caption has its special tokens."""
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt").to(
            self.model.device
        )
        mask = tokens["attention_mask"]
        states = self.model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state.to(torch.bfloat16).cpu()
        found = [state[valid] for state, valid in zip(states, mask.bool().cpu())]
        if not all(map(len, found)):
            raise DataError(f"text encoder {self.name!r} has no token for an empty caption; choose another")
        return found
