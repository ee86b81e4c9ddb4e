"""WARM (arXiv 2401.12187): the reward model is the mean of K reward models' weights.

    torchrun -m variants.warm --rounds 3

Mutual-Taught's M-step trains one reward model. Here it trains K of them from the same base reward model, each
on the pairs in another order, and averages their weights: φ = 1/K Σ_k φ_k. An M-step takes K times as long,
but scoring costs what one reward model costs.

Different from the source: the paper's members also differ in learning rate, dropout and start; here they
differ in the order of the pairs alone, since the loop has one learning rate and no dropout. They start from
the base reward model, where the paper's share a pre-trained body and a head.
"""
from functools import partial

import torch

import mt
import reward
from common import run

K = 3
train = reward.train

def log_member(log, k, **values):
    log(member=k, **values)

def train_averaged(folder, pairs, *, seed, log, **settings):
    """Call reward.train K times. Returns the last model with the mean of all K models' weights."""
    mean = []
    for k in range(K):
        model = None  # frees the last member's memory for the next one
        model = train(folder, pairs, seed=seed + k, log=partial(log_member, log, k), **settings)
        weights = [weight.detach() / K for weight in model.parameters()]
        mean = [a + b for a, b in zip(mean, weights)] if k else weights
    with torch.no_grad():
        for weight, value in zip(model.parameters(), mean):
            weight.copy_(value)
    return model

if __name__ == "__main__":
    reward.train = train_averaged
    run.launch(mt.main)
