"""What a compression is given besides its job: the model to learn from, and who watches, judges and is told."""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from plait.compress.verify import Judge
from plait.formats.checkpoint import Checkpoint
from plait.model.hybrid import Hybrid
from plait.train.metrics import Observer

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Teacher:
    """The model to learn from; read when a stage needs it, and let go of between stages.

    checkpoint: where it lies. identity: what it is (stages.identity_of). recipe: precision, None as it is stored.
    """

    checkpoint: Checkpoint
    identity: str
    device: str = "cpu"
    recipe: str | None = None
    held: dict[str | None, Hybrid] = field(default_factory=dict)

    def exact(self) -> Hybrid:
        """As it is stored."""
        return self._model(None)

    def taught(self) -> Hybrid:
        """In the precision in which it teaches."""
        return self._model(self.recipe)

    def let_go(self) -> None:
        """Give its memory back."""
        self.held.clear()
        gc.collect()

    def _model(self, recipe: str | None) -> Hybrid:
        if recipe not in self.held:
            self.held.clear()
            model = self.checkpoint.model(recipe=recipe, device=self.device)
            self.held[recipe] = model.requires_grad_(False).eval()
        return self.held[recipe]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a compression is given from outside. observe: makes what watches a run of so many updates.

    judge: gives the task scores of a model by name, None for none. say: told in words what goes on.
    """

    observe: Callable[[int], Sequence[Observer]] = lambda steps: ()
    judge: Judge | None = None
    judged: object = None
    say: Callable[[str], None] = log.info
