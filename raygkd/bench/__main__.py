"""``python -m raygkd.bench core``: benchmarks of the core, without Ray and MLflow."""

from __future__ import annotations

import argparse

from raygkd.bench.rows import report
from raygkd.bench.suites import SUITES, measured


def main() -> None:
    """Measure a suite and print its table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m raygkd.bench", description="Measure speed and memory, side by side."
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = measured(SUITES[arguments.suite], quick=arguments.quick)
    print(report(rows, as_json=arguments.json))


if __name__ == "__main__":
    main()
