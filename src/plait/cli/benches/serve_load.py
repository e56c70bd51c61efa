"""What a server is asked, and when: lengths of prompts and answers, arrivals at random or a number of patient askers.

Open loop: requests come at the times of a Poisson process of a given rate, whether the server keeps up or not; waiting
counts from when a request was due. Closed loop: so many askers, each of whom asks again once it has its answer.
Everything is drawn from a seed, so that two servers are asked the same words at the same times.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from plait.cli.benches.serve_client import Heard

Ask = Callable[[str, int, float], Awaitable[Heard]]

# median, spread of the logarithm, least, most: lengths of a question and an answer among people who chat
CHAT = ((180, 1.0, 16, 2048), (160, 0.8, 8, 1024))
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some "
    "so these would other into has more her two like him see time could no make than first been its who now people "
    "my made over did down only way find use may water long little very after words called just where most know get "
    "through back much before go good new write our used me man too any day same right look think also around "
    "another came come work three word must because does part even place well such here take why things help put "
    "years different away again off went old number"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One request: lengths in tokens, and the seed of its words."""

    prompt: int
    answer: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Kinds of requests: (tokens of the prompt, of the answer, how often); none is the mix of a chat."""

    kinds: tuple[tuple[int, int, float], ...] = ()

    @classmethod
    def read(cls, text: str) -> "Mix":
        """ "chat", or "65536/1024", or "512/128:3,64/256:1": lengths and how often.

        Raises: ValueError for anything else.
        """
        if text == "chat":
            return cls()
        kinds = []
        for part in text.split(","):
            lengths, _, often = part.partition(":")
            prompt, _, answer = lengths.partition("/")
            try:
                kind = (int(prompt), int(answer), float(often or 1))
            except ValueError:
                kind = (0, 0, 0.0)
            if kind[0] < 1 or kind[1] < 1 or not 0 < kind[2] < math.inf:
                raise ValueError(
                    f"mix={text!r}: {part!r} is no kind of request; write chat, or PROMPT/ANSWER in tokens, "
                    "such as 8192/16384 or 512/128:3,64/256:1"
                )
            kinds.append(kind)
        return cls(kinds=tuple(kinds))

    def draw(self, n: int, seed: int) -> list[Wanted]:
        """n requests."""
        luck = random.Random(f"mix {seed}")
        found = []
        for _ in range(n):
            if self.kinds:
                prompt, answer, _ = luck.choices(self.kinds, [kind[2] for kind in self.kinds])[0]
            else:
                prompt, answer = (
                    min(max(round(median * math.exp(luck.gauss(0, spread))), least), most)
                    for median, spread, least, most in CHAT
                )
            found.append(Wanted(prompt=prompt, answer=answer, seed=luck.getrandbits(48)))
        return found

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return max((kind[0] + kind[1] for kind in self.kinds), default=CHAT[0][3] + CHAT[1][3])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """How many tokens a text of so many of our words has: fixed + per_word * words."""

    fixed: float
    per_word: float

    def text(self, n_tokens: int, seed: int) -> str:
        """A text of about n tokens, which nobody has asked before."""
        n_words = max(1, round((n_tokens - self.fixed) / self.per_word))
        return text_of(n_words, seed)


def text_of(n_words: int, seed: int) -> str:
    """Words in no order; what one says first is almost surely its own, so that no cache knows it."""
    luck = random.Random(f"words {seed}")
    return " ".join(luck.choice(WORDS) for _ in range(n_words))


def arrivals(n: int, rate: float, seed: int) -> list[float]:
    """Times of a Poisson process in seconds, the first at 0."""
    luck = random.Random(f"arrivals {seed}")
    return list(accumulate((luck.expovariate(rate) for _ in range(n - 1)), initial=0.0))


async def open_loop(ask: Ask, requests: Sequence[tuple[str, int]], times: Sequence[float]) -> list[Heard]:
    """Ask each at its time; answers in the order of the requests."""
    begin = time.perf_counter()

    async def one(request: tuple[str, int], at: float) -> Heard:
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        return await ask(*request, begin + at)

    return await asyncio.gather(*(one(*pair) for pair in zip(requests, times, strict=True)))


async def closed_loop(ask: Ask, requests: Sequence[tuple[str, int]], askers: int) -> list[Heard]:
    """Ask all of them, so many at a time; answers in the order of the requests."""
    found: dict[int, Heard] = {}
    left: Iterator[tuple[int, tuple[str, int]]] = iter(enumerate(requests))

    async def asker() -> None:
        # one iterator for all: each takes the next that nobody has
        for i, request in left:
            found[i] = await ask(*request, time.perf_counter())

    await asyncio.gather(*(asker() for _ in range(askers)))
    return [found[i] for i in range(len(requests))]
