"""From the bodies of the routes to requests of the engine: templates, ids, sampling, constraints, lengths."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.engine.request import Request, Sampling
from plait.serve.constrain import constraint_of, tools_of
from plait.serve.error import RequestError
from plait.serve.limits import Limits
from plait.serve.protocol import ChatBody, CompletionBody, Message, Part, Sampled
from plait.serve.served import Served
from plait.serve.turn import Turn
from plait.text.chat import CHATML, encode_chat
from plait.text.reasoning import switched

_MASK = 2**63 - 1
_COLD = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one HTTP request wants of the engine. prompts: as texts, if to be repeated. turn: of a session."""

    requests: tuple[Request, ...]
    prompts: tuple[str, ...] = ()
    turn: Turn | None = None

    @property
    def n_answers(self) -> int:
        """How many answers will be made."""
        return sum(request.n for request in self.requests)


def ask_chat(body: ChatBody, served: Served, limits: Limits, request_id: str) -> Asked:
    """A conversation to a request.

    Raises: RequestError naming the field.
    """
    served.check_name(body.model)
    _check_answers(body.n, limits)
    new = [plain(message, served) for message in body.messages]
    if body.session is None:
        return Asked(requests=(_chat_request(body, served, limits, request_id, new, None),))
    if body.n > 1:
        raise RequestError(f"n is {body.n}, but a session goes on with one answer", "n")
    turn = Turn(served.kept_sessions(), body.session, new)
    try:
        return Asked(requests=(_chat_request(body, served, limits, request_id, turn.messages, turn),), turn=turn)
    except BaseException:
        turn.leave()
        raise


def _chat_request(
    body: ChatBody,
    served: Served,
    limits: Limits,
    request_id: str,
    messages: Sequence[Mapping[str, object]],
    turn: Turn | None,
) -> Request:
    ids = chat_ids(body, messages, served)
    if turn is not None:
        # the same text, but the ids that its cache has seen
        ids = turn.session.continued(ids, served.tokenizer)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    sampling = sample_settings(
        body,
        served,
        max_tokens=length_of(len(ids), wanted, served, limits, field, "messages"),
        logprobs=body.top_logprobs if body.logprobs else None,
        stop=(*body.stops, *served.end_texts),
        stop_ids=(*body.stop_token_ids, *served.end_ids),
    )
    return Request(
        prompt_ids=tuple(ids),
        sampling=sampling,
        n=body.n,
        priority=-body.priority,
        deadline_s=limits.seconds,
        request_id=request_id,
        thinking_token_budget=body.thinking_token_budget,
        constraint=constraint_of(body, served),
        session=None if turn is None else turn.session,
        keeps_session=turn is not None,
    )


def ask_completion(body: CompletionBody, served: Served, limits: Limits, request_id: str) -> Asked:
    """One or several prompts to requests.

    Raises: RequestError naming the field.
    """
    served.check_name(body.model)
    several = _several(body.prompt)
    if len(several) * body.n > limits.answers:
        raise RequestError(
            f"{len(several)} prompts times n={body.n} are more than {limits.answers} answers, the most of one request",
            "n" if len(several) == 1 else "prompt",
        )
    requests, texts = [], []
    constraint = constraint_of(body, served)
    for i, prompt in enumerate(several):
        where = "prompt" if len(several) == 1 else f"prompt[{i}]"
        ids = _ids(prompt, served, where)
        sampling = sample_settings(
            body,
            served,
            max_tokens=length_of(len(ids), body.max_tokens, served, limits, "max_tokens", where),
            logprobs=body.logprobs,
            stop=body.stops,
            stop_ids=body.stop_token_ids,
        )
        requests.append(
            Request(
                prompt_ids=tuple(ids),
                sampling=sampling,
                n=body.n,
                priority=-body.priority,
                deadline_s=limits.seconds,
                request_id=request_id if len(several) == 1 else f"{request_id}-{i}",
                # a plain text is continued as it is, and no reasoning is looked for
                thinks=False,
                constraint=constraint,
            )
        )
        if body.echo:
            texts.append(prompt if isinstance(prompt, str) else served.tokenizer.decode(ids))
    return Asked(requests=tuple(requests), prompts=tuple(texts))


def chat_ids(body: ChatBody, messages: Sequence[Mapping[str, object]], served: Served) -> list[int]:
    """The prompt of a conversation, by the switches and tools of its request.

    Raises: RequestError naming the messages, or the switches of the template.
    """
    switches: dict[str, object] = dict(body.chat_template_kwargs)
    thinks = switches.pop("enable_thinking", switches.pop("thinking", body.enable_thinking))
    if body.reasoning_effort is not None:
        switches.setdefault("reasoning_effort", body.reasoning_effort)
        thinks = body.reasoning_effort != "none" if thinks is None else thinks
    if not isinstance(thinks, bool | None):
        raise RequestError(f"enable_thinking is {thinks!r}, expected true or false", "chat_template_kwargs")
    return message_ids(
        messages,
        served,
        tools=tools_of(body) if body.tools and body.tool_choice != "none" else None,
        thinks=thinks,
        switches=switches,
    )


def message_ids(
    messages: Sequence[Mapping[str, object]],
    served: Served,
    *,
    tools: list[dict[str, object]] | None = None,
    add_generation_prompt: bool = True,
    thinks: bool | None = None,
    switches: dict[str, object] | None = None,
) -> list[int]:
    """Messages, as `plain` gives them, through the model's template.

    Raises: RequestError naming the messages.
    """
    served.check_length(sum(len(text) for m in messages if isinstance(text := m.get("content"), str)), "messages")
    served.check_length(len(json.dumps(tools)), "tools")
    try:
        told, values = switched(messages, served.tokenizer.chat_template or CHATML, thinks)
        return encode_chat(
            served.tokenizer,
            told,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **((switches or {}) | values),
        )
    except (ValueError, TypeError) as error:
        raise RequestError(str(error), "messages") from None


def plain(message: Message, served: Served) -> dict[str, object]:
    """A message with the fields that templates know, and no others."""
    role: str = message.role
    if role == "developer" and "developer" not in (served.tokenizer.chat_template or "developer"):
        role = "system"
    content = message.content
    if isinstance(content, tuple):
        # few templates know parts; those that do take plain texts as well
        content = "\n".join(part.text for part in content if isinstance(part, Part))
    found: dict[str, object] = {"role": role, "content": content}
    found |= {name: value for name in ("name", "tool_call_id") if (value := getattr(message, name))}
    if reasoning := message.reasoning_content or message.reasoning:
        found["reasoning_content"] = reasoning
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def sample_settings(
    body: Sampled,
    served: Served,
    *,
    max_tokens: int,
    logprobs: int | None,
    stop: tuple[str, ...],
    stop_ids: tuple[int, ...],
) -> Sampling:
    """The engine's settings.

    Raises: RequestError naming the field.
    """
    bias = {}
    for key, value in body.logit_bias.items():
        if not (key.isascii() and key.isdigit()) or int(key[:16]) >= served.vocab_size:
            raise RequestError(f"{key[:32]!r} is no token id; ids run from 0 to {served.vocab_size - 1}", "logit_bias")
        bias[int(key)] = value
    for token_id in stop_ids:
        if token_id >= served.vocab_size:
            raise RequestError(
                f"{token_id} is no token id; ids run from 0 to {served.vocab_size - 1}", "stop_token_ids"
            )
    try:
        return Sampling(
            max_tokens=max_tokens,
            # logits over a number this small are not finite; the likeliest token is what was meant
            temperature=1.0 if body.temperature is None else body.temperature * (body.temperature >= _COLD),
            top_k=body.top_k if body.top_k > 0 else None,
            top_p=body.top_p,
            min_p=body.min_p or None,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=bias,
            logprobs=logprobs,
            seed=None if body.seed is None else body.seed & _MASK,
            stop=stop,
            stop_ids=stop_ids,
            ignore_eos=body.ignore_eos,
        )
    except ValueError as error:
        # what is refused here and not by the schema begins with its field
        raise RequestError(str(error), str(error).partition("=")[0]) from None


def length_of(n_prompt: int, wanted: int | None, served: Served, limits: Limits, field: str, prompt: str) -> int:
    """How many tokens an answer may have.

    Raises: RequestError if the prompt fills the context, or the answer wanted does not fit behind it.
    """
    room = served.context - n_prompt
    if room < 1:
        raise RequestError(
            f"the prompt has {n_prompt} tokens; the context holds {served.context}, at least one of them new",
            prompt,
            code="context_length_exceeded",
        )
    if wanted is not None and wanted > room:
        raise RequestError(
            f"{field} is {wanted} after {n_prompt} tokens of prompt; the context holds {served.context}",
            field,
            code="context_length_exceeded",
        )
    return wanted or min(room, limits.default_tokens or room)


def _check_answers(n: int, limits: Limits) -> None:
    if n > limits.answers:
        raise RequestError(f"n is {n}, allowed are {limits.answers}", "n")


def _several(prompt: object) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        return [prompt]
    assert isinstance(prompt, tuple)
    return list(prompt) if isinstance(prompt[0], str | tuple) else [prompt]


def _ids(prompt: str | tuple[int, ...], served: Served, where: str) -> list[int]:
    if isinstance(prompt, tuple):
        largest = max(prompt)
        if largest >= served.vocab_size:
            at = prompt.index(largest)
            raise RequestError(f"{where}[{at}] is token id {largest}; ids run from 0 to {served.vocab_size - 1}", where)
        return list(prompt)
    served.check_length(len(prompt), where)
    try:
        ids = served.tokenizer.encode(prompt, add_special=True)
    except ValueError as error:
        raise RequestError(str(error), where) from None
    if not ids:
        raise RequestError(f"{where} is empty; a model needs at least one token to continue", where)
    return ids


def _arguments(arguments: str | dict[str, object]) -> object:
    # templates write arguments as JSON themselves, and would quote a text once more
    if isinstance(arguments, dict):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
