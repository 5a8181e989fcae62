"""The log-depth CRF beside torchcrf: forward + backward, and the best path, 32 chains of four tags.

Also the largest error of the float32 gradient of the emissions against float64.
"""

import torch
from torchcrf import CRF

from benchmarks.timing import best_s, machine
from model.crf import ScanCRF

CHAINS, TAGS, LENGTHS = 32, 4, (64, 256, 1024)


def gradient(crf: ScanCRF, emissions: torch.Tensor, tags: torch.Tensor, mask: torch.Tensor, *, loop: bool):
    emissions = emissions.detach().requires_grad_()
    if loop:
        CRF.forward(crf, emissions, tags, mask).backward()
    else:
        crf.log_likelihood(emissions, tags, mask).sum().backward()
    return emissions.grad


def main() -> None:
    torch.manual_seed(0)
    crf, precise = ScanCRF(TAGS), ScanCRF(TAGS).double()
    precise.load_state_dict(crf.state_dict())
    print(f"CRF, {CHAINS} chains, {TAGS} tags, float32; {machine()}")
    columns = ("tokens", "torchcrf", "ours", "", "decode", "ours", "", "errors of gradients")
    print("".join(f"{column:>10}" for column in columns))
    for length in LENGTHS:
        emissions, tags = torch.randn(CHAINS, length, TAGS), torch.randint(TAGS, (CHAINS, length))
        mask = torch.ones(CHAINS, length, dtype=torch.bool)
        given = emissions, tags, mask
        times = best_s(
            {
                "loop": lambda given=given: gradient(crf, *given, loop=True),
                "scan": lambda given=given: gradient(crf, *given, loop=False),
                "decode": lambda given=given: CRF.decode(crf, given[0], given[2]),
                "paths": lambda given=given: crf.best_paths(given[0], given[2]),
            }
        )
        want = gradient(precise, emissions.double(), tags, mask, loop=True)
        errors = [(gradient(crf, *given, loop=loop) - want).abs().max().item() for loop in (True, False)]
        pairs = [times[name] for name in ("loop", "scan", "decode", "paths")]
        cells = [f"{length:10d}"]
        for theirs, ours in (pairs[:2], pairs[2:]):
            cells.append(f"{theirs * 1e3:8.1f}ms{ours * 1e3:8.1f}ms{theirs / ours:9.1f}x")
        print("".join(cells), f"  {errors[0]:.0e}, {errors[1]:.0e}")


if __name__ == "__main__":
    main()
