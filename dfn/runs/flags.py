"""Flags: a parser whose help says every default, one flag for each of `Options`, and TOML files of them."""

import argparse
import dataclasses
import difflib
from pathlib import Path

from .options import KINDS, OWN, Options, UsageError


class Formatter(argparse.HelpFormatter):
    """Says the default of every option whose help does not, and many choices there instead of in every mention."""

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str):
        if not _many(action):
            return super()._metavar_formatter(action, default_metavar)
        return lambda size: (default_metavar,) * size

    def _get_help_string(self, action: argparse.Action) -> str:
        said = f"of {', '.join(action.choices)}; {action.help or ''}" if _many(action) else action.help or ""
        if not action.option_strings or action.default is argparse.SUPPRESS or "default" in said:
            return said
        return f"{said} (default: {default_in_words(action.default)})".strip()


def _many(action: argparse.Action) -> bool:
    return bool(action.option_strings and action.choices) and len(action.choices) > 6 and action.metavar is None


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, for the command that it is wrong for."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": Formatter, **options})

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            like = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            hint = f"; did you mean {like[0]}?" if like else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help says what there is)\n")


def default_in_words(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(default_in_words, value))
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_options(parser: argparse.ArgumentParser, title: str = "data, model and training") -> None:
    """One flag for each of `Options`; what is not given stays out of the result."""
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(Options)[1:]:
        flag, of = f"--{f.name.replace('_', '-')}", f.type if isinstance(f.type, type) else str
        choices = [c for c in f.metadata["choices"] if c] or None
        kind = dict(action="store_true") if of is bool else dict(type=of, choices=choices)
        help = f.metadata["help"] + ("" if "default" in f.metadata["help"] else f" (default: {defaults_of(f)})")
        group.add_argument(flag, help=help, default=argparse.SUPPRESS, **kind)


def defaults_of(option: dataclasses.Field) -> str:
    """An option's default, by kind where they differ."""
    kinds: dict[str, list[str]] = {}
    for kind, task in KINDS.items():
        if task.own is None or option.name not in OWN or option.name in task.own:
            value = task.defaults_for({}).get(option.name, option.default)
            kinds.setdefault(default_in_words(value), []).append(kind)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{value} {', '.join(names)}" for value, names in kinds.items())


def given_options(arguments: argparse.Namespace) -> dict:
    names = {f.name for f in dataclasses.fields(Options)[1:]}
    return {name: value for name, value in vars(arguments).items() if name in names}


def positive(text: str) -> int:
    if not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be between 1 and {2**31 - 1}, got {text}")
    return int(text)


def seed(text: str) -> int:
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be between 0 and {2**63 - 1}, got {text}")
    return int(text)


def not_negative(text: str) -> float:
    if not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return float(text)


def with_config(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """The arguments with those of ``--config FILE`` before them, so that later ones win."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    if path is None or not argv:
        return argv
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} is not TOML: {error}") from error
    command = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices.get(argv[0])
    if command is None:
        return argv  # the parser says what is wrong
    actions = {a.dest: a for a in command._actions if a.dest not in ("config", "help")}
    words = []
    for key, value in table.items():
        action = actions.get(key.replace("-", "_"))
        if action is None:
            raise UsageError(f"--config: {path}: unknown key {key!r}; known are {', '.join(actions)}")
        if isinstance(value, bool) != (action.nargs == 0) or isinstance(value, dict | list):
            raise UsageError(f"--config: {path}: {key} cannot be {value!r}")
        if not action.option_strings:
            command.set_defaults(**{action.dest: value})
        elif value is not False:
            words.append(action.option_strings[0] + ("" if value is True else f"={value}"))
    return [argv[0], *words, *argv[1:]]
