"""Who else runs the model of a benchmark: transformers and llama.cpp, as far as asked for, installed and willing."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from plait.cli.bench import Inputs
from plait.cli.benches import frozen
from plait.cli.benches.llama_cpp import TYPES, LlamaBench, llama_benches
from plait.cli.benches.shapes import as_llama
from plait.cli.benches.sides import require_equal
from plait.cli.benches.theirs import Continued, transformers_model
from plait.model.hybrid import Hybrid
from plait.report import Report


class Peers:
    """The other sides of one recipe. theirs: transformers' model or None. llamas: llama.cpp's models by name.

    A peer that does not take part is named in the report, with the reason.
    """

    def __init__(self, report: Report, inputs: Inputs, name: str, recipe: str, model: Hybrid) -> None:
        """
        Args:
            report: where reasons and differences go.
            inputs: which peers, and where they are.
            name, recipe, model: ours.

        Raises: ValueError for a peer that is not installed, or a file that is not there.
        """
        self.report, self.recipe, self.patience, self.batch = report, recipe, inputs.patience, inputs.batch
        self.theirs: torch.nn.Module | None = None
        self.llamas: dict[str, LlamaBench] = {}
        self._last: tuple[int, float] | None = None
        # llama.cpp runs no squared ReLU and no sub-norms: it gets the nearest model that it can
        self.is_other = as_llama(model.config) != model.config
        if "transformers" in inputs.against:
            if recipe in frozen.AGREE:
                self.theirs = transformers_model(model)
            else:
                report.add(f"{recipe} transformers", "left out: it is measured in bf16 and fp32")
        if "llama.cpp" in inputs.against:
            if recipe in TYPES:
                threads = torch.get_num_threads()
                self.llamas = llama_benches(inputs.binary, inputs.gguf, name, recipe, model.config, threads)
            else:
                report.add(f"{recipe} llama.cpp", f"left out: it is measured in {', '.join(TYPES)}")

    @torch.inference_mode()
    def check(self, ours: Tensor) -> None:
        """Hold every peer's logits after the same prompt against ours.

        Args:
            ours: (V,) in the same numbers; in bf16 where weights are rounded, which each side does in its own way.

        Raises: DisagreementError.
        """
        ids = frozen.prompt(ours.shape[0], frozen.PROMPT)
        if self.theirs is not None:
            self._compare("transformers", ours, Continued(self.theirs, ids).logits[0].float())
        for name, llama in self.llamas.items():
            if self.is_other:
                self.report.add(f"{self.recipe} logits, difference to {name}", "other weights: only parameters counted")
                continue
            found = llama.logits(ids[0].tolist())
            if found is None:
                reason = "only parameters counted: no llama-logits beside llama-bench"
                self.report.add(f"{self.recipe} logits, difference to {name}", reason)
            else:
                self._compare(name, ours, found)

    def _compare(self, peer: str, ours: Tensor, found: Tensor) -> None:
        tolerance = frozen.AGREE.get(self.recipe) or frozen.AGREE_ROUNDED[self.recipe]
        difference = require_equal(f"{self.recipe}: ours and {peer}", ours, found, tolerance)
        self.report.add(f"{self.recipe} logits, difference to {peer}", difference, "relative")

    def remember(self, length: int, seconds: Mapping[str, Sequence[float]]) -> None:
        """Take note of how long transformers needed for a prompt."""
        if seconds.get("transformers"):
            self._last = length, min(seconds["transformers"])

    def has_patience(self, length: int, where: str) -> bool:
        """Whether transformers may try a prompt; its plain scan grows with the square of the number of chunks."""
        if self._last is None:
            return True
        last, seconds = self._last
        expected = seconds * (length / last) ** 2
        if expected <= self.patience:
            return True
        words = f"left out: one run would take up to {expected:.0f} s, after {seconds:.1f} s at {last} tokens"
        self.report.add(f"{where} transformers", words)
        return False
