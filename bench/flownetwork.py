"""The published FlowNetwork page's table, measured here: `python -m bench.flownetwork [--preset compact]`.

Writes results/<date>-flownetwork-<preset>.json and .md.
"""

import argparse
import json
from pathlib import Path

from dfn.flownetwork import PRESETS
from dfn.flownetwork.benchmark import benchmark_flow_network, table

from .report import machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.flownetwork", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="compact")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    results = benchmark_flow_network(preset=given.preset)
    facts = machine()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{facts['date']}-flownetwork-{given.preset}.json"
    path.write_text(json.dumps({"machine": facts, "preset": given.preset, **results}, indent=1) + "\n")
    made_by = ", ".join(f"{name} {value}" for name, value in facts.items())
    path.with_suffix(".md").write_text(f"# FlowNetwork, preset {given.preset}\n\n{made_by}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
