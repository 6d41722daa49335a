"""Parameters of a module: one under a name of its own, and how they are drawn."""

from typing import Any

import flax.linen as nn


def draw_with(module: nn.Module, initializer: Any) -> Any:
    """Returns the initializer, or zeros for parameters that exist: Flax traces it each time to compare shapes."""
    return initializer if module.is_initializing() else nn.initializers.zeros_init()


class Weight(nn.Module):
    """A parameter under a name of its own."""

    leaf: str
    shape: tuple[int, ...]
    init: Any

    @nn.compact
    def __call__(self):
        return self.param(self.leaf, self.init, self.shape)
