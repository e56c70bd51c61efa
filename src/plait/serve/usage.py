"""Tokens counted as OpenAI counts them, over all answers of a request."""

from plait.engine.request import Usage


class Tally:
    """Adds up usages: a prompt counts once, whatever the number of its answers."""

    def __init__(self, state_bytes: int = 0) -> None:
        """
        Args:
            state_bytes: what each answer holds of a constant size.
        """
        self._state_bytes = state_bytes
        self._found: dict[tuple[int, int], Usage] = {}

    def add(self, prompt: int, index: int, usage: Usage | None) -> None:
        """Note what one answer has used."""
        if usage is not None:
            self._found[prompt, index] = usage

    def to_dict(self) -> dict[str, object]:
        """The object `usage`; `cache` is ours: bytes that the answers held at their ends."""
        firsts = {prompt: usage for (prompt, index), usage in sorted(self._found.items(), reverse=True)}
        n_prompt = sum(usage.prompt_tokens for usage in firsts.values())
        n_new = sum(usage.completion_tokens for usage in self._found.values())
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts.values())},
            "completion_tokens_details": {
                "reasoning_tokens": sum(usage.reasoning_tokens for usage in self._found.values())
            },
            "cache": self.cache(),
        }

    def cache(self) -> dict[str, int]:
        """Bytes that the answers held at their ends: of constant size, and growing with every token."""
        whole = sum(usage.cache_bytes for usage in self._found.values())
        state = min(self._state_bytes * len(self._found), whole)
        return {"state_bytes": state, "kv_bytes": whole - state}
