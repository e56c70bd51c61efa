"""From the bodies of the routes to requests of the engine: templates, ids, sampling, constraints, lengths."""

import json
from dataclasses import dataclass

from plait.engine.request import Request, Sampling
from plait.serve.error import RequestError
from plait.serve.limits import Limits
from plait.serve.protocol import ChatBody, CompletionBody, Message, Part, Sampled
from plait.serve.served import Served
from plait.text.chat import encode_chat

_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one HTTP request wants of the engine. prompts: as texts, where they are to be repeated."""

    requests: tuple[Request, ...]
    prompts: tuple[str, ...] = ()

    @property
    def n_answers(self) -> int:
        """How many answers will be made."""
        return sum(request.n for request in self.requests)


def ask_chat(body: ChatBody, served: Served, limits: Limits, request_id: str) -> Asked:
    """A conversation to a request.

    Raises: RequestError naming the field.
    """
    served.check_name(body.model)
    ids = chat_ids(body, served)
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
    request = Request(
        prompt_ids=tuple(ids),
        sampling=sampling,
        n=body.n,
        priority=-body.priority,
        deadline_s=limits.seconds,
        request_id=request_id,
        thinking_token_budget=body.thinking_token_budget,
    )
    return _within(Asked(requests=(request,)), limits)


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
            )
        )
        if body.echo:
            texts.append(prompt if isinstance(prompt, str) else served.tokenizer.decode(ids))
    return _within(Asked(requests=tuple(requests), prompts=tuple(texts)), limits)


def chat_ids(body: ChatBody, served: Served, add_generation_prompt: bool = True) -> list[int]:
    """The prompt of a conversation.

    Raises: RequestError naming the messages, or the switches of the template.
    """
    switches: dict[str, object] = {}
    if body.reasoning_effort is not None:
        switches["reasoning_effort"] = body.reasoning_effort
        switches["enable_thinking"] = body.reasoning_effort != "none"
    if body.enable_thinking is not None:
        switches["enable_thinking"] = body.enable_thinking
    switches |= body.chat_template_kwargs
    tools = [{"type": "function", "function": _function(tool.function)} for tool in body.tools]
    return message_ids(
        body.messages,
        served,
        tools=tools if tools and body.tool_choice != "none" else None,
        add_generation_prompt=add_generation_prompt,
        switches=switches,
    )


def message_ids(
    messages: tuple[Message, ...],
    served: Served,
    *,
    tools: list[dict[str, object]] | None = None,
    add_generation_prompt: bool = True,
    switches: dict[str, object] | None = None,
) -> list[int]:
    """Messages through the model's template.

    Raises: RequestError naming the messages.
    """
    plain = [_plain(message, served) for message in messages]
    try:
        return encode_chat(
            served.tokenizer,
            plain,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **(switches or {}),
        )
    except (ValueError, TypeError) as error:
        raise RequestError(str(error), "messages") from None


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
            temperature=1.0 if body.temperature is None else body.temperature,
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


def _within(asked: Asked, limits: Limits) -> Asked:
    if asked.n_answers > limits.answers:
        raise RequestError(f"n is {asked.n_answers}, allowed are {limits.answers}", "n")
    return asked


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
    try:
        ids = served.tokenizer.encode(prompt, add_special=True)
    except ValueError as error:
        raise RequestError(str(error), where) from None
    if not ids:
        raise RequestError(f"{where} is empty; a model needs at least one token to continue", where)
    return ids


def _function(function: object) -> dict[str, object]:
    names = ("name", "description", "parameters")
    return {name: value for name in names if (value := getattr(function, name)) not in ("", {})}


def _plain(message: Message, served: Served) -> dict[str, object]:
    """The fields that templates know, and no others."""
    role: str = message.role
    if role == "developer" and "developer" not in (served.tokenizer.chat_template or "developer"):
        role = "system"
    content = message.content
    if isinstance(content, tuple):
        # few templates know parts; those that do take plain texts as well
        content = "\n".join(part.text for part in content if isinstance(part, Part))
    plain: dict[str, object] = {"role": role, "content": content}
    plain |= {name: value for name in ("name", "tool_call_id") if (value := getattr(message, name))}
    if reasoning := message.reasoning_content or message.reasoning:
        plain["reasoning_content"] = reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(arguments: str | dict[str, object]) -> object:
    # templates write arguments as JSON themselves, and would quote a text once more
    if isinstance(arguments, dict):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
