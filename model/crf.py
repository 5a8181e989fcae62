"""A linear-chain CRF in log-depth, with the parameters of `torchcrf.CRF` and its results.

torchcrf walks along the time axis and starts a dozen small kernels at each step. Here the products of
transition matrices, which are associative, are taken in pairs: log2(T) steps, each over all of the axis.

Shapes: B chains, T tokens, C tags. `mask` (B, T) is True where a token is, a prefix of every row, never
empty.
"""

import torch
from torch import Tensor, nn

IMPOSSIBLE = -1e30  # finite, since the gradient of a logsumexp over nothing but -inf is not a number


class ScanCRF(nn.Module):
    """Parameters as in `torchcrf.CRF(num_tags)`, drawn as there; a `Tagger` gives it float32 or better."""

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        self.num_tags = num_tags
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        for drawn in self.parameters():
            nn.init.uniform_(drawn, -0.1, 0.1)

    def log_likelihood(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """Of each chain, (B,), from emissions (B, T, C) and tags (B, T)."""
        return self.path_score(emissions, tags, mask) - self.log_partition(emissions, mask)

    def path_score(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """The unnormalised score of each chain's tags, (B,)."""
        emitted = emissions.gather(2, tags[:, :, None]).squeeze(2) * mask
        pairs = tags[:, :-1] * self.num_tags + tags[:, 1:]
        # By index_select: of many equal indices a GPU sums the gradients of indexing one after another.
        moved = self.transitions.flatten().index_select(0, pairs.flatten()).view_as(pairs) * mask[:, 1:]
        last = tags.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        starts = self.start_transitions.index_select(0, tags[:, 0])
        ends = starts + self.end_transitions.index_select(0, last)
        return ends + emitted.sum(1) + moved.sum(1)

    def log_partition(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """log sum exp of the scores of all paths of each chain, (B,)."""
        emissions = emissions.permute(
            2, 1, 0
        ).contiguous()  # (C, T, B): kernels run along chains, not along tags
        on = mask.t()
        nothing = torch.full_like(self.transitions, IMPOSSIBLE).fill_diagonal_(0)[:, :, None, None]
        steps = self.transitions[:, :, None, None] + emissions[:, 1:]  # (C, C, T - 1, B), from tag to tag
        steps = torch.where(on[1:], steps, nothing)
        while (num_steps := steps.shape[2]) > 1:
            first, then = steps[:, :, 0 : num_steps - 1 : 2], steps[:, :, 1::2]
            joined = (first[:, :, None] + then[None]).logsumexp(1)
            steps = torch.cat([joined, steps[:, :, num_steps - num_steps % 2 :]], dim=2)
        score = self.start_transitions[:, None] + emissions[:, 0]  # (C, B)
        if steps.shape[2]:
            score = (score[:, None] + steps[:, :, 0]).logsumexp(0)
        return (score + self.end_transitions[:, None]).logsumexp(0)

    @torch.no_grad()
    def best_paths(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """The most probable tags of each chain (B, T), by Viterbi for all chains at once; 0 after its end."""
        score = self.start_transitions + emissions[:, 0]
        came_from = []
        stay = torch.arange(self.num_tags, device=emissions.device)
        for step in range(1, emissions.shape[1]):
            best, origin = (score[:, :, None] + self.transitions).max(1)
            on = mask[:, step, None]
            score = torch.where(on, best + emissions[:, step], score)
            came_from.append(torch.where(on, origin, stay))
        path = [(score + self.end_transitions).argmax(1)]
        for origin in reversed(came_from):
            path.append(origin.gather(1, path[-1][:, None]).squeeze(1))
        return torch.stack(path[::-1], 1) * mask
