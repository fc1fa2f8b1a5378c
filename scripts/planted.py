"""A kernel that writes behind its tensor: a sanitizer that does not complain about it sees nothing of ours either."""

import torch
import triton
import triton.language as tl


@triton.jit
def _planted_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0)


if __name__ == "__main__":
    short = torch.zeros(100, device="cuda")
    _planted_kernel[(1,)](short, BLOCK=1024)
    torch.cuda.synchronize()
