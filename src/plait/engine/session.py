"""A conversation that can be continued: its cache, the tokens in it, and its messages; saved to one small file.

What a hybrid remembers of a long conversation is a few states of constant size and the keys and values of a few
attention layers. With them a conversation goes on, after a restart, exactly where it was: nothing is read again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from plait.formats.folder import naming
from plait.model.cache import Cache
from plait.model.hybrid import Hybrid
from plait.text.chat import encode_chat
from plait.text.tokenizer import Tokenizer

KIND = "plait-session-2"
Message = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """Bytes of a cache: state_bytes are constant (Mamba-2), kv_bytes grow with every token (attention)."""

    state_bytes: int
    kv_bytes: int

    @property
    def n_bytes(self) -> int:
        """Both."""
        return self.state_bytes + self.kv_bytes


class Session:
    """One conversation. `Engine.stream(..., session=session)` reads and extends it.

    messages: what was said, for chats; the engine never looks at them. ids: the tokens that the cache has seen.
    cache: of one sequence; None while there is nothing to reuse.
    """

    def __init__(self, messages: Sequence[Message] = ()) -> None:
        self.messages: list[Message] = list(messages)
        self.ids: list[int] = []
        self.cache: Cache | None = None

    def forget(self) -> None:
        """Drop the cache: the next prompt is read from its beginning."""
        self.ids, self.cache = [], None

    def reusable(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens need not be read again: all that the cache has seen, or none.

        A state of Mamba-2 cannot be turned back, so a prompt that leaves the path anywhere starts anew.
        """
        n = len(self.ids)
        return n if self.cache is not None and n < len(prompt) and list(prompt[:n]) == self.ids else 0

    def prompt(self, tokenizer: Tokenizer) -> list[int]:
        """The messages as ids, by the tokenizer's template, and as a continuation of the cache where they are one."""
        return self.continued(encode_chat(tokenizer, self.messages), tokenizer)

    def continued(self, ids: list[int], tokenizer: Tokenizer) -> list[int]:
        """A prompt's ids as a continuation of the cache, if their text is one.

        The ids of an answer as they were drawn may differ from those of its text read again. So texts are compared:
        if the cache's is the beginning, only the rest becomes new ids.
        """
        n = len(self.ids)
        if self.cache is None or ids[:n] == self.ids:
            return ids
        whole, seen = (tokenizer.decode(part, skip_special=False) for part in (ids, self.ids))
        if not whole.startswith(seen):
            return ids
        longer = self.ids + tokenizer.encode(whole[len(seen) :])
        # some vocabularies put a space before every text; then the rest is not what it should be
        return longer if tokenizer.decode(longer, skip_special=False) == whole else ids

    def size(self) -> CacheSize:
        """Bytes of the cache, spare room not counted."""
        parts = {"state": 0, "kv": 0}
        for name, t in {} if self.cache is None else _state_tensors(self.cache).items():
            parts["kv" if name.endswith((".k", ".v")) else "state"] += t.numel() * t.element_size()
        return CacheSize(state_bytes=parts["state"], kv_bytes=parts["kv"])

    def save(self, path: str | Path, model: Hybrid) -> int:
        """Write the session to one file, which appears whole or not at all.

        Args:
            path: the file; replaced if it is there.
            model: whose cache it is.

        Returns: bytes written.
        """
        path = Path(path)
        tensors = {} if self.cache is None else {n: t.contiguous() for n, t in self.cache.tensors().items()}
        tensors["ids"] = torch.tensor(self.ids, dtype=torch.int64)
        facts = _facts(model) | {
            "kind": KIND,
            "messages": json.dumps(self.messages, ensure_ascii=False),
            "n_tokens": str(0 if self.cache is None else self.cache.n_tokens),
        }
        facts["sha256"] = _digest(facts, tensors)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with naming(path), aside.open("wb") as file:
                file.write(safetensors.torch.save(tensors, facts))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        return path.stat().st_size

    @classmethod
    def load(cls, path: str | Path, model: Hybrid) -> "Session":
        """Read what `save` wrote, for the same model in the same precision.

        Raises: FileNotFoundError; ValueError naming the file if it is broken or belongs to another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a session is saved first")
        try:
            with safe_open(path, framework="pt") as file:
                facts: Mapping[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a session, or is cut off: {error}") from None
        if facts.get("kind") != KIND:
            raise ValueError(f"{path} is not a session of plait (kind {facts.get('kind')!r}, expected {KIND!r})")
        if facts.get("sha256") != _digest(facts, tensors):
            raise ValueError(
                f"{path} was changed or damaged after it was saved (its SHA-256 differs); "
                "take a copy of it, or start a new session"
            )
        _check(path, facts, _facts(model))
        try:
            session = cls(json.loads(facts["messages"]))
            session.ids = tensors.pop("ids").tolist()
            if tensors:
                session.cache = model.cache(1)
                session.cache.replace({n: t.to(model.device) for n, t in tensors.items()}, int(facts["n_tokens"]))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a whole session: {error}") from None
        return session


def _state_tensors(cache: Cache) -> dict[str, torch.Tensor]:
    return {name: t for name, t in cache.tensors().items() if name.startswith("layers.")}


def _digest(facts: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of everything in the file but itself: a flipped bit of a state is a valid number."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in facts.items() if k != "sha256"}, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _facts(model: Hybrid) -> dict[str, str]:
    """What must agree for a cache to mean the same: sizes, weights (some of each tensor), precision."""
    config = model.config
    weights = hashlib.sha256()
    # codes of quantised weights are no parameters
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    sizes = json.dumps(config.to_dict() | {"name": ""}, sort_keys=True)
    return {
        "model": config.name or f"{config.family} {config.pattern}",
        "config": hashlib.sha256(sizes.encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "precision": f"{model.recipe.name} in {str(model.recipe.compute).removeprefix('torch.')}",
    }


def _check(path: Path, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    if theirs.get("config") != ours["config"]:
        raise ValueError(
            f"{path} belongs to the model {theirs.get('model')!r}, this is {ours['model']!r} of other sizes; "
            "load that model, or start a new session"
        )
    if theirs.get("precision") != ours["precision"]:
        raise ValueError(
            f"{path} was saved in precision {theirs.get('precision')!r}, this model runs in {ours['precision']!r}; "
            "load the model as then (--recipe, --dtype), or start a new session"
        )
    if theirs.get("weights") != ours["weights"]:
        raise ValueError(
            f"{path} belongs to a model {theirs.get('model')!r} with other weights; "
            "load those weights, or start a new session"
        )
