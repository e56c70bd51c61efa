"""What every Hugging Face family offers: its config both ways, and its tensor names."""

from collections.abc import Callable
from dataclasses import dataclass

from plait.formats.error import CheckpointError
from plait.formats.families.fields import Fields
from plait.formats.rules import Names
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table of families.

    name: its `model_type`. architecture: the class name in `architectures`.
    read: config.json to our config. write: our config to the fields of config.json that are its own;
    CheckpointError saying why, where the family cannot express the model. names: rules of its tensors.
    copies_tied_head: tied embeddings are stored twice, because readers of this family do not tie them.
    """

    name: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, object]]
    names: Names
    copies_tied_head: bool = False


def shared_fields(fields: Fields) -> dict[str, object]:
    """What every family says alike: token ids, tied embeddings, initialisation."""
    return {
        "vocab_size": fields.whole("vocab_size"),
        "d_model": fields.whole("hidden_size"),
        "ties_embeddings": fields.flag("tie_word_embeddings", default=False),
        "init_std": fields.number("initializer_range", default=0.02),
        "bos_id": fields.token("bos_token_id"),
        "eos_ids": fields.tokens("eos_token_id"),
        "pad_id": fields.token("pad_token_id"),
    }


def write_shared(config: ModelConfig) -> dict[str, object]:
    """The reverse of `shared_fields`.

    Raises: CheckpointError for options of layers that no Hugging Face family has.
    """
    if extras := sorted({name for spec in config.layers for name in spec.extras()}):
        raise refuse(config.family or "a Hugging Face family", ", ".join(extras))
    eos = list(config.eos_ids)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "tie_word_embeddings": config.ties_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }


def one_of_kind(config: ModelConfig, symbol: str, family: str) -> LayerSpec | None:
    """The spec that all layers of a kind share, None if there is no such layer.

    Raises: CheckpointError if they differ, which no Hugging Face family can say.
    """
    specs = {spec for spec in config.layers if spec.symbol == symbol}
    if len(specs) > 1:
        raise CheckpointError(f"{family} cannot say that {symbol!r} layers differ in size; save as native")
    return next(iter(specs), None)


def refuse(family: str, what: str) -> CheckpointError:
    """The error for a model that a family cannot express."""
    return CheckpointError(f"{family} cannot express {what}; save as native")
