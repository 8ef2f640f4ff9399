"""A small Fréchet distance while a model trains."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ditmoe_ds.errors import ConfigError
from ditmoe_ds.evaluation.extractors import load_extractor
from ditmoe_ds.evaluation.moments import Gaussian, Moments, frechet_distance
from ditmoe_ds.latents.vae import decode, load_vae
from ditmoe_ds.training.callbacks import HeldOut, Record, any_failed, due, read_heldout, sample_latents
from ditmoe_ds.training.plan import Plan
from ditmoe_ds.training.trainer import Trainer

WHAT = "Fréchet distance"


class FrechetDistance:
    """Records ``fd``, of samples by EMA's weights to held-out data. Both are decoded by the VAE, so that its own errors do not count. The
    samples take the classes or captions of the held-out data in turn. The ranks share the work. The number of images biases it: compare
    it only between steps and runs with the same ``train.fd_samples``.

    If samples cannot be read, or images decoded or scored, rank 0 says so and training continues.

    Raises:
        ConfigError, DataError: the VAE or the extractor cannot be loaded, or there are too few held-out samples.
    """

    def __init__(self, plan: Plan, device: torch.device):
        train = plan.recipe.train
        self.dataset = plan.open_heldout()
        if min(train.fd_samples, len(self.dataset)) < 2:
            raise ConfigError("train.fd_samples", train.fd_samples, f"at least 2; held out are {len(self.dataset)}, at least 2 are needed")
        self.samples = self.dataset.spread(train.fd_samples)
        self.extractor = load_extractor(train.fd_extractor, device, key="train.fd_extractor")
        self.width = self.extractor.features(torch.zeros(1, 64, 64, 3, dtype=torch.uint8, device=device))["pool"].shape[1]
        self.vae = load_vae(plan.manifest.vae, device, plan.manifest.vae_sha256)
        self.real: Gaussian | None = None

    def __call__(self, trainer: Trainer, record: Record) -> None:
        train = trainer.plan.recipe.train
        if not due(trainer.step, train.fd_every, train.steps):
            return
        shown = read_heldout(trainer, self.dataset, self.samples, train.fd_samples, WHAT)
        if shown is None:
            return
        trainer.engine.eval()
        with trainer.ema.applied(trainer.engine):
            made = self._gaussian(trainer, self._sampled(trainer, shown))
        trainer.engine.train()
        self.real = self.real or self._gaussian(trainer, self._real(trainer, shown))
        if made and self.real:
            record["fd"] = frechet_distance(made, self.real)

    def _sampled(self, trainer: Trainer, shown: list[HeldOut]) -> Iterator[Tensor]:
        """Latents of this rank's images. Collective: every rank has equally many parts."""
        for items, counted, batch in shown:
            yield sample_latents(trainer, items, list(trainer.conditioner.of(batch)))[:counted]

    def _real(self, trainer: Trainer, shown: list[HeldOut]) -> Iterator[Tensor]:
        """Latents of this rank's held-out samples, each once."""
        for items, counted, batch in shown:
            yield batch.latents[[i for i in range(counted) if items[i] < len(self.samples)]].to(trainer.device)

    def _gaussian(self, trainer: Trainer, parts: Iterable[Tensor]) -> Gaussian | None:
        """Of the features of decoded latents, over all ranks; None, on all, where a rank failed."""
        manifest, moments, failed = trainer.plan.manifest, Moments(self.width, trainer.device), None
        for latents in parts:
            if failed or not len(latents):
                continue
            try:
                images = decode(self.vae, latents, manifest.scaling_factor, manifest.shift_factor)
                moments.add(self.extractor.features(images)["pool"])
            except Exception as error:  # out of memory, for one: the others still need this rank to sample theirs
                failed = f"{type(error).__name__}: {error}"
        return None if any_failed(trainer, WHAT, failed) else moments.gaussian()
