"""The command ``dfn``: train, generate, embed, classify, reconstruct, eval, study, ablate, plot."""

import argparse
import codecs
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

import dfn_kernels

from . import runs
from .pictures.runs import draw, write_picture
from .runs import KINDS, Options, Run, UsageError, using
from .runs.flags import Parser, add_options, given_options, not_negative, positive, seed, with_config
from .runs.needed import check_installed
from .runs.tables import figures_in_words, table
from .studies import parts, photographs
from .studies.command import STUDIES, add_studies
from .studies.memory_task import run_memory
from .training.progress import shown

JUDGED = (*KINDS, "photographs", "memory")


def main(argv: list[str] | None = None) -> int:
    """Runs the command: 0, or 1 for a failure; exits with 2 for bad usage."""
    argv, parser = sys.argv[1:] if argv is None else argv, build_parser()
    for stream in (sys.stdout, sys.stderr):  # names and figures are said whole on any terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not argv:
        parser.print_help(sys.stderr)
    try:
        arguments = parser.parse_args(with_config(parser, argv))
        check_installed("safetensors", "tqdm", "matplotlib")
        arguments.command(arguments)
        return 0
    except UsageError as error:
        return said(error, 2)
    except BrokenPipeError:  # who read has read enough, as in `dfn generate DIR | head -c 100`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 1
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
    parser = Parser(
        prog="dfn", description="Train and use Dynamic Flow Networks.", epilog="dfn COMMAND --help says more of each."
    )
    parser.add_argument("--version", action="version", version=f"dfn_kernels {dfn_kernels.__version__}")
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
    one.add_argument(
        "--checkpoint-every", type=positive, default=100, metavar="STEPS", help="steps from one to the next"
    )
    one.add_argument("--quiet", action="store_true", help="no progress bars")
    add_options(one)

    one = add("generate", generate, "continue a prompt with a trained language model")
    one.add_argument("run", type=Path, metavar="DIR", help="folder of the run")
    one.add_argument("--prompt", default="\n", help="default: a line break; - reads it from the standard input")
    one.add_argument("--tokens", type=positive, default=200, help="bytes to add; Ctrl-C ends earlier")
    one.add_argument("--temperature", type=not_negative, default=0.7, help="0 takes the likeliest byte")
    one.add_argument("--top-k", type=positive, metavar="K", help="draw from the K likeliest bytes only (default: all)")
    one.add_argument("--seed", type=seed, default=0, help="of what is drawn")

    one = add("embed", embed, "tell how alike files are, by a contrastive or joint run")
    add_files(one, "a picture, sound or text, of the kind that the run has learned from")
    one.add_argument("--out", type=Path, metavar="FILE", help="write the vectors there, as CSV: name, then numbers")

    one = add("classify", classify, "say which digit a picture shows, by a run of digits")
    add_files(one, "a picture, PNG or what else Pillow reads")

    one = add("reconstruct", reconstruct, "rebuild a file of which a share is hidden, by a masked run")
    add_files(one, "a picture, sound or text, of the kind that the run has learned from", one=True)
    one.add_argument(
        "--out", type=Path, metavar="FILE", help="default: rebuilt.png, or rebuilt.txt, in the folder of the run"
    )

    one = add("eval", evaluate, "judge a trained run, or train one and judge it")
    what = f"{', '.join(KINDS)}: a run; photographs (no options); memory (--steps, 130 unless given, and --seed)"
    one.add_argument("what", choices=JUDGED, metavar="WHAT", help=what)
    one.add_argument("--run", type=Path, metavar="DIR", help="folder of a run (default: one is trained for this)")
    one.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_options(one, "without --run: data, model and training of the run that is judged")

    said = "questions with an answer: language, recall, length, parts"
    one = commands.add_parser(
        "study", help=said, description=f"{said.capitalize()}. Hours on a CPU; they can be resumed."
    )
    one.set_defaults(command=study)
    add_studies(one)

    one = add("ablate", study, "the study of parts, of the model without each of them")
    one.set_defaults(study=parts.run)
    parts.add_left_out(one)

    one = add("plot", plot, "draw a run's pictures into its folder")
    one.add_argument("run", type=Path, metavar="DIR", help="folder of a run or of a study")
    return parser


def add_files(parser: argparse.ArgumentParser, what: str, one: bool = False) -> None:
    parser.add_argument("run", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("files", type=Path, metavar="FILE", nargs=1 if one else "+", help=what)
    parser.add_argument("--seed", type=seed, default=0, help="of what is sampled")


def train(arguments: argparse.Namespace) -> None:
    if arguments.kind is None:
        raise UsageError(f"KIND must be one of {', '.join(KINDS)}, as an argument or in the TOML file")
    given = given_options(arguments)
    if arguments.init is None:
        options = Options.of(arguments.kind, **given)
    else:
        options = runs.options_like(arguments.init, arguments.kind, given, warn)
    folder = arguments.out or Path("runs") / arguments.kind
    with runs.processes():
        run = runs.train(
            options, folder, resume=arguments.resume, given=given, init=arguments.init,
            every=arguments.checkpoint_every, progress=not arguments.quiet,
        )  # fmt: skip
        if int(os.environ.get("RANK", 0)) == 0:
            report(run, run.judge(not arguments.quiet, warn))
            print("next:")
            for words in next_commands(run, folder):
                print("  " + shlex.join([*program(), *words]))


def report(run: Run, figures: dict[str, float]) -> None:
    """What a run came to, in words, and where it lies."""
    h = run.history
    print(f"\nheld out, after {h.steps[-1]:,} steps in {h.seconds[-1]:,.0f} s of training:")
    print(figures_in_words(figures, run.task.words))
    print(f"in {run.folder}: {run.weights.name} (the model), figures.json (these figures)")


def next_commands(run: Run, folder: Path) -> list[list[str]]:
    kind = run.options.kind
    first = ["generate", str(folder), *a_prompt(run)] if kind == "text" else ["eval", kind, "--run", str(folder)]
    return [first, ["plot", str(folder)]]


def a_prompt(run: Run) -> list[str]:
    """A word of the held-out text to begin with: after a line break alone a model may say nothing but blanks."""
    held_out = bytes(run.task.corpus.held_out[:4096].tolist()).decode("utf-8", "ignore")
    word = re.search(r"(?<=\s)[^\W\d_]{3,12}(?!\w)", held_out)
    return ["--prompt", word[0]] if word else []


def program() -> list[str]:
    """How this command was called, as far as it can be called so again."""
    if os.path.basename(sys.argv[0]) in ("dfn", "dfn.exe"):
        return ["dfn" if shutil.which("dfn") else sys.argv[0]]
    name = os.path.basename(sys.executable)
    return [name if shutil.which(name) == sys.executable else sys.executable, "-m", "dfn"]


def generate(arguments: argparse.Namespace) -> None:
    run = Run.load(arguments.run, warn)
    if not hasattr(run.model, "stream"):
        raise UsageError(f"{arguments.run} is a run of kind {run.options.kind}; only text generates")
    prompt = sys.stdin.buffer.read() if arguments.prompt == "-" else as_bytes(arguments.prompt)
    if not prompt:
        raise UsageError("--prompt must not be empty")
    run.set_threads()
    device = next(run.model.parameters()).device
    new = run.model.stream(
        torch.tensor([list(prompt)], device=device), arguments.tokens, temperature=arguments.temperature,
        top_k=arguments.top_k, generator=torch.Generator(device).manual_seed(arguments.seed),
    )  # fmt: skip
    new = shown(new, "generating", "bytes", not sys.stdout.isatty(), arguments.tokens)
    sys.stdout.flush()
    stream(prompt, (int(byte) for byte in new), sys.stdout.buffer)


def stream(prompt: bytes, new: Iterable[int], out: BinaryIO) -> None:
    """Writes bytes as they come, as they are: decoding could lose some. Those of a UTF-8 character come together.

    Ctrl-C ends it, and what has come is written.
    """
    characters, held = codecs.getincrementaldecoder("utf-8")("replace"), b""
    try:
        for more in itertools.chain([prompt], (bytes([byte]) for byte in new)):
            held += more
            characters.decode(more)
            if not characters.getstate()[0]:
                out.write(held)
                out.flush()
                held = b""
    finally:
        out.write(held + b"\n")
        out.flush()


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
    words = {"error": ("mean squared error of what was hidden", ""), "saying the mean": ("that of saying the mean", "")}
    print(figures_in_words(figures, words))
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
        figures, said = SPECIAL[arguments.what](given)
        print(json.dumps(figures, indent=1) if arguments.json else said)
        return
    if arguments.run:
        run = Run.load(arguments.run, warn)
        if run.options.kind != arguments.what or given:
            wrong = f"kind {run.options.kind}" if run.options.kind != arguments.what else "its own options"
            raise UsageError(f"{arguments.run} is a run with {wrong}; give either --run or options")
        run.set_threads()
        figures = run.judge(True, warn)
    else:
        with tempfile.TemporaryDirectory() as folder:
            warn("trains a model to judge, in a folder that is gone afterwards (--run DIR judges one that is kept)")
            run = runs.train(Options.of(arguments.what, **given), Path(folder), evaluations=0, say=warn)
            figures = run.judge(True, warn)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    elif arguments.run:
        report(run, figures)
    else:
        print(figures_in_words(figures, run.task.words))


def eval_photographs(given: dict) -> tuple[list[dict], str]:
    only(given)
    warn("rebuilding two photographs from their entities, three seeds each")
    rows = photographs.table()
    said = "how well a photograph is rebuilt from its entities, PSNR in dB (more is better); gain: adaptive - uniform"
    return rows, f"{said}\n{table(rows)}"


def eval_memory(given: dict) -> tuple[dict, str]:
    given = only(given, "steps", "seed")
    warn("training two small models, with a memory and forgetting between two segments")
    figures = run_memory(**given)
    said = "share of questions answered, about facts of the same segment and of the one before (more is better)"
    return figures, f"{said}\n{figures_in_words(figures, MEMORY)}"


MEMORY = {
    "with memory, same": ("with a memory, about the same segment", "of 1"),
    "with memory, next": ("with a memory, about the segment before", "of 1"),
    "forgetting, same": ("forgetting in between, about the same segment", "of 1"),
    "forgetting, next": ("forgetting in between, about the segment before", "of 1"),
    "guessing": ("guessing", "of 1"),
}
SPECIAL = {"photographs": eval_photographs, "memory": eval_memory}


def only(given: dict, *names: str) -> dict:
    if other := sorted(set(given) - set(names)):
        raise UsageError(
            f"--{other[0].replace('_', '-')} has no meaning here; what has: {', '.join(names) or 'nothing'}"
        )
    return given


def study(arguments: argparse.Namespace) -> None:
    """A study's cells and table; its picture, too, where Ctrl-C stops it."""
    name = arguments.study.__module__.rpartition(".")[2]
    if name in STUDIES:
        print(f"each line: what was trained, and its {STUDIES[name].MEASURED}")
    print(f"{arguments.out} keeps study.json as results come, then study.md and study.png", flush=True)
    try:
        arguments.study(arguments)
    finally:
        if (arguments.out / "study.md").exists():  # written with the first cell that is kept
            draw(arguments.out, warn)


def plot(arguments: argparse.Namespace) -> None:
    warn(f"drawing {arguments.run}")
    for path in draw(arguments.run, warn):
        print(path)


def warn(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
