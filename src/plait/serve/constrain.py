"""What an answer must match: response_format and structured_outputs as a constraint of the engine, tried before use."""

from collections.abc import Callable

from plait.engine.constraint import Constraint, of_choices, of_schema
from plait.engine.tool_choice import of_tools
from plait.serve.error import RequestError
from plait.serve.protocol import ChatBody, ResponseFormat, Sampled, StructuredOutputs, ToolChoice
from plait.serve.schema import parse
from plait.serve.served import Served
from plait.text.chat import CHATML
from plait.text.tools import format_of


def constraint_of(body: Sampled, served: Served) -> Constraint | None:
    """The constraint of a request, or None.

    Raises: RequestError naming the field: two constraints, one that is wrong, or one that would take too long.
    """
    wanted = body.response_format if isinstance(body, ChatBody) else None
    wanted = None if wanted is None or wanted.type == "text" else wanted
    outputs = body.structured_outputs
    if wanted is not None and outputs is not None:
        raise RequestError("response_format and structured_outputs exclude each other", "structured_outputs")
    if wanted is not None:
        return tried(lambda: _of_format(wanted), served, "response_format")
    if outputs is not None:
        return tried(lambda: _of_outputs(outputs), served, "structured_outputs")
    if isinstance(body, ChatBody) and body.tool_choice not in ("auto", "none"):
        return _of_choice(body, served)
    return None


def tools_of(body: ChatBody) -> list[dict[str, object]]:
    """The tools of a request as templates read them."""
    names = ("name", "description", "parameters")
    return [
        {
            "type": "function",
            "function": {name: value for name in names if (value := getattr(tool.function, name)) not in ("", {})},
        }
        for tool in body.tools
    ]


def _of_choice(body: ChatBody, served: Served) -> Constraint:
    """That functions must be called, in the model's own notation."""
    form = format_of(served.tokenizer.chat_template or CHATML)
    if form is None:
        raise RequestError("this model's template writes no calls", "tool_choice")
    name = body.tool_choice.function.name if isinstance(body.tool_choice, ToolChoice) else None
    several = body.parallel_tool_calls
    return tried(
        lambda: of_tools(served.tokenizer, form, tools_of(body), name=name, several=several), served, "tool_choice"
    )


def tried(make: Callable[[], Constraint], served: Served, field: str) -> Constraint:
    """A constraint that the engine will be able to follow.

    Raises: RequestError naming the field.
    """
    try:
        constraint = make()
        served.worker.engine.grammars.compile(constraint)
    except RequestError as error:
        error.param = error.param or field
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise RequestError(str(error).removeprefix("constraint: "), field) from None
    return constraint


def _of_format(wanted: ResponseFormat) -> Constraint:
    if wanted.json_schema is None:
        return of_schema({"type": "object"})
    return of_schema(wanted.json_schema.schema)


def _of_outputs(outputs: StructuredOutputs) -> Constraint:
    if outputs.choice is not None:
        return of_choices(outputs.choice)
    if outputs.regex is not None:
        return Constraint("regex", outputs.regex)
    if outputs.grammar is not None:
        return Constraint("lark", outputs.grammar)
    return of_schema(parse(outputs.json.encode()) if isinstance(outputs.json, str) else outputs.json)
