"""What may be asked: the bodies of the requests, field by field, with their bounds.

Names and meanings are OpenAI's; those that OpenAI lacks (top_k, min_p, repetition_penalty, thinking_token_budget,
chat_template_kwargs, structured_outputs ...) are vLLM's. A field that is accepted and has no effect says so.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from plait.serve.error import RequestError
from plait.serve.schema import Limit

MOST_ANSWERS = 128
_MOST_MESSAGES = 4096

Text = Annotated[str, Limit(most=1 << 22)]
Name = Annotated[str, Limit(least=1, most=64)]
Tag = Annotated[str, Limit(most=512, help="accepted, without effect")]
StopText = Annotated[str, Limit(least=1, most=256)]
TokenId = Annotated[int, Limit(low=0, high=2**31)]
Ids = Annotated[tuple[TokenId, ...], Limit(least=1, most=1 << 21)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What a stream tells besides its text."""

    include_usage: Annotated[bool, Limit(help="end with a chunk that counts tokens")] = False
    continuous_usage_stats: Annotated[bool, Limit(help="count tokens in every chunk")] = False
    include_obfuscation: Annotated[bool, Limit(help="accepted, without effect")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What an answer must match; give exactly one."""

    json: dict[str, object] | Text | None = None
    regex: Annotated[str, Limit(least=1, most=1 << 14)] | None = None
    choice: Annotated[tuple[Annotated[str, Limit(least=1, most=1024)], ...], Limit(least=1, most=256)] | None = None
    grammar: Annotated[str, Limit(least=1, most=1 << 16, help="in Lark's notation")] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"needs exactly one of json, regex, choice and grammar, has {' and '.join(given) or 'none'}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """How tokens are chosen and where answers end, in whatever route."""

    model: Annotated[str, Limit(most=512, help="its name in /v1/models; left out: the one that is served")] | None = (
        None
    )
    stream: bool = False
    n: Annotated[int, Limit(low=1, high=MOST_ANSWERS)] = 1
    temperature: Annotated[float, Limit(low=0, high=2, help="0 takes the likeliest token")] | None = None
    top_p: Annotated[float, Limit(above=0, high=1)] | None = None
    top_k: Annotated[int, Limit(low=-1, high=1 << 20, help="0 and -1: all")] = 0
    min_p: Annotated[float, Limit(low=0, high=1)] = 0.0
    seed: Annotated[int, Limit(low=-(2**63), high=2**63 - 1)] | None = None
    stop: StopText | Annotated[tuple[StopText, ...], Limit(most=16)] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Limit(most=64)] = ()
    ignore_eos: bool = False
    presence_penalty: Annotated[float, Limit(low=-2, high=2)] = 0.0
    frequency_penalty: Annotated[float, Limit(low=-2, high=2)] = 0.0
    repetition_penalty: Annotated[float, Limit(low=0.01, high=10)] = 1.0
    logit_bias: Annotated[
        dict[str, Annotated[float, Limit(low=-100, high=100)]], Limit(most=1024, help="token id to what is added")
    ] = field(default_factory=dict)
    stream_options: StreamOptions = StreamOptions()
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Limit(low=-100, high=100, help="smaller comes first")] = 0
    user: Tag = ""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionBody(Sampled):
    """POST /v1/completions."""

    prompt: Text | Ids | Annotated[tuple[Text | Ids, ...], Limit(least=1, most=MOST_ANSWERS)]
    max_tokens: Annotated[int, Limit(low=1, high=1 << 24)] = 16
    logprobs: Annotated[int, Limit(low=0, high=20)] | None = None
    echo: Annotated[bool, Limit(help="put the prompt before the answer; not together with logprobs")] = False
    best_of: Annotated[int, Limit(low=1, high=MOST_ANSWERS, help="must equal n")] | None = None
    suffix: Annotated[str, Limit(most=0, help="not supported")] = ""

    def __post_init__(self) -> None:
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError(f"is {self.best_of}, n {self.n}; ask for n answers and choose among them", "best_of")
        if self.echo and self.logprobs is not None:
            raise RequestError("together with logprobs would need those of the prompt; leave one out", "echo")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalledFunction:
    """Which function, with what."""

    OPEN: ClassVar[bool] = True

    name: Name
    arguments: Text | dict[str, object] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A function that an assistant has called."""

    OPEN: ClassVar[bool] = True

    function: CalledFunction
    id: Annotated[str, Limit(most=256)] = ""
    type: Literal["function"] = "function"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a message; only text is understood, nothing is ever fetched."""

    OPEN: ClassVar[bool] = True

    type: Annotated[str, Limit(most=64)]
    text: Text = ""

    def __post_init__(self) -> None:
        if self.type not in ("text", "input_text", "output_text", "refusal"):
            raise RequestError(f"is {self.type!r}; this model reads text only, and nothing is fetched", "type")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; fields that are not listed are dropped."""

    OPEN: ClassVar[bool] = True

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[tuple[Part, ...], Limit(most=1024)] | None = None
    name: Annotated[str, Limit(most=256)] = ""
    tool_calls: Annotated[tuple[Call, ...], Limit(most=256)] = ()
    tool_call_id: Annotated[str, Limit(most=256)] = ""
    reasoning_content: Text = ""
    reasoning: Text = ""

    def __post_init__(self) -> None:
        if self.content is None and not (self.role == "assistant"):
            raise RequestError(f"is missing; only an assistant may be silent, not {self.role}", "content")


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTool:
    """A function that the model may call."""

    OPEN: ClassVar[bool] = True

    name: Name
    description: Text = ""
    parameters: dict[str, object] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionTool


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedFunction:
    """A function by its name."""

    name: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonSchema:
    """The schema that an answer must match."""

    name: Name = "answer"
    description: Text = ""
    schema: dict[str, object] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """Text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError(f"belongs to type json_schema, and the type is {self.type}", "json_schema")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Limit(least=1, most=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Limit(low=1, high=1 << 24)] | None = None
    max_tokens: Annotated[int, Limit(low=1, high=1 << 24, help="older name of max_completion_tokens")] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Limit(low=0, high=20)] = 0
    response_format: ResponseFormat | None = None
    tools: Annotated[tuple[Tool, ...], Limit(most=128)] = ()
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    thinking_token_budget: Annotated[int, Limit(low=0, high=1 << 24, help="most tokens of reasoning")] | None = None
    enable_thinking: Annotated[bool, Limit(help="short for the switch of this name in chat_template_kwargs")] | None = (
        None
    )
    reasoning_effort: (
        Annotated[
            Literal["none", "minimal", "low", "medium", "high", "xhigh"],
            Limit(help="none turns reasoning off; others are handed to the template"),
        ]
        | None
    ) = None
    chat_template_kwargs: Annotated[
        dict[str, bool | int | float | Annotated[str, Limit(most=1024)]],
        Limit(most=32, help="switches of the model's own template"),
    ] = field(default_factory=dict)
    session: Annotated[str, Limit(least=1, most=128, help="a saved conversation to go on with")] | None = None
    store: Annotated[bool, Limit(help="accepted, without effect")] = False
    metadata: Annotated[dict[str, Tag], Limit(most=16, help="accepted, without effect")] = field(default_factory=dict)
    service_tier: Tag = ""
    safety_identifier: Tag = ""
    prompt_cache_key: Tag = ""

    def __post_init__(self) -> None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("needs logprobs: true", "top_logprobs")
        if self.tool_choice not in ("auto", "none") and not self.tools:
            raise RequestError("asks for a call, but there are no tools", "tool_choice")
        if isinstance(self.tool_choice, ToolChoice):
            wanted, names = self.tool_choice.function.name, [tool.function.name for tool in self.tools]
            if wanted not in names:
                raise RequestError(
                    f"is {wanted!r}, which is none of the tools {', '.join(names)}", "tool_choice.function.name"
                )
        reserved = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "template", "bos", "eos"}
        for name in self.chat_template_kwargs:
            if name in reserved or not name.isidentifier():
                raise RequestError(f"has {name[:64]!r}, which is no switch of a template", "chat_template_kwargs")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeBody:
    """POST /tokenize: a text, or a conversation through the model's template."""

    model: Annotated[str, Limit(most=512)] | None = None
    prompt: Text | None = None
    messages: Annotated[tuple[Message, ...], Limit(least=1, most=_MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("or messages must be given, and not both", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeBody:
    """POST /detokenize."""

    tokens: Annotated[tuple[TokenId, ...], Limit(most=1 << 21)]
    model: Annotated[str, Limit(most=512)] | None = None
