"""WARM (arXiv 2401.12187): the mean of K reward models' weights, from one base, each by its own data order.

    torchrun -m variants.warm --rounds 3

φ = 1/K Σ_k φ_k. The members start from the base RM, as the paper's share a pre-trained body and a head. There
they also differ in learning rate, dropout and start; here in the order of the pairs alone: the loop has one
learning rate and no dropout. An M-step takes K times as long; scoring costs what one RM costs.
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
    """reward.train, K times: the last member, with the mean of all members' weights."""
    mean = []
    for k in range(K):
        model = None  # makes room for the next one
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
