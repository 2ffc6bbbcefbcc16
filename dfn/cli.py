"""The command ``dfn``: train, generate, embed, classify, reconstruct, eval, study, ablate, plot."""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

from . import runs
from .pictures.runs import draw, write_picture
from .runs import KINDS, Options, Run, UsageError, using
from .studies import parts
from .studies.command import add_studies
from .studies.memory_task import run_memory
from .studies.photographs import table

JUDGED = (*KINDS, "photographs", "memory")


def main(argv: list[str] | None = None) -> int:
    """Runs the command: 0, or 1 for a failure; exits with 2 for bad usage."""
    argv, parser = sys.argv[1:] if argv is None else argv, build_parser()
    for stream in (sys.stdout, sys.stderr):  # names and figures are said whole on any terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = parser.parse_args(with_config(parser, argv))
        if missing := [m for m in ("safetensors", "tqdm", "matplotlib") if importlib.util.find_spec(m) is None]:
            raise RuntimeError(f"needs {' and '.join(missing)}: pip install 'dfn-kernels[models]'")
        arguments.command(arguments)
        return 0
    except UsageError as error:
        return said(error, 2)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # RuntimeError: checkpoints, what is missing
        return said(error, 1)
    except KeyboardInterrupt as error:
        return said(str(error) or "stopped", 1)


def said(error: object, code: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    warn(f"dfn{f' (process {rank})' if rank else ''}: {in_one_line(error)}")
    return code


def in_one_line(error: object) -> str:
    """What a person can do something with: no names of functions, no places in sources."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        size = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE) or re.search(r"([\d.]+ bytes)", text)
        return "out of memory" + (f": {size[1]} could not be had" if size else "")
    text = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return re.sub(r"^(?:[A-Z]\w*[a-z]\w*|[a-z]+(?:_[a-z]+)+): ", "", text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dfn", description="Train and use Dynamic Flow Networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        one.set_defaults(command=run)
        one.add_argument("--config", metavar="FILE", help="TOML file of flags; those given here win")
        return one

    one = add("train", train, "train a model; a run that was killed goes on with --resume")
    one.add_argument("kind", nargs="?", metavar="KIND", help="; ".join(f"{n}: {k.__doc__}" for n, k in KINDS.items()))
    one.add_argument("--out", type=Path, help="folder of the run (default: runs/KIND)")
    one.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last good checkpoint in the folder, if any; also to more --steps",
    )
    one.add_argument(
        "--init", type=Path, metavar="DIR", help="begin with the weights, and sizes, of the run in this folder"
    )
    one.add_argument("--checkpoint-every", type=positive, default=100, metavar="STEPS", help="default: 100")
    one.add_argument("--quiet", action="store_true", help="no progress bar")
    add_options(one)

    one = add("generate", generate, "continue a prompt with a trained language model")
    one.add_argument("run", type=Path, metavar="DIR", help="folder of the run")
    one.add_argument("--prompt", default="\n", help="default: a line break; - reads it from the standard input")
    one.add_argument("--tokens", type=positive, default=200, help="bytes to add (default: 200)")
    one.add_argument("--temperature", type=not_negative, default=0.7, help="0 takes the likeliest byte (default: 0.7)")
    one.add_argument("--top-k", type=positive, metavar="K", help="draw from the K likeliest bytes only")
    one.add_argument("--seed", type=seed, default=0)

    one = add("embed", embed, "tell how alike files are, by a contrastive or joint run")
    add_files(one)
    one.add_argument("--out", type=Path, metavar="FILE", help="write the vectors there, as CSV: name, then numbers")

    one = add("classify", classify, "say which digit a picture shows, by a run of digits")
    add_files(one)

    one = add("reconstruct", reconstruct, "rebuild a file of which a share is hidden, by a masked run")
    add_files(one, one=True)
    one.add_argument("--out", type=Path, metavar="FILE", help="default: rebuilt.png, or rebuilt.txt, in the folder of the run")

    one = add("eval", evaluate, "judge a trained run, or train one and judge it")
    one.add_argument("what", choices=JUDGED, metavar="WHAT", help=", ".join(JUDGED))
    one.add_argument("--run", type=Path, metavar="DIR", help="folder of a run (default: one is trained for this)")
    one.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_options(one)

    one = commands.add_parser("study", help="questions with an answer: language, recall, length, parts")
    one.set_defaults(command=study)
    add_studies(one)

    one = add("ablate", study, "the study of parts, of the model without each of them")
    one.set_defaults(study=parts.run)
    parts.add_left_out(one)

    one = add("plot", plot, "draw a run's pictures into its folder")
    one.add_argument("run", type=Path, metavar="DIR", help="folder of a run or of a study")
    return parser


def add_files(parser: argparse.ArgumentParser, one: bool = False) -> None:
    parser.add_argument("run", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("files", type=Path, metavar="FILE", nargs=1 if one else "+", help="a picture, sound or text")
    parser.add_argument("--seed", type=seed, default=0, help="of what is sampled (default: 0)")


def add_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each of `Options`; what is not given stays out of the result."""
    group = parser.add_argument_group("options that decide how a run ends", "defaults depend on the kind")
    for f in dataclasses.fields(Options)[1:]:
        flag, of = f"--{f.name.replace('_', '-')}", f.type if isinstance(f.type, type) else str
        choices = [c for c in f.metadata["choices"] if c] or None
        kind = dict(action="store_true") if of is bool else dict(type=of, choices=choices)
        group.add_argument(flag, help=f.metadata["help"], default=argparse.SUPPRESS, **kind)


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


def train(arguments: argparse.Namespace) -> None:
    if arguments.kind is None:
        raise UsageError(f"KIND must be one of {', '.join(KINDS)}, as an argument or in the TOML file")
    given = given_options(arguments)
    if arguments.init is None:
        options = Options.of(arguments.kind, **given)
    else:
        options = runs.options_like(arguments.init, arguments.kind, given, warn)
    with runs.processes():
        run = runs.train(
            options, arguments.out or Path("runs") / arguments.kind, resume=arguments.resume, given=given,
            init=arguments.init, every=arguments.checkpoint_every, progress=not arguments.quiet,
        )  # fmt: skip
        if int(os.environ.get("RANK", 0)) == 0:
            show(run.judge(not arguments.quiet, warn))


def generate(arguments: argparse.Namespace) -> None:
    run = Run.load(arguments.run, warn)
    if not hasattr(run.model, "generate"):
        raise UsageError(f"{arguments.run} is a run of kind {run.options.kind}; only text generates")
    prompt = sys.stdin.buffer.read() if arguments.prompt == "-" else as_bytes(arguments.prompt)
    if not prompt:
        raise UsageError("--prompt must not be empty")
    run.set_threads()
    device = next(run.model.parameters()).device
    ids = run.model.generate(
        torch.tensor([list(prompt)], device=device), arguments.tokens, temperature=arguments.temperature,
        top_k=arguments.top_k, generator=torch.Generator(device).manual_seed(arguments.seed), progress=True,
    )  # fmt: skip
    sys.stdout.flush()
    sys.stdout.buffer.write(bytes(ids[0].tolist()) + b"\n")  # as they are: decoding could lose some
    sys.stdout.buffer.flush()


def embed(arguments: argparse.Namespace) -> None:
    run = Run.load(arguments.run, warn)
    run.set_threads()
    vectors = torch.stack([using.embed(run, file, arguments.seed) for file in arguments.files])
    print("cosines, 1 for files that are the same")
    width = max(len(str(file)) for file in arguments.files)
    for file, row in zip(arguments.files, (vectors @ vectors.T).tolist(), strict=True):
        print(f"{file!s:{width}}" + "".join(f"{x:7.2f}" for x in row))
    if arguments.out is not None:
        rows = zip(arguments.files, vectors.tolist(), strict=True)
        arguments.out.write_text("".join(f"{file},{','.join(f'{x:.6g}' for x in row)}\n" for file, row in rows))
        print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers: {arguments.out}")


def classify(arguments: argparse.Namespace) -> None:
    run = Run.load(arguments.run, warn)
    run.set_threads()
    for file in arguments.files:
        chances = using.classify(run, file, arguments.seed)
        print(f"{file}: {chances.argmax()}, with a probability of {chances.max():.2f}")


def reconstruct(arguments: argparse.Namespace) -> None:
    run = Run.load(arguments.run, warn)
    run.set_threads()
    values, figures = using.reconstruct(run, arguments.files[0], arguments.seed)
    show(figures)
    if values.dtype == torch.int64:
        out = arguments.out or arguments.run / "rebuilt.txt"
        out.write_bytes(bytes(values.tolist()))
    else:
        out = arguments.out or arguments.run / "rebuilt.png"
        write_picture(out, values)
    print(out)


def as_bytes(text: str) -> bytes:
    """The bytes that the shell passed, in whatever encoding; of a text from a TOML file those of UTF-8."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")


def evaluate(arguments: argparse.Namespace) -> None:
    given = given_options(arguments)
    if arguments.run is not None and arguments.what not in KINDS:
        raise UsageError(f"--run has no meaning for {arguments.what}")
    if arguments.what not in KINDS:
        figures = SPECIAL[arguments.what](given, arguments)
    elif arguments.run:
        run = Run.load(arguments.run, warn)
        if run.options.kind != arguments.what or given:
            wrong = f"kind {run.options.kind}" if run.options.kind != arguments.what else "its own options"
            raise UsageError(f"{arguments.run} is a run with {wrong}; give either --run or options")
        run.set_threads()
        figures = run.judge(True, warn)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run = runs.train(Options.of(arguments.what, **given), Path(folder), evaluations=0, say=warn)
            figures = run.judge(True, warn)
    print(json.dumps(figures, indent=1)) if arguments.json else show(figures)


def photographs(given: dict, _) -> list[dict]:
    only(given)
    return table()


def memory(given: dict, _) -> dict:
    return run_memory(**only(given, "steps", "seed"))


SPECIAL = {"photographs": photographs, "memory": memory}


def only(given: dict, *names: str) -> dict:
    if other := sorted(set(given) - set(names)):
        raise UsageError(
            f"--{other[0].replace('_', '-')} has no meaning here; what has: {', '.join(names) or 'nothing'}"
        )
    return given


def study(arguments: argparse.Namespace) -> None:
    """A study's cells and table; its picture, too, where Ctrl-C stops it."""
    try:
        arguments.study(arguments)
    finally:
        if (arguments.out / "study.md").exists():  # written with the first cell that is kept
            draw(arguments.out, warn)


def plot(arguments: argparse.Namespace) -> None:
    for path in draw(arguments.run, warn):
        print(path)


def show(figures: dict | list[dict]) -> None:
    """A line for each figure, or a table."""
    if isinstance(figures, dict):
        for name, value in figures.items():
            print(f"{name:24}{value:10,d}" if isinstance(value, int) else f"{name:24}{value:10.3f}")
        return
    print("".join(f"{name:>12}" for name in figures[0]))
    for row in figures:
        print("".join(f"{x:12.2f}" if isinstance(x, float) else f"{x!s:>12}" for x in row.values()))


def warn(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
