"""The log-depth CRF beside torchcrf: forward + backward, and the best path, 32 chains of four tags.

Also the largest error of the float32 gradient of the emissions against float64.
"""

from functools import partial

import torch
from torchcrf import CRF

from benchmarks.timing import best_s, machine
from model.crf import ScanCRF

CHAINS, TAGS, LENGTHS = 32, 4, (64, 256, 1024)


def gradient(
    crf: CRF | ScanCRF, emissions: torch.Tensor, tags: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    emissions = emissions.detach().requires_grad_()
    if isinstance(crf, ScanCRF):
        crf.log_likelihood(emissions, tags, mask).sum().backward()
    else:
        crf(emissions, tags, mask).backward()
    assert emissions.grad is not None
    return emissions.grad


def main() -> None:
    torch.manual_seed(0)
    loop, scan, precise = CRF(TAGS, batch_first=True), ScanCRF(TAGS), CRF(TAGS, batch_first=True).double()
    for crf in (scan, precise):
        crf.load_state_dict(loop.state_dict())
    print(f"CRF, {CHAINS} chains, {TAGS} tags, float32; {machine()}")
    columns = ("tokens", "torchcrf", "ours", "", "decode", "ours", "", "errors of gradients")
    print("".join(f"{column:>10}" for column in columns))
    for length in LENGTHS:
        emissions, tags = torch.randn(CHAINS, length, TAGS), torch.randint(TAGS, (CHAINS, length))
        mask = torch.ones(CHAINS, length, dtype=torch.bool)
        given = emissions, tags, mask
        times = best_s(
            {
                "loop": partial(gradient, loop, *given),
                "scan": partial(gradient, scan, *given),
                "decode": partial(loop.decode, emissions, mask),
                "paths": partial(scan.best_paths, emissions, mask),
            }
        )
        want = gradient(precise, emissions.double(), tags, mask)
        errors = [(gradient(crf, *given) - want).abs().max().item() for crf in (loop, scan)]
        pairs = [times[name] for name in ("loop", "scan", "decode", "paths")]
        cells = [f"{length:10d}"]
        for theirs, ours in (pairs[:2], pairs[2:]):
            cells.append(f"{theirs * 1e3:8.1f}ms{ours * 1e3:8.1f}ms{theirs / ours:9.1f}x")
        print("".join(cells), f"  {errors[0]:.0e}, {errors[1]:.0e}")


if __name__ == "__main__":
    main()
