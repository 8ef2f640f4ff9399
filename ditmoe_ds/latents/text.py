"""Captions to tokens, by a frozen text encoder of transformers."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ditmoe_ds.errors import ConfigError, DataError, loading


def text_width(path_or_id: str, key: str) -> int:
    """Width of an encoder's tokens, from its config alone.

    Raises:
        DataError: there is no such model.
    """
    return int(_text_config(path_or_id, key).hidden_size)


def encoder_bytes(path_or_id: str, key: str) -> int:
    """Bytes of an encoder's weights on a GPU, from its config alone. Raises as ``text_width``."""
    import transformers

    config = _text_config(path_or_id, key)
    with torch.device("meta"):
        if config.model_type == "clip_text_model":
            model = transformers.CLIPTextModel(config)
        else:
            model = transformers.AutoModelForTextEncoding.from_config(config, trust_remote_code=False)
    return 2 * sum(parameter.numel() for parameter in model.parameters())  # bf16


def _text_config(path_or_id: str, key: str) -> Any:
    import transformers

    with loading(f"{key}={path_or_id!r}: neither a folder nor a hub id of a transformers model"):
        config = transformers.AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    return config.text_config if config.model_type == "clip" else config


def load_text_encoder(
    path_or_id: str, max_tokens: int, device: str | torch.device, keys: tuple[str, str] = ("--text", "--text-max-tokens")
) -> TextEncoder:
    """Load a T5, CLIP, BERT or other text encoder.

    Args:
        path_or_id: local folder, or hub id; safetensors only, and no code of the model's own, whose use transformers would else ask for.
        keys: what the user calls ``path_or_id`` and ``max_tokens``, for errors.

    Raises:
        DataError: there is no such model, or it is no text encoder.
        ConfigError: it cannot take ``max_tokens`` tokens.
    """
    import transformers  # takes seconds

    with loading(f"{keys[0]}={path_or_id!r}: neither a folder nor a hub id with a readable text encoder"):
        config = transformers.AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
        # A whole CLIP has an image half too, which this class leaves out.
        cls = transformers.CLIPTextModel if config.model_type == "clip" else transformers.AutoModelForTextEncoding
        tokenizer = transformers.AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32  # bf16 is slow on most CPUs
        model: Any = cls.from_pretrained(path_or_id, use_safetensors=True, dtype=dtype, trust_remote_code=False)
    positions = getattr(model.config, "max_position_embeddings", max_tokens)
    if "roberta" in model.config.model_type:  # positions begin after the padding token's id
        positions -= model.config.pad_token_id + 1
    if max_tokens > positions:
        raise ConfigError(keys[1], max_tokens, f"at most {positions} with this encoder")
    return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer, max_tokens, path_or_id, keys[1])


class TextEncoder:
    """The last hidden states of a text encoder of transformers.

    Args:
        max_tokens: longer captions are cut; the first is printed, and ``cut`` counts them.
        name, limit: what the user calls the encoder and ``max_tokens``, for messages.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int, name: str = "of the pipeline", limit: str = "max_tokens"):
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.name, self.limit, self.cut = name, limit, 0
        self.width = int(model.config.hidden_size)

    def __call__(self, captions: list[str]) -> list[Tensor]:
        """For each caption (tokens, width) bfloat16 on the CPU, without padding; an empty caption has its special tokens."""
        states, mask = self.padded(captions)
        return [state[valid] for state, valid in zip(states.cpu(), mask.cpu())]

    @torch.no_grad()
    def padded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """For B captions (B, T, width) bfloat16, 0 behind the end of a caption, and (B, T), true for tokens, on the encoder's device.
        The host does not wait for them.

        Raises:
            DataError: the encoder has no token for a caption.
        """
        captions = [caption.encode(errors="replace").decode() for caption in captions]  # some were cut in the middle of an emoji
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        mask = tokens["attention_mask"]
        if none := [caption for caption, count in zip(captions, mask.sum(1).tolist()) if not count]:
            raise DataError(f"text encoder {self.name!r} has no token for the caption {none[0]!r}; choose another")
        if self.model.device.type != "meta":  # else accelerate holds the weights, and moves the inputs itself
            tokens = tokens.to(self.model.device)
        self._count_cut([caption for caption, full in zip(captions, (mask.sum(1) >= self.max_tokens).tolist()) if full])
        states = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"].bool().to(states.device)
        return states.to(torch.bfloat16).masked_fill(~mask[..., None], 0), mask

    def _count_cut(self, captions: list[str]) -> None:
        """Count which of these captions, which fill ``max_tokens``, were cut, and print the first ever."""
        lengths = [len(self.tokenizer(caption, verbose=False)["input_ids"]) for caption in captions]
        longer = [(length, caption) for length, caption in zip(lengths, captions) if length > self.max_tokens]
        if longer and not self.cut and int(os.environ.get("RANK", 0)) == 0:
            length, caption = longer[0]
            print(f"{self.limit}={self.max_tokens}: a caption of {length} tokens is cut, and so are others: {caption[:80]!r}", flush=True)
        self.cut += len(longer)
