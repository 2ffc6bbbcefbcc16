"""python -m bench: measures every case, prints the table, writes JSON, Markdown and a picture.

python -m bench                          all cases, results to bench/results
python -m bench --only knn --seconds 3   one op, longer
python -m bench guard main               is this tree slower than that commit? both in turns; the exit status says
python -m bench compare OLD.json NEW.json
python -m bench plot RESULT.json         draws it again
python -m bench page RESULT.json         writes its Markdown again
python -m bench docs RESULT.json         puts the table into docs/benchmarks.md
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from . import guard, plots, report
from .cases import cases_for, chosen, quick_cases
from .timing import ceilings


def result(text: str) -> Path:
    try:
        json.loads(Path(text).read_text(encoding="utf-8"))["rows"]
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise argparse.ArgumentTypeError(f"{text} is no result of the benchmark") from None
    return Path(text)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["guard"]:
        return guard.main(argv[1:])
    if argv[:1] == ["compare"]:
        parser = argparse.ArgumentParser(prog="python -m bench compare")
        parser.add_argument("before", type=result)
        parser.add_argument("after", type=result)
        given = parser.parse_args(argv[1:])
        print(report.compare(given.before, given.after))
        return 0
    if argv[:1] == ["plot"]:
        parser = argparse.ArgumentParser(prog="python -m bench plot")
        parser.add_argument("result", type=result)
        print(f"written to {plots.draw(parser.parse_args(argv[1:]).result)}")
        return 0
    if argv[:1] == ["page"]:
        parser = argparse.ArgumentParser(prog="python -m bench page")
        parser.add_argument("result", type=result)
        print(f"written to {report.write_page(parser.parse_args(argv[1:]).result)}")
        return 0
    if argv[:1] == ["docs"]:
        parser = argparse.ArgumentParser(prog="python -m bench docs")
        parser.add_argument("result", type=result)
        report.update_page(parser.parse_args(argv[1:]).result)
        return 0
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("--only", default="", help="cases whose name, as in a table or in JSON, contains this")
    parser.add_argument("--skip", nargs="*", default=(), help="contenders to leave out, by name, or all 'compiled'")
    parser.add_argument("--quick", action="store_true", help="one case an op")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each measurement")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    given = parser.parse_args(argv)
    try:
        cases = chosen(quick_cases() if given.quick else cases_for(given.device), given.only)
    except ValueError as error:
        parser.error(str(error))
    facts, limits = report.machine(), ceilings(given.device)  # later the results themselves make the tree dirty
    rows = report.measure_all(
        cases,
        after_each=lambda rows: report.write(rows, given.out, facts, limits),
        device=given.device,
        dtype=getattr(torch, given.dtype),
        seconds=given.seconds,
        skip=tuple(given.skip),
    )
    print(report.plain(rows))
    path = report.write(rows, given.out, facts, limits)
    print(f"written to {path}, {plots.draw(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
