"""Samples from exported folders where neither this package nor DeepSpeed is: python diffusers_worker.py {NAME: FOLDER} OUT.pt"""

import importlib.util
import json
import sys


class Hiding:
    """A finder that does not see what this process shall do without."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ("ditmoe_ds", "deepspeed", "data_prep") else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Hiding, sys.meta_path)
assert importlib.util.find_spec("ditmoe_ds") is importlib.util.find_spec("deepspeed") is None
import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402

results = {}
for name, folder in json.loads(sys.argv[1]).items():
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline_ditmoe", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(3, *(pipe.config.latent_shape or (4, 8, 8)), generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 2.5):
        out = pipe(class_labels=[0, 1, 2], num_inference_steps=4, guidance_scale=scale, latents=noise, output_type="latent")
        results[f"{name}/{scale}"] = out.images
    drawn = [pipe([0], 1, generator=torch.Generator().manual_seed(s), output_type="latent").images for s in (0, 0, 1)]
    assert drawn[0].shape == noise[:1].shape
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(pipe(0, 1, generator=torch.Generator().manual_seed(0), output_type="latent").images, drawn[0])
    for wrong in (dict(output_type="jpg"), dict(num_inference_steps=0), dict(generator=[torch.Generator()] * 3)):
        try:
            pipe([0], **dict(num_inference_steps=1, output_type="latent") | wrong)
        except ValueError as error:
            assert str(error).startswith(next(iter(wrong)))
        else:
            raise AssertionError(wrong)
    for wrong in ("b_ird", ["b_ird"], [3]):
        try:
            pipe(wrong, 1, output_type="latent")
        except ValueError as error:
            assert str(error).startswith("class_labels") and "0..2" in str(error)
        else:
            raise AssertionError(wrong)
    if type(pipe.scheduler).__name__ == "DDIMScheduler":
        try:
            pipe([0], 3, output_type="latent")
        except ValueError as error:
            assert "num_inference_steps=3" in str(error)
        else:
            raise AssertionError("DDIM's steps are equal parts")
    if pipe.vae is not None:
        picture = pipe(class_labels=[0], num_inference_steps=1).images[0]
        assert picture.size == (32, 32) and picture.mode == "RGB"
        torch.testing.assert_close(
            pipe([0, 1], 4, latents=noise[:2], output_type="pt").images.permute(0, 2, 3, 1).numpy(),
            pipe([0, 1], 4, latents=noise[:2], output_type="np").images,
        )
        results["image"] = torch.from_numpy(pipe([0, 1, 2], 4, 2.5, latents=noise, output_type="np").images)
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)  # model_index.json names the code, too
        assert type(pipe).__name__ == "DiTMoEPipeline"
    else:
        try:
            pipe(class_labels=[0], num_inference_steps=1)
        except ValueError as error:
            assert "VAE" in str(error)
assert "ditmoe_ds" not in sys.modules and "deepspeed" not in sys.modules
torch.save(results, sys.argv[2])
