"""Less memory where gradients flow: parts of a network are computed again on the way back, not kept (Chen et al., 2016,
1604.06174). The gradients are the same bits; a part costs its forward pass once more.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Values of one row from which on a part is computed again: at 512 x 512 all but the coarsest level, in the miniature
# nothing, where memory is no matter.
LARGE = 2**18


def made_again(run: Callable[..., Tensor], x: Tensor, *given: Tensor) -> Tensor:
    """run(x, *given), of which x (b, ...) is all that is kept for the way back where a gradient goes through a large x.

    run must hold no hook, which would look twice, and no weight that is exchanged for one call (`with_deltas`).
    """
    if torch.is_grad_enabled() and x.requires_grad and x[0].numel() >= LARGE:
        again: Tensor = checkpoint(run, x, *given, use_reentrant=False, preserve_rng_state=False)
        return again
    return run(x, *given)
