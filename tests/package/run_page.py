"""Does what a page says, in the current folder: `python run_page.py PAGE [commands]`. Exit status 1 if it is not so.

Blocks of Python run one after the other, each on its own, as a reader would copy it. What a line `print(..)  # said`
prints must be what is said; `# about 1.9 nats` lets numbers be 15 % off, `# e.g. ..` says nothing that could be held. A
block ```text right after a block is all that the block prints, with `...` for what varies.

Lines `dfn ..` in blocks of sh must parse; with `commands` they run, too, two training steps at a time.
"""

import contextlib
import doctest
import io
import re
import shlex
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Page:
    def __init__(self, path: Path, run_commands: bool):
        self.path, self.run_commands = path, run_commands
        self.wrong: list[str] = []

    def run(self) -> None:
        printed, text = "", self.path.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            kind, code = block.groups()
            where = f"{self.path.name}, line {text[: block.start()].count(chr(10)) + 2}"
            if kind == "text" and printed and not same(code, printed):
                self.wrong.append(f"{where}: prints\n{printed}")
            printed = ""
            if kind == "python":
                printed = self.python(code, where)
            elif kind == "sh":
                printed = self.commands(code, where)

    def python(self, code: str, where: str) -> str:
        """What it prints."""
        lines, out = code.splitlines(), io.StringIO()

        def print_and_hold(*values: object, sep: str = " ", end: str = "\n", **options: object) -> None:
            text = sep.join(map(str, values))
            out.write(text + end)
            line = lines[sys._getframe(1).f_lineno - 1]
            said = re.search(r"\)\s+# (.*)$", line)
            if said and not same(said[1], text):
                self.wrong.append(f"{where}: {line.strip()}\n  prints {text}")

        exec(compile(code, where, "exec"), {"__name__": "__main__", "print": print_and_hold})
        return out.getvalue()

    def commands(self, code: str, where: str) -> str:
        """What the lines of `dfn` print; other lines are other tests', or the reader's."""
        from dfn import cli

        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["dfn"] or "--help" in words:
                continue
            cli.build_parser().parse_args(words[1:])
            if self.run_commands:
                with contextlib.redirect_stdout(out):
                    status = cli.main([*words[1:], *few_steps(words)])
                if status:
                    self.wrong.append(f"{where}: {line} ends with {status}")
        return out.buffer.getvalue().decode("utf-8", "replace")


def few_steps(words: list[str]) -> list[str]:
    return ["--steps", "4" if "--resume" in words else "2"] if words[1] == "train" else []


def same(said: str, printed: str) -> bool:
    said, printed = " ".join(said.split()), " ".join(printed.split())
    if said.startswith("e.g. "):
        return True
    if not said.startswith("about "):
        return doctest.OutputChecker().check_output(said + "\n", printed + "\n", doctest.ELLIPSIS)
    said = said.removeprefix("about ")
    if NUMBER.sub("#", said) != NUMBER.sub("#", printed):
        return False
    numbers = ([float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (said, printed))
    return all(abs(a - b) <= 0.15 * abs(a) for a, b in zip(*numbers, strict=True))


def main(path: Path, run_commands: bool) -> None:
    """Raises AssertionError with all that is not as the page says."""
    page = Page(path, run_commands)
    page.run()
    assert not page.wrong, "\n".join(page.wrong)


if __name__ == "__main__":
    from dfn.runs import bits

    bits.judged.__defaults__ = (2**12, 4)  # so many bytes judge a run of two steps well enough
    try:
        main(Path(sys.argv[1]), "commands" in sys.argv[2:])
    except AssertionError as error:
        sys.exit(str(error))
