"""Small things to encode, and what the tests of ditmoe-data ask of a folder."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
import webdataset
from diffusers import AutoencoderKL
from PIL import Image

from data_prep.encode import encode
from data_prep.images import decode as decode_image
from ditmoe_ds.latents.manifest import Manifest

SETTINGS = {"size": ((16, 16),), "shard_size": 12, "holdout": 0.3, "batch": 4}


def write_inputs(root: Path) -> Path:
    """``vae/`` (random, 16x16 pixels -> 2x8x8) and ``images/`` (two classes, 40 files of several formats and sizes)."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(root / "vae")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = root / "images" / ("cat" if i % 2 else "ant") / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16 + i, 50, 3), dtype=np.uint8)).save(path)
    return root


def run_encode(inputs: Path, out: Path, source: str = "", **changes) -> Path:
    encode(source or f"folder:{inputs / 'images'}", changes.pop("vae", str(inputs / "vae")), str(out), **{**SETTINGS, **changes})
    return out


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples(folder: Path, split: str) -> list:
    manifest = Manifest.load(folder)
    readers = [manifest.open(shard) for shard in manifest.split(split).shards]
    return [reader.read(i) for reader in readers for i in range(len(reader))]


def pixels(item, size: int = 16) -> torch.Tensor:
    return torch.from_numpy(decode_image(item.image, [(size, size)])).permute(2, 0, 1)[None] / 127.5 - 1


def png(seed: int = 0, shape: tuple = (20, 24, 3)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def write_tar(path: Path, entries: list[dict]) -> None:
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as tar:
        for entry in entries:
            tar.write(entry)


def flip_bit(path: Path, place: int = 1500) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def assert_one_line(text: str, *words: str) -> None:
    lines = [line for line in text.splitlines() if line.startswith("ditmoe-data: error: ")]
    assert len(lines) == 1 and "Traceback" not in text
    for word in words:
        assert word in lines[0]


def word_tokenizer(*words: str):
    """A transformers tokenizer of these words, numbered from 3, that ends each caption with token 1."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    numbers = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_text_encoder(folder: Path, kind: str, words: tuple = ("a", "red", "square")) -> None:
    """A transformers folder with a tiny random model of width 12 and a tokenizer of words that ends each caption."""
    import transformers

    word_tokenizer(*words).save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
    size["vocab_size"] = 3 + len(words)
    if kind == "clip":
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**size, eos_token_id=1, pad_token_id=0))
    elif kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**size))
    elif kind == "roberta":
        model = transformers.RobertaModel(transformers.RobertaConfig(**size, pad_token_id=1))
    else:
        model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=6, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    model.save_pretrained(folder)
