"""Train on data of which one sample, seen in the first epoch of 40, is not a number; through a backward pass that overflows, everywhere
or in one rank's experts alone; or where one rank looked for the newest checkpoint just before that was saved."""

import os

import torch

from ditmoe_ds import train
from ditmoe_ds.distributed import checkpoint
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.latents.order import Order
from ditmoe_ds.models.attention import Attention
from ditmoe_ds.moe.experts import ExpertFFN

real_item, real_attention, real_experts = LatentDataset.__getitem__, Attention.forward, ExpertFFN.backward


def item(self, i):
    sample = real_item(self, i)
    bad = Order(*self.sets.values(), [1], 0, 16384).at(13, 1)[1]  # on the second of two ranks
    return sample._replace(latent=torch.full_like(sample.latent, torch.nan)) if i == bad else sample


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.inf


def experts(ctx, grad):
    gradients = real_experts(ctx, grad)
    if os.environ["RANK"] == "1":
        gradients[1].fill_(torch.inf)
    return gradients


def main(what, arguments):
    if what == "latents":
        LatentDataset.__getitem__ = item
    elif what == "early":
        if os.environ["RANK"] == "1":
            checkpoint.newest = lambda folder: sorted(folder.glob("step_*"))[-2]
    elif what == "experts":
        ExpertFFN.backward = staticmethod(experts)
    else:
        Attention.forward = lambda self, x, angles: real_attention(self, Overflow.apply(x), angles)
    return train.main(arguments)
