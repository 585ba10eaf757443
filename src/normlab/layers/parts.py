"""A batch that lies in parts with several processes: statistics of the whole from one message.

Each process sends count n, mean μ and sum of squared deviations M of each channel, and joins
everyone's two by two (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm"):

    δ = μ₂ − μ₁,  n = n₁ + n₂
    μ = μ₁ + δ·n₂/n
    M = M₁ + M₂ + δ²·n₁·n₂/n

In float64, and never by E[x²] − E[x]². All join in the same order, so all get the same bits. The
gradient needs one message, too: the sums Σg and Σg·(x − μ), added up.
"""

import torch
from torch import Tensor

from normlab.core.groups import Group
from normlab.errors import UserError


def join(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The n, μ and M of all parts from those of each.

    Args:
        count: (P,), 0 for a part without values.
        mean, m2: (P, C).

    Returns:
        n (), μ and M (C,).
    """
    count = count.unsqueeze(1)  # (P, 1)
    while len(count) > 1:
        if len(count) % 2:  # a part without values changes nothing
            count, mean, m2 = (torch.cat([v, torch.zeros_like(v[:1])]) for v in (count, mean, m2))
        delta, total = mean[1::2] - mean[::2], count[::2] + count[1::2]
        share = count[1::2] / total.clamp(min=1)
        mean = mean[::2] + delta * share
        m2 = m2[::2] + m2[1::2] + delta.square() * count[::2] * share
        count = total
    return count[0, 0], mean[0], m2[0]


def joint_moments(group: Group, count: int, mean: Tensor, m2: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many values a channel has in all processes, their mean and biased variance (C,) float64.

    Args:
        count, mean, m2: of this process's own values; mean and m2 (C,) float64, zeros for none.

    Raises:
        UserError: in each process, where all of them have a single value a channel together.
    """
    everyone = group.gather(torch.cat([mean.new_tensor([count]), mean, m2]))
    channels = len(mean)
    total, mean, m2 = join(
        everyone[:, 0], everyone[:, 1 : channels + 1], everyone[:, channels + 1 :]
    )
    values = int(total)
    if values == 1:
        raise UserError(
            f"a training batch of {len(everyone)} processes holds 1 value a channel, too few for a "
            "variance: use a batch of two or more, or .eval() or .freeze()"
        )
    return values, mean, m2 / max(values, 1)
