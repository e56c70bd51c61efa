"""A loaded model with all that the routes need to know of it, and the state of the house it is served in."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ParamSpec, TypeVar

from plait.engine.conversation import end_of_turn
from plait.engine.request import Load
from plait.engine.worker import Worker
from plait.serve.error import RequestError
from plait.serve.keys import Keys
from plait.serve.limits import Gate, Limits
from plait.serve.metrics import Metrics
from plait.serve.sessions import Sessions
from plait.text.tokenizer import Tokenizer

P = ParamSpec("P")
R = TypeVar("R")

# reading prompts is short work that mostly runs outside of Python's lock; two hands are enough beside the engine, and
# one for what takes long, so that the others need not wait for it
_HANDS = 2
LONG_BODY = 1 << 17


class Phase(StrEnum):
    """Where a server is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One model behind the routes.

    name: what requests call it. context: tokens that a prompt and its answer may have together. longest_token: bytes
    of it. facts: what /v1/models tells of it besides. end_ids, end_texts: what ends an assistant's turn. sessions: None
    keeps none.
    """

    worker: Worker
    tokenizer: Tokenizer
    name: str
    context: int
    vocab_size: int
    longest_token: int = 1 << 10
    facts: Mapping[str, object] = field(default_factory=dict)
    created: int = 0
    end_ids: tuple[int, ...] = ()
    end_texts: tuple[str, ...] = ()
    sessions: Sessions | None = None

    @classmethod
    def of(
        cls,
        worker: Worker,
        name: str,
        context: int,
        facts: Mapping[str, object] | None = None,
        sessions: Sessions | None = None,
    ) -> "Served":
        """Look at the engine behind a worker.

        Raises: ValueError if it has no tokenizer.
        """
        tokenizer = worker.engine.tokenizer
        if tokenizer is None:
            raise ValueError("a server needs a tokenizer; put the model's tokenizer.json beside its weights")
        ids, texts = end_of_turn(tokenizer)
        return cls(
            worker=worker,
            tokenizer=tokenizer,
            name=name,
            context=context,
            vocab_size=worker.engine.model.config.vocab_size,
            longest_token=max(len(tokenizer.bytes_of(i) or b"") for i in range(tokenizer.vocab_size)),
            facts=facts or {},
            created=int(time.time()),
            end_ids=ids,
            end_texts=texts,
            sessions=sessions,
        )

    @property
    def state_bytes(self) -> int:
        """What an answer holds of a constant size; 0 if nobody has said."""
        found = self.facts.get("state_bytes", 0)
        return found if isinstance(found, int) else 0

    def check_length(self, n_characters: int, field: str) -> None:
        """Whether a text could fit at all, before the time is spent to find out how many tokens it has.

        Raises: RequestError naming the field.
        """
        most = self.context * self.longest_token
        if n_characters > most:
            raise RequestError(
                f"{field} has {n_characters} characters; {self.context} tokens, the context, hold at most {most}",
                field,
                code="context_length_exceeded",
            )

    def check_name(self, asked: str | None) -> None:
        """Whether a request means this model.

        Raises: RequestError 404.
        """
        if asked is not None and asked != self.name:
            raise RequestError(
                f"there is no model {asked[:64]!r} here, only {self.name!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    def kept_sessions(self) -> Sessions:
        """Where sessions are kept.

        Raises: RequestError 404 if nowhere.
        """
        if self.sessions is None:
            raise RequestError("this server keeps no sessions; start it with --sessions FOLDER", "session", status=404)
        return self.sessions


class House:
    """What lives as long as the server: limits, keys, figures, and the model once it is loaded."""

    def __init__(self, limits: Limits, keys: Keys) -> None:
        """
        Args:
            limits: of requests.
            keys: who may ask.
        """
        self.limits, self.keys = limits, keys
        self.gate = Gate(limits.open)
        # tokenising is asked for apart from answers, and must not take their places
        self.desk = Gate(64)
        self.metrics = Metrics(self._load, lambda: (self.gate.open, self.gate.most))
        self._served: Served | None = None
        self._is_draining = False
        self._hands = ThreadPoolExecutor(_HANDS, "plait-prompts")
        self._slow_hand = ThreadPoolExecutor(1, "plait-long-prompts")

    @property
    def phase(self) -> Phase:
        """Where the server is in its life, judged anew at every look."""
        if self._is_draining:
            return Phase.DRAINING
        if self._served is None:
            return Phase.LOADING
        return Phase.READY if self._served.worker.is_alive else Phase.FAILED

    def open(self, served: Served) -> None:
        """Begin to serve a model."""
        self._served = served

    def drain(self) -> None:
        """Take no more requests."""
        self._is_draining = True

    def close(self) -> None:
        """End the threads; what still runs is cancelled."""
        if self._served is not None:
            self._served.worker.close(drain=False, timeout_s=10)
        for hands in (self._hands, self._slow_hand):
            hands.shutdown(wait=False, cancel_futures=True)

    @property
    def served(self) -> Served:
        """The model.

        Raises: RequestError 503 while it is loaded, when the server drains, or if the engine has failed.
        """
        phase = self.phase
        if self._served is None or phase is not Phase.READY:
            why = {Phase.LOADING: "the model is being loaded", Phase.DRAINING: "the server is about to stop"}
            wait = {Phase.LOADING: 5, Phase.DRAINING: 1}
            raise RequestError(
                why.get(phase, "the engine has failed, see the server's log"),
                status=503,
                code=str(phase),
                retry_after=wait.get(phase),
            )
        return self._served

    async def by_hand(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do something that takes its time beside the event loop; with a long body it takes longer."""
        is_long = any(isinstance(arg, bytes) and len(arg) > LONG_BODY for arg in args)
        hands = self._slow_hand if is_long else self._hands
        return await asyncio.get_running_loop().run_in_executor(hands, lambda: work(*args, **kwargs))

    def _load(self) -> Load | None:
        return None if self._served is None else self._served.worker.load()
