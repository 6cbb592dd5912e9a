"""Scores of saliency by brute force, in NumPy and float64, without derivatives.

Weights are one flat vector: differences stand for derivatives, sums over all paths for
synaptic flow.
"""

import itertools
import math

import numpy as np


def gradient(f, at, step=1e-5) -> np.ndarray:
    """Return the gradient of ``f`` by central differences."""
    steps = step * np.eye(len(at))
    return np.array([(f(at + e) - f(at - e)) / (2 * step) for e in steps])


def hessian(f, at, step=1e-3) -> np.ndarray:
    """Return the Hessian of ``f`` by second differences, one entry at a time."""
    steps = step * np.eye(len(at))
    result = np.empty((len(at), len(at)))
    for i, j in itertools.product(range(len(at)), repeat=2):
        a, b = steps[i], steps[j]
        mixed = f(at + a + b) - f(at + a - b) - f(at - a + b) + f(at - a - b)
        result[i, j] = mixed / (4 * step**2)
    return result


def path_scores(layers) -> list[np.ndarray]:
    """Return for each weight of a chain of matrices the sum over the paths through it.

    The weight of a path is the product of the magnitudes along it.
    """
    scores = [np.zeros(layer.shape) for layer in layers]
    units = [layers[0].shape[0], *(layer.shape[1] for layer in layers)]
    for path in itertools.product(*map(range, units)):
        edges = list(itertools.pairwise(path))
        pairs = zip(layers, edges, strict=True)
        product = math.prod(abs(layer[edge]) for layer, edge in pairs)
        for score, edge in zip(scores, edges, strict=True):
            score[edge] += product
    return scores


def residual_scores(blocks, head) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the synaptic flow of ``h + relu(h @ a) @ b``, block by block, and a head.

    From products of what comes before a weight and what goes on behind it.
    """
    blocks = [(np.abs(a), np.abs(b)) for a, b in blocks]
    inputs = [np.ones(len(blocks[0][0]))]
    for a, b in blocks:
        inputs.append(inputs[-1] + inputs[-1] @ a @ b)
    behind = np.abs(head).sum(axis=1)
    of_head = inputs[-1][:, None] * np.abs(head)
    scores = []
    for (a, b), h in zip(reversed(blocks), reversed(inputs[:-1]), strict=True):
        of_b = (h @ a)[:, None] * b * behind
        of_a = h[:, None] * a * (b @ behind)
        scores.append((of_a, of_b))
        behind = behind + a @ (b @ behind)
    return scores[::-1], of_head
