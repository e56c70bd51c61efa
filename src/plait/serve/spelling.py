"""Token ids as OpenAI's log-probabilities spell them: a text, its bytes, and a number that JSON can hold."""

from plait.engine.request import Logprob
from plait.text.tokenizer import Tokenizer

# what stands for minus infinity
_LEAST = -9999.0


def spell(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that a token writes; of one that writes none, such as an end, those of its name."""
    return tokenizer.bytes_of(token_id) or (tokenizer.token_of(token_id) or "").encode()


def chat_logprob(tokenizer: Tokenizer, found: Logprob, n_top: int) -> dict[str, object]:
    """One token of a chat's log-probabilities, with its likeliest rivals."""
    entry = _entry(tokenizer, found.token_id, found.logprob)
    entry["top_logprobs"] = [_entry(tokenizer, token_id, value) for token_id, value in found.top[:n_top]]
    return entry


def completion_logprobs(tokenizer: Tokenizer, found: list[Logprob], n_top: int, offset: int) -> dict[str, object]:
    """A completion's log-probabilities, in the older form. `offset`: characters before the first token."""
    tokens = [_text(spell(tokenizer, each.token_id)) for each in found]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    tops = [
        {_text(spell(tokenizer, token_id)): _finite(value) for token_id, value in each.top[:n_top]} for each in found
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(each.logprob) for each in found],
        "top_logprobs": tops if n_top else None,
        "text_offset": offsets,
    }


def _entry(tokenizer: Tokenizer, token_id: int, value: float) -> dict[str, object]:
    raw = spell(tokenizer, token_id)
    return {"token": _text(raw), "logprob": _finite(value), "bytes": list(raw)}


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _finite(value: float) -> float:
    # also false for NaN
    return value if value > _LEAST else _LEAST
