"""Talk in turns: messages, a system text, and a session that reads each new turn only."""

from dataclasses import replace

from plait.engine.engine import Engine, TextStream
from plait.engine.request import Completion, Sampling
from plait.engine.session import Session
from plait.text.chat import CHATML, encode_chat
from plait.text.reasoning import switch_of, switched
from plait.text.tokenizer import Tokenizer

_PROBE = "plait"


class Conversation:
    """Turns of a user and a model. Read the stream that `ask` gives to its end (or close it), then `settle` it."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        session: Session | None = None,
        system: str = "",
        thinks: bool | None = None,
    ) -> None:
        """
        Args:
            engine: with a tokenizer.
            sampling: settings of the answers; the end of a turn is added to their stops. May be replaced at any time.
            session: an older conversation to go on with.
            system: opens a new conversation.
            thinks: whether the model reasons before it answers; None leaves that to its template.

        Raises: ValueError if the engine has no tokenizer, or the template of its model does not know reasoning.
        """
        if engine.tokenizer is None:
            raise ValueError("a chat needs a tokenizer; put the model's tokenizer.json beside its weights")
        self.engine, self.sampling, self.session = engine, sampling, session or Session()
        self._tokenizer = engine.tokenizer
        self._template = self._tokenizer.chat_template or CHATML
        if thinks is not None and switch_of(self._template) is None:
            raise ValueError(
                f"thinks={thinks}: the chat template of this model has no switch for reasoning; leave it out"
            )
        self.thinks = thinks
        self._end_ids, self._end_texts = end_of_turn(self._tokenizer)
        if system:
            self.instruct(system)

    def instruct(self, system: str) -> None:
        """Set the system text, or take it away with ""."""
        rest = [message for message in self.session.messages if message["role"] != "system"]
        self.session.messages = [{"role": "system", "content": system}, *rest] if system else rest

    def reset(self) -> None:
        """Forget all turns, but not the system text."""
        kept = [message for message in self.session.messages if message["role"] == "system"]
        self.session = Session(kept)

    def ask(self, text: str) -> TextStream:
        """Say something, and get the answer as it comes.

        Raises: ValueError if the template refuses the conversation; then the text is taken back.
        """
        self.session.messages.append({"role": "user", "content": text})
        try:
            messages, values = switched(self.session.messages, self._template, self.thinks)
            ids = encode_chat(self._tokenizer, messages, tools=None, add_generation_prompt=True, **values)
            prompt = self.session.continued(ids, self._tokenizer)
            s = self.sampling
            s = replace(s, stop=(*s.stop, *self._end_texts), stop_ids=(*s.stop_ids, *self._end_ids))
            return self.engine.stream(prompt, s, self.session)
        except ValueError:
            self.session.messages.pop()
            raise

    def settle(self, stream: TextStream) -> Completion:
        """Take the answer into the conversation."""
        completion = stream.completion
        self.session.messages.append({"role": "assistant", "content": completion.text})
        return completion


def end_of_turn(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What an assistant's turn ends with in this tokenizer's template.

    Many templates end a turn with a token that is not the end of a text, so that models never stop at the latter.

    Returns: ids to stop at, and texts to stop at; either may be empty.
    """
    turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    whole = tokenizer.decode(encode_chat(tokenizer, turns, add_generation_prompt=False), skip_special=False)
    mark = whole.rpartition(_PROBE)[2].strip()
    if not mark:
        return (), ()
    first = tokenizer.encode(mark)[0]
    hidden = not tokenizer.decode([first])
    return ((first,), ()) if hidden else ((), (mark,))
