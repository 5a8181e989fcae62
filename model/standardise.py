"""Region features as a model takes them in: centred and scaled by the whole pictures of the training split.

Of these and not of all regions: where a box stands changes features more than what the picture shows, and
would drown it. The projection behind absorbs the map: it changes where training starts and how fast it goes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.examples import Question


def measured(questions: Sequence[Question], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean (width,) and axes of the training products' whole pictures; 0 and 1 where there is no picture.

    Axes of `shape` (width,) give each feature unit variance. Of `shape` (width, components) they give so many
    principal components unit variance, smaller ones less: variances below a thousandth of the largest are
    raised to about that before dividing; components that are left out are the smallest.
    """
    products = {q.product.asin: q.product.regions for q in questions}
    wholes = [regions[-1] for regions in products.values() if regions is not None]
    if not wholes:
        return torch.zeros(shape[0]), torch.ones(shape)
    features = np.stack(wholes).astype(np.float64)
    centred = features - features.mean(0)
    if len(shape) == 1:
        std = centred.std(0)
        axes = 1 / np.where(std < 1e-6, 1.0, std)
    else:
        variances, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
        variances, vectors = variances[::-1], vectors[:, ::-1]  # largest first
        kept = min(shape[1], int((variances > 1e-9 * variances[0]).sum()))
        axes = np.zeros(shape)
        axes[:, :kept] = vectors[:, :kept] / np.sqrt(variances[:kept] + 1e-3 * variances[0])
    return torch.from_numpy(features.mean(0)).float(), torch.from_numpy(axes).float()


def standardised(features: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """(..., width) to (..., width) or (..., components)."""
    centred = features - mean
    return centred @ axes if axes.dim() == 2 else centred * axes
