"""Runs a verb: reads its inputs from the command line, calls it, prints its report, and turns failures into one line.

A verb is a module with `EXAMPLE: str`, a frozen dataclass `Inputs` and `run(inputs: Inputs) -> Report`. The dataclass
is the whole interface: its fields become words and options, its `__post_init__` may refuse values.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Inputs:
        recipe: Path = arg(help="settings of the run", positional=True)             # required word
        seed: int = arg(default=0, help="where randomness starts")                  # --seed 0
        compiled: bool = arg(default=True, help="use torch.compile")                # --compiled, --no-compiled
        sources: tuple[str, ...] = arg(default=(), help="...")                      # --sources a,b
        overrides: tuple[str, ...] = arg(default=(), help="...", positional=True)   # remaining key=value words

Exit status: 0 done, 1 failed, 2 bad input, 3 diverged (training), 130 interrupted. PLAIT_TRACEBACK=1 shows where a
failure came from.
"""

import argparse
import dataclasses
import importlib
import json
import logging
import os
import sys
import traceback
import types
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from plait.cli import VERBS
from plait.cli.failure import DONE, drop_unwritable_output, verdict
from plait.config import nearest

if TYPE_CHECKING:
    from plait.report import Report

USAGE = "plait VERB [words] [--options]      plait VERB --help      plait --version      plait --completion bash|zsh"


def arg(*, default: Any = dataclasses.MISSING, help: str, positional: bool = False) -> Any:
    """Declare one input of a verb, inside its `Inputs` dataclass.

    Args:
        default: what it is when not given; without a default it is required.
        help: one line for `plait VERB --help`.
        positional: a bare word instead of `--name`; a tuple takes all remaining words.
    """
    return dataclasses.field(default=default, metadata={"help": help, "positional": positional})


def launch(words: Sequence[str]) -> int:
    """Run `plait WORDS...` and return the exit status; nothing but the verb's own bugs can raise."""
    wants_json = "--json" in words
    name = "plait"
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            _say(_overview())
        elif words[0] == "--version":
            from plait import __version__

            _say(f"plait {__version__}")
        elif words[0] == "--completion":
            _say(_completion(words[1] if len(words) > 1 else ""))
        elif words[0] not in VERBS:
            raise ValueError(f"there is no verb {words[0]!r}; {_advice(words[0], VERBS, name)}")
        else:
            name = f"plait {words[0]}"
            _show(_run(words[0], words[1:]), wants_json)
        return DONE
    except SystemExit as stop:
        # argparse stops this way after it has printed --help
        return stop.code if isinstance(stop.code, int) else DONE
    except BaseException as error:
        status, message = verdict(error)
        if os.environ.get("PLAIT_TRACEBACK") == "1":
            traceback.print_exc()
        drop_unwritable_output()
        if message:
            red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
            print(f"\033[31m{name}:\033[0m {message}" if red else f"{name}: {message}", file=sys.stderr)
        if message and wants_json:
            _say(json.dumps({"error": message, "status": status}, ensure_ascii=False))
        return status


def read_inputs(inputs: type, words: Sequence[str], name: str, example: str) -> Any:
    """Read a verb's words into its `Inputs`.

    Raises: ValueError in one line for words that do not fit; SystemExit after --help.
    """
    parser = _parser(inputs, name, example)
    found, unknown = parser.parse_known_intermixed_args(list(words))
    if unknown:
        options = [option for option in parser._option_string_actions if option.startswith("--")]
        raise ValueError(f"{unknown[0]!r} is not understood; {_advice(unknown[0], options, name)}")
    values = vars(found)
    del values["json"]
    for word in values.get("overrides", ()):
        if "=" not in word:
            raise ValueError(f"{word!r} is not understood; settings are given as key=value, see {name} --help")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return inputs(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _run(verb: str, words: Sequence[str]) -> "Report":
    module = importlib.import_module(VERBS[verb][0])
    inputs = read_inputs(module.Inputs, words, f"plait {verb}", module.EXAMPLE)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    # other people's libraries may speak up, but need not chat
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("plait").setLevel(logging.INFO)
    return module.run(inputs)


def _parser(inputs: type, name: str, example: str) -> argparse.ArgumentParser:
    verb = name.split()[-1]
    parser = _Parser(
        prog=name,
        description=VERBS[verb][1] if verb in VERBS else None,
        epilog=f"example:\n  {example.strip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = get_type_hints(inputs)
    for field in dataclasses.fields(inputs):
        if field.init:
            _add(parser, field, hints[field.name])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    return parser


def _add(parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]", hint: Any) -> None:
    required = field.default is dataclasses.MISSING
    text = field.metadata.get("help", "").replace("%", "%%")
    if not required and field.default not in (None, (), ""):
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{text} (default: {str(shown).replace('%', '%%')})"
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(option for option in get_args(hint) if option is not type(None))
    many = get_origin(hint) is tuple
    each = get_args(hint)[0] if many else hint
    how: dict[str, Any] = {"help": text, "default": None if required else field.default}
    if get_origin(each) is Literal:
        how["choices"] = get_args(each)
        each = type(get_args(each)[0])
    if field.metadata.get("positional"):
        count = ("+" if required else "*") if many else (None if required else "?")
        metavar = "key=value" if field.name == "overrides" else field.name.upper()
        parser.add_argument(field.name, type=each, nargs=count, metavar=metavar, **how)
        return
    option = "--" + field.name.replace("_", "-")
    if each is bool:
        # some versions of Python add the default to the help by themselves, but not one that is set afterwards
        default = how.pop("default")
        parser.add_argument(option, action=argparse.BooleanOptionalAction, required=required, **how)
        parser.set_defaults(**{field.name: default})
    elif many:
        how.pop("choices", None)
        parser.add_argument(option, type=_comma_list(each), metavar="A,B", required=required, **how)
    else:
        metavar = None if "choices" in how else each.__name__.upper()
        parser.add_argument(option, type=each, metavar=metavar, required=required, **how)


def _comma_list(each: Any) -> Any:
    def read(text: str) -> tuple[Any, ...]:
        return tuple(each(part.strip()) for part in text.split(",") if part.strip())

    # argparse names this in its message: "invalid int list value"
    read.__name__ = f"{each.__name__} list"
    return read


def _show(report: "Report", as_json: bool) -> None:
    if as_json:
        _say(json.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False))
    elif report.facts:
        _say(report.table())


def _say(text: str) -> None:
    # flushed here, where a full disk or a closed pipe can still be told from a bug
    print(text, flush=True)


def _advice(word: str, known: Iterable[str], name: str) -> str:
    close = nearest(word.partition("=")[0], known)
    return f"did you mean {close}?" if close else f"see {name} --help"


def _overview() -> str:
    verbs = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in VERBS.items())
    return f"{USAGE}\n\nHybrid Mamba-Transformer language models, from text to weights to answers.\n\n{verbs}"


def _completion(shell: str) -> str:
    if shell not in ("bash", "zsh"):
        raise ValueError(f"completion is written for bash and zsh, not {shell!r}; try plait --completion bash")
    first = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{first}_plait() {{
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{" ".join(VERBS)}" -- "${{COMP_WORDS[1]}}")); fi
}}
complete -o default -F _plait plait"""
