"""Try a stranger's grammar where it can do no harm: in a process of its own, with little time and memory.

The process is started once and reads one grammar after the other; one that takes too long ends it, and the next trial
starts another. Time is the process's own, so that a busy machine refuses nothing.
"""

import base64
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Sequence

SECONDS = 1
"""Processor time that a grammar may take to prepare."""
MEGABYTES = 1024
"""Memory of the process that tries it."""

LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 30_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""What a grammar may cost: the library counts, about 20 ms per token at most."""

# a process that does not even answer by then is stuck in something else than work
_PATIENCE = 60.0


class Trial:
    """The process and the vocabulary it was given. For several threads at once."""

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int], end_ids: Sequence[int]) -> None:
        """Args: tokens: bytes of each id. special_ids: those that are no text. end_ids: those that end an answer."""
        words = [base64.b64encode(token).decode() for token in tokens]
        self._process: subprocess.Popen[str] | None = None
        self._first = json.dumps({"tokens": words, "special": list(special_ids), "ends": list(end_ids)})
        self._lock = threading.Lock()

    def run(self, grammar: str) -> str:
        """Prepare a grammar; returns what is wrong with it, "" if nothing is."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = self._started()
            # a stuck process ends when its time is over, and with it the wait
            watch = threading.Timer(_PATIENCE, process.kill)
            watch.start()
            try:
                answer = self._asked(process, grammar)
            finally:
                watch.cancel()
        if answer is None:
            self.close()
            return f"it takes more than {SECONDS} s or {MEGABYTES} MiB to prepare; make it simpler"
        return answer

    def close(self) -> None:
        """End the process, if there is one; the next trial starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __del__(self) -> None:
        self.close()

    def _started(self) -> "subprocess.Popen[str]":
        # -P: nothing in the current folder is taken for a module
        command = [sys.executable, "-P", __file__]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self._first + "\n")
        return process

    @staticmethod
    def _asked(process: "subprocess.Popen[str]", grammar: str) -> str | None:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(grammar) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line else None


class _Words:
    is_tokenizer_wrapper = True

    def __init__(self, first: dict[str, list[str] | list[int]]) -> None:
        self.tokens = [base64.b64decode(str(word)) for word in first["tokens"]]
        self.special_token_ids, self.eos_token_id, self.bos_token_id = first["special"], first["ends"][0], None

        self._ids = {token: i for i, token in enumerate(self.tokens) if token}
        self._longest = max(map(len, self.tokens))

    def __call__(self, text: str) -> list[int]:
        # of the ways to write a text that must come any will do: the longest token first
        left, ids = text.encode(), []
        while left:
            n = next((n for n in range(self._longest, 0, -1) if left[:n] in self._ids), 0)
            if not n:
                break
            ids.append(self._ids[left[:n]])
            left = left[n:]
        return ids


def _main() -> None:
    import resource

    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    first = json.loads(sys.stdin.readline())
    words = LLTokenizer(_Words(first), eos_token=first["ends"])  # type: ignore[arg-type]
    limits = LLParserLimits(**LIMITS)
    # of data: what libraries have mapped does not count
    resource.setrlimit(resource.RLIMIT_DATA, (MEGABYTES << 20, MEGABYTES << 20))
    for line in sys.stdin:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(spent.ru_utime + spent.ru_stime) + 1 + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        matcher = LLMatcher(words, json.loads(line), limits=limits, log_level=0)
        # much of the work is done for the first token only
        if not matcher.is_error():
            matcher.compute_bitmask()
        error = " ".join(matcher.get_error().partition("\n<")[0].split()) if matcher.is_error() else ""
        sys.stdout.write(json.dumps(error[:500]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
