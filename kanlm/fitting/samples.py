"""Statistics of samples, equal on every rank of a distributed run.

Shapes: N samples, I inputs, Q stored quantiles.
"""

import torch
import torch.distributed as dist
from torch import Tensor

STORED_QUANTILES = 1025
"""Points of a rank's empirical quantile function that are exchanged; knots are read from their mixture."""


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks; x itself in a single process."""
    if is_distributed():
        x = x.clone()
        dist.all_reduce(x)
    return x


def finite_samples(samples: Tensor, inputs: int) -> Tensor:
    """samples [..., I] as fp64 [N, I].

    Raises, on every rank if on one:
        ValueError: another last dimension, or values that are not finite.
    """
    misshapen, broken = samples.shape[-1:] != (inputs,), (~samples.isfinite()).sum()
    counts = torch.stack((broken, *(broken.new_tensor(count) for count in (samples.numel(), misshapen))))
    broken, values, misshapen_ranks = summed_over_ranks(counts).tolist()
    if misshapen_ranks:
        raise ValueError(
            f"samples: the last dimension must be in_features {inputs}, got shape {tuple(samples.shape)}"
            + (
                "; pass what goes into the layer"
                if misshapen
                else f" here, but another on {misshapen_ranks} rank(s)"
            )
        )
    if broken:
        raise ValueError(
            f"samples: {broken} of {values} values are not finite; a refit needs finite values, "
            "so find the step that made them"
        )
    return samples.detach().reshape(-1, inputs).double()


def mixture_quantiles(samples: Tensor, levels: Tensor) -> Tensor:
    """Quantiles [levels, I] of the samples [N, I] of all ranks together.

    Each rank sends Q quantiles and its sample count; the quantiles of their weighted mixture are exact at the
    minimum and maximum and within 1/(Q-1) in rank elsewhere.

    Raises:
        ValueError: no samples on any rank.
    """
    counts = samples.new_tensor([len(samples)])
    points = torch.linspace(0, 1, STORED_QUANTILES, dtype=samples.dtype, device=samples.device)
    if len(samples):
        # quantile() is limited to 2^24 values, sorted columns are not.
        position = points * (len(samples) - 1)
        below = position.floor().long()
        above = (below + 1).clamp(max=len(samples) - 1)
        ordered = samples.sort(dim=0).values
        stored = ordered[below].lerp(ordered[above], (position - below).unsqueeze(-1))  # [Q, I]
    else:
        stored = samples.new_zeros(STORED_QUANTILES, samples.shape[-1])
    if is_distributed():
        gathered = [torch.empty_like(stored) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, stored.contiguous())
        all_counts = [torch.empty_like(counts) for _ in gathered]
        dist.all_gather(all_counts, counts)
        stored, counts = torch.stack(gathered), torch.cat(all_counts)
    else:
        stored = stored.unsqueeze(0)  # [ranks, Q, I]
    kept = counts > 0
    if not kept.any():
        raise ValueError("samples: got none; a grid needs at least one sample")
    stored, counts = stored[kept], counts[kept]
    if len(stored) == 1:
        values, ranks = stored[0], points.unsqueeze(-1).expand_as(stored[0]).contiguous()
    else:
        weights = (counts / counts.sum()).view(-1, 1, 1).expand_as(stored).flatten(0, 1)
        values, order = stored.flatten(0, 1).sort(dim=0, stable=True)
        mass = weights.gather(0, order).cumsum(0)
        ranks = (mass - mass[:1]) / (mass[-1:] - mass[:1])  # [ranks * Q, I], from 0 to 1
    above = torch.searchsorted(ranks.t().contiguous(), levels.expand(ranks.shape[-1], -1).contiguous())
    above = above.t().clamp(1, len(ranks) - 1)  # [levels, I]
    low, high = ranks.gather(0, above - 1), ranks.gather(0, above)
    share = ((levels.unsqueeze(-1) - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    return values.gather(0, above - 1).lerp(values.gather(0, above), share)


def share_of_samples(samples: Tensor) -> Tensor:
    """One over the number of samples [N, I] on all ranks together.

    Raises:
        ValueError: no samples on any rank.
    """
    count = summed_over_ranks(samples.new_tensor(float(len(samples)), dtype=torch.float64))
    if not count > 0:
        raise ValueError("samples: got none; a refit needs at least one sample")
    return 1 / count
