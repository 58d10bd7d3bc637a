"""How products and chains of small operations are computed in inference on a CPU; elsewhere they are as written.

What is chosen here changes speed and the last bits of a result, never what is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECE = 1 << 19  # floats for each thread: 2 MiB, about what a core caches for itself
SMALL = (
    1 << 24
)  # multiply-adds of a product that takes some 100 µs, of which a convolution's set-up would be 8


def plain_cpu(x: Tensor) -> bool:
    """Whether `x` meets eager fp32 inference on a CPU.

    Not with gradients (a training keeps its numbers to the last bit), and not where a graph is being recorded.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch.backends.mkldnn.is_available()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias over the last dimension, as `F.linear`; weight (outputs, inputs).

    In plain CPU inference a large one is a 1×1 convolution, which torch hands to oneDNN. `F.linear` goes to MKL,
    which on an AMD CPU with AVX-512 was half as fast (docs/LOG.md).
    """
    if not plain_cpu(x) or x.numel() * weight.shape[0] < SMALL:
        return F.linear(x, weight, bias)
    rows_1CN1 = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y_1CN1 = F.conv2d(rows_1CN1, weight[:, :, None, None], bias)
    return y_1CN1.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, *, dims: int, floats: int) -> Tensor:
    """`function(x)`, of a function that treats every item alone; the last `dims` dimensions of x make an item.

    In plain CPU inference it is called on a few items at a time, so that what lies between its operations stays in
    the cache, and no large block of memory is asked of the system anew, whose pages it would have to clear first.
    `floats` is the size of the largest tensor that the function makes of one item.
    """
    if not plain_cpu(x):
        return function(x)
    lead, item = x.shape[: x.dim() - dims], x.shape[x.dim() - dims :]
    size = max(1, PIECE * torch.get_num_threads() // floats)
    if lead.numel() <= size:
        return function(x)
    items = x.reshape(-1, *item)
    first = function(items[:size])
    out = first.new_empty(lead.numel(), *first.shape[1:])
    out[:size] = first
    for piece, target in zip(items[size:].split(size), out[size:].split(size), strict=True):
        target.copy_(function(piece))
    return out.view(*lead, *first.shape[1:])


class Linear(nn.Linear):
    """`nn.Linear`, computed by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, inputs) → (…, outputs)."""
        return product(x, self.weight, self.bias)
