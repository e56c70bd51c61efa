"""A checkpoint of any format: open it, build its model, write it in another format.

    checkpoint = Checkpoint.open("folder");  model = checkpoint.model();  checkpoint.save("other", "native")

Damage   `open` reads headers only; `model` and `save` first hold every byte against the checksums that the format
         records, if it does, because a flipped bit is a valid number.
Numbers  parameters keep the dtype in which they are stored, unless one is asked for; A_log, D, dt_bias and the router's
         correction are always float32 in memory. float16 is read, but computed in bfloat16: squared ReLU exceeds
         float16's largest number.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from plait.formats import FORMATS
from plait.formats.error import CheckpointError as CheckpointError
from plait.formats.folder import carried, whole_folder
from plait.formats.format import Contents, Format
from plait.formats.quantize import extends, holds_codes, quantized
from plait.formats.shards import MAX_SHARD_BYTES, Progress
from plait.formats.tensors import LazyTensor
from plait.formats.ternary import masters_of
from plait.model.hybrid import Hybrid, recipe_of
from plait.precision import RECIPES
from plait.precision.reading import needed
from plait.precision.recipe import ALWAYS_FLOAT32, PrecisionRecipe
from plait.precision.weight_only import CODED

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
PLAIN = ("bf16", "fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Contents):
    """The contents of a folder, and where they lie; tensors are read when they are needed."""

    folder: Path

    @staticmethod
    def open(path: str | Path, *, verify: bool = False) -> "Checkpoint":
        """Open a checkpoint folder of any format.

        Args:
            path: the folder.
            verify: also read every byte and hold it against the checksums, as `check` does.

        Raises: CheckpointError naming file, tensor or field of whatever is wrong.
        """
        folder = Path(path)
        found = format_of(folder)
        contents = found.read(folder)
        values = {f.name: getattr(contents, f.name) for f in fields(Contents)}
        checkpoint = Checkpoint(folder=folder, **values)
        if verify:
            checkpoint.check(required=True)
        return checkpoint

    def check(self, *, required: bool = False) -> None:
        """Read every byte and hold it against the checksums that the format records.

        Raises: CheckpointError naming the file that differs; or, if `required`, that there are no checksums.
        """
        verify = format_of(self.folder).verify
        if verify is not None:
            verify(self.folder)
        elif required:
            raise CheckpointError(
                f"{self.folder}: Hugging Face folders record no checksums; convert to native, which does"
            )

    @property
    def recipe(self) -> str:
        """Name (or table as JSON) of the recipe that the model needs; "bf16" or "fp32" for none in particular."""
        return self.config.recipe

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which most of it is stored; of what stays high where the rest are codes."""
        sizes: Counter[torch.dtype] = Counter()
        for name, tensor in self.tensors.items():
            if not name.endswith(CODED):
                sizes[tensor.dtype] += tensor.n_bytes
        return sizes.most_common(1)[0][0]

    def model(
        self,
        recipe: str | PrecisionRecipe | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        verify: bool | None = None,
    ) -> Hybrid:
        """Build the model and read its tensors straight into its parameters.

        Args:
            recipe: what products are computed in; None takes what the model needs, over `dtype`. A weight-only recipe
                ("int8", "int4-32-zero") quantises the weights as they are read.
            device: where; "auto" is the GPU if there is one, else the CPU.
            dtype: of the parameters, and of the products where no recipe is given; "auto" is as stored.
            verify: first check every byte; None where the format records checksums, True insists on them.

        Raises: ValueError for a dtype or device that cannot be used; ConfigError for an unknown recipe;
            CheckpointError naming the file that was damaged.
        """
        where, wanted = _device(device), _dtype(dtype)
        chosen = self._recipe(recipe, wanted)
        if chosen.weight_only and (not holds_codes(self) or extends(self.recipe, chosen)):
            return quantized(self, chosen, wanted).model(chosen, device, dtype, verify)
        with torch.device("meta"):
            model = Hybrid(self.config, chosen)
        if verify is not False:
            self.check(required=verify is True)
        for name, tensor in self.tensors.items():
            stored = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
            kept = name.endswith(ALWAYS_FLOAT32) and wanted != torch.float64
            held = torch.float32 if kept else wanted or stored
            out = torch.empty(tensor.shape, dtype=tensor.dtype if name.endswith(CODED) else held, device=where)
            tensor.copy_to(out)
            _put(model, name, out)
        model.origin = self.folder
        return model

    def save(
        self,
        path: str | Path,
        format: str = "hf",
        dtype: str | torch.dtype | None = None,
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: Progress | None = None,
        verify: bool | None = None,
    ) -> Path:
        """Write it in any format, one block at a time; arguments and errors are those of `save` and, for `verify`,
        of `model`."""
        if verify is not False:
            self.check(required=verify is True)
        provenance = {"parent": {"name": self.folder.resolve().name, **self.provenance}}
        return _save(replace(self, provenance=provenance), path, format, dtype, overwrite, max_shard_bytes, progress)

    def quantized(self, recipe: str | PrecisionRecipe, dtype: str | torch.dtype | None = None) -> "Checkpoint":
        """The same checkpoint with its weights as codes of a weight-only recipe; computed as they are read.

        Args:
            recipe: such as "int8" or "int4-32-zero".
            dtype: of what stays high; None for the recipe's own.

        Raises: ConfigError for an unknown recipe; CheckpointError for one without codes, or if it holds codes already.
        """
        chosen = recipe_of(recipe)
        if not chosen.weight_only:
            known = ", ".join(name for name, row in RECIPES.items() if row.weight_only)
            raise CheckpointError(f"recipe {chosen.name!r} holds no codes to quantise to; those that do: {known}")
        return quantized(self, chosen, None if dtype is None else _dtype(dtype))

    def dequantized(self, dtype: str | torch.dtype = "bfloat16") -> "Checkpoint":
        """The same checkpoint with masters in place of packed ternary codes: they round to the same codes and scales.

        Args:
            dtype: of all weights.

        Raises: CheckpointError if it holds no ternary codes.
        """
        if not self.recipe.startswith("ternary-packed"):
            raise CheckpointError(f"{self.folder}: the weights are {self.recipe}, no packed ternary codes to turn back")
        held = _dtype(dtype) or torch.bfloat16
        tensors = _cast(masters_of(self.config, self.tensors, held), held)
        return replace(self, config=replace(self.config, recipe="ternary"), tensors=tensors)

    def _recipe(self, recipe: str | PrecisionRecipe | None, wanted: torch.dtype | None) -> PrecisionRecipe:
        asked = None if recipe is None else recipe_of(recipe)
        is_more = asked is not None and extends(self.recipe, asked)
        is_other = asked is not None and self.recipe not in (asked.name, needed(asked))
        if holds_codes(self) and asked is not None and is_other and not is_more:
            raise CheckpointError(
                f"{self.folder}: its weights are {self.recipe} codes and cannot be computed as {asked.name}; "
                "leave out the recipe, or take the checkpoint that they were made from"
            )
        if asked is not None and (is_more or not holds_codes(self)):
            return asked.computing_in(wanted or asked.compute) if asked.weight_only else asked
        stored = torch.bfloat16 if self.dtype == torch.float16 else self.dtype
        compute = wanted or (torch.float32 if stored == torch.float64 else stored)
        if asked is None and self.recipe in PLAIN:
            return recipe_of("bf16" if compute == torch.bfloat16 else "fp32").computing_in(compute)
        return (asked or recipe_of(self.recipe)).computing_in(compute)


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    recipe: str | PrecisionRecipe | None = None,
    verify: bool | None = None,
) -> Hybrid:
    """Read a model from a checkpoint folder of any format; arguments and errors are those of `Checkpoint.model`.

    `load(path, dtype="float32", recipe="bf16")` gives float32 masters computed in bfloat16, as training wants them.
    """
    return Checkpoint.open(path).model(recipe=recipe, device=device, dtype=dtype, verify=verify)


def save(
    model: Hybrid,
    path: str | Path,
    format: str = "hf",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    *,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write a model as a checkpoint folder, which appears whole or not at all.

    Args:
        model: its parameters may be on any device.
        path: the folder to make.
        format: a name from plait.formats.FORMATS.
        dtype: to store in; None stores each parameter as it is. A_log, D, dt_bias and router corrections stay float32.
        overwrite: replace a checkpoint that is there already.
        tokenizer: folder whose tokenizer files go along; None takes them from where the model was loaded.
        max_shard_bytes: larger models are split into files of at most this size.
        progress: called with the number of bytes just written.

    Returns: the folder.
    Raises: CheckpointError if the format cannot express the model or the folder may not be replaced; OSError.
    """
    source = model.origin if tokenizer is None else Path(tokenizer)
    chosen = model.recipe
    recipe = needed(chosen) if chosen.is_needed else model.config.recipe
    parent = {} if model.origin is None else {"parent": {"name": model.origin.resolve().name}}
    contents = Contents(
        config=replace(model.config, recipe=recipe),
        tensors={name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()},
        files=() if source is None else carried(source),
        provenance=parent,
    )
    return _save(contents, path, format, dtype, overwrite, max_shard_bytes, progress)


def format_of(folder: Path) -> Format:
    """The format of a folder; CheckpointError if it is none that we read."""
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; give the folder of a checkpoint on this machine")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the folder that it lies in")
    for row in FORMATS.values():
        if row.detect(folder):
            return row
    raise CheckpointError(f"{folder} holds no checkpoint: neither plait.json nor config.json is in it")


def _save(
    contents: Contents,
    path: str | Path,
    format: str,
    dtype: str | torch.dtype | None,
    overwrite: bool,
    max_shard_bytes: int,
    progress: Progress | None,
) -> Path:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; known: {', '.join(FORMATS)}")
    if dtype is not None:
        contents = replace(contents, tensors=_cast(contents.tensors, _dtype(dtype)))
    row = FORMATS[format]
    tensors = row.plan(contents)
    n_bytes = sum(tensor.n_bytes for tensor in tensors.values())
    with whole_folder(Path(path), overwrite=overwrite, replaces=_is_checkpoint, n_bytes=n_bytes) as folder:
        row.write(contents, tensors, folder, max_shard_bytes, progress)
    return Path(path)


def _is_checkpoint(folder: Path) -> bool:
    return any(row.detect(folder) for row in FORMATS.values())


def _cast(tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    kept = {name: tensor.cast(torch.float32) for name, tensor in tensors.items() if name.endswith(ALWAYS_FLOAT32)}
    kept |= {name: tensor for name, tensor in tensors.items() if name.endswith(CODED)}
    return {
        name: kept.get(name) or (tensor if dtype is None else tensor.cast(dtype)) for name, tensor in tensors.items()
    }


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer that is on meta."""
    module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    is_parameter = leaf in module._parameters
    setattr(module, leaf, nn.Parameter(tensor) if is_parameter else tensor)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device of torch; write cpu, cuda or cuda:1") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no GPU here; use device='cpu' or a CUDA build of torch")
    return found


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A dtype to hold a model in; None for "auto"."""
    if dtype == "auto":
        return None
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return known
    why = (
        "squared ReLU exceeds its largest number"
        if dtype in ("float16", torch.float16)
        else "it is not one we compute in"
    )
    raise ValueError(f"dtype={dtype!r}: {why}; known: auto, {', '.join(DTYPES)}")
