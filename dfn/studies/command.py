"""``dfn study``: the studies by name."""

import argparse

from . import language, length, parts, recall

STUDIES = {"language": language, "recall": recall, "length": length, "parts": parts}


def add_studies(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each; the parsed arguments have its function as ``study``."""
    names = parser.add_subparsers(required=True, metavar="STUDY")
    for name, module in STUDIES.items():
        said = module.__doc__.split("\n\n")[0].replace("\n", " ")
        one = names.add_parser(name, help=said.partition(": ")[2], description=said)
        module.add(one)
        one.set_defaults(study=module.run)
