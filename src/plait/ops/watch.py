"""Whether a model is still put together as it was when its decode step was written down: its modules and hooks.

Before a token every object is far away, as weights have just streamed through the caches: a look at all modules and
weights takes 160 to 270 us, 4 to 6 % of a step of 45 M parameters. So it is taken when PyTorch has told of a new hook,
module, parameter or buffer, in whatever model (`news`), and at every 32nd token for what nobody is told: `del`,
`bias = None`, `.data = ...`. With the 10 us of asking for news that makes half a per cent. Not seen is what is set on a
module itself: `norm.eps`, `linear.number_format`, `forward`, `__class__`. Whoever changes those makes new caches.
"""

from collections.abc import Iterable
from functools import cache
from operator import is_

from torch import nn
from torch.nn.modules import module as registry
from torch.utils.hooks import RemovableHandle

# tokens from one look at everything to the next
TURNS = 32

_given = [0]


@cache
def _listen() -> None:
    """Have PyTorch tell of everything that any module is given."""

    def given(module: nn.Module, name: str, value: object) -> None:
        _given[0] += 1

    registry.register_module_module_registration_hook(given)
    registry.register_module_parameter_registration_hook(given)
    registry.register_module_buffer_registration_hook(given)


def news() -> tuple[int, int]:
    """Numbers that change with every hook that is added to any module, and everything that any is given."""
    return RemovableHandle.next_id, _given[0]


class Watch:
    """The modules of a model as they are now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        _listen()
        self._modules = list(modules)
        children = [(m._modules, name, child) for m in self._modules for name, child in m._modules.items()]
        self._homes, self._names, self._children = zip(*children, strict=True) if children else ((), (), ())
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [registry._global_forward_hooks, registry._global_forward_pre_hooks]

    def is_ours(self) -> bool:
        """Whether all compute what their classes say, in this package or in torch: no hooks, no classes of a user's."""
        ours = all(type(m).__module__.partition(".")[0] in ("plait", "torch") for m in self._modules)
        return ours and not any(self._hooks) and not any("forward" in vars(m) for m in self._modules)

    def is_same(self) -> bool:
        """Whether each module still has its children, and none has a hook."""
        return not any(self._hooks) and all(map(is_, map(dict.get, self._homes, self._names), self._children))
