"""Whether a model is still put together as it was when its decode step was written down: its modules and hooks.

Looked at before every token, so in a few calls that loop outside of Python (0.5 % of a step of 45 M parameters). Not
seen is what is set on a module itself: `norm.eps`, `linear.number_format`, `forward`, `__class__`. Whoever changes
those makes new caches.
"""

from collections.abc import Iterable
from operator import is_

from torch import nn
from torch.nn.modules import module as registry


class Watch:
    """The modules of a model as they are now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
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
