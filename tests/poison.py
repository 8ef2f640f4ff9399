"""Train on data of which one sample, seen in the first epoch of 40, is not a number."""

import torch

from ditmoe_ds import train
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.latents.order import epoch_order

real_item = LatentDataset.__getitem__


def item(self, i):
    latent, label = real_item(self, i)
    return (torch.full_like(latent, torch.nan) if i == int(epoch_order(0, 0, len(self))[10]) else latent), label


def main(arguments):
    LatentDataset.__getitem__ = item
    return train.main(arguments)
