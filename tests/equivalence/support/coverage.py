"""The table of covered cases: run the matrix on every number of ranks, write `coverage.md` (make coverage-table)."""

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.equivalence.support.factors import FACTORS, NOT_TOGETHER, ONCE, RANKS, Case, all_pairs, cases
from tests.launching import ROOT, launch

COVERAGE = Path(__file__).parent.with_name("coverage.md")
Results = dict[str, dict[str, float]]


class Launch(NamedTuple):
    """Cases that run in one start of so many ranks: every `step`-th from `first` on."""

    ranks: int
    first: int = 0
    step: int = 1

    def cases(self) -> tuple[Case, ...]:
        """What it runs."""
        return cases(self.ranks)[self.first :: self.step]

    def run(self, folder: Path) -> Results:
        """{case: numbers by name}."""
        part = f"{self.first}:{self.step}"
        return launch("tests.equivalence.support.matrix", part, ranks=self.ranks, tmp_path=folder, timeout=1800)


LAUNCHES = (Launch(4, 0, 2), Launch(4, 1, 2), Launch(6), Launch(8), Launch(16))
"""All but the first are slow; it takes half of the cases on 4 ranks."""


def lines_of(launched: Launch, results: Results) -> list[str]:
    """A table row for each case of a launch."""
    rows = []
    for case in launched.cases():
        found = results[str(case)]
        cells = [getattr(case, factor) for factor in FACTORS]
        cells += [_number(found, "gradients"), _number(found, "parameters")]
        cells.append(f"{found['saved bytes']:.2f}" if "saved bytes" in found else "")
        rows.append(f"| {launched.ranks} | {' | '.join(cells)} |")
    return rows


def header() -> list[str]:
    """Of the table of cases."""
    columns = ["ranks", *FACTORS, "gradients", "parameters", "saved"]
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


def listed(text: str) -> list[tuple[str, ...]]:
    """Ranks and values of the cases in a written table, without their errors."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [tuple(row[: 1 + len(FACTORS)]) for row in rows if row[0].isdigit()]


def expected() -> list[tuple[str, ...]]:
    """Ranks and values of all cases, as `listed` gives them."""
    return [(str(case.ranks), *(value for _, value in case.values())) for each in LAUNCHES for case in each.cases()]


def text_of(results: dict[Launch, Results]) -> str:
    """The whole file."""
    possible = len(all_pairs()) - len(NOT_TOGETHER)
    impossible = [f"| {a[0]} {a[1]} | {b[0]} {b[1]} | {why} |" for (a, b), why in NOT_TOGETHER.items()]
    balance = results[LAUNCHES[0]]["balance"]
    return "\n".join(
        [
            "# Equivalence: what is covered, and the errors",
            "",
            "Written by `make coverage-table`. "
            f"{len(expected())} cases hold all {possible} possible pairs of values of the {len(FACTORS)} factors;",
            f"{len(ONCE)} of them are there for the degrees 3, 6 and 8. A case trains two optimizer steps of packs and",
            "is held against one sample at a time: *gradients*, largest relative error in the first step (fp64);",
            "*parameters*, the same after the second (fp64; distributed optimizer: fp32); *saved*, bytes",
            "kept for the backward relative to no recompute, which changes no bit. See `factors.py`, `matrix.py`.",
            "",
            *header(),
            *(line for launched, found in results.items() for line in lines_of(launched, found)),
            "",
            "## Balance losses",
            "",
            "Mixed degrees against CP 1 on the same packs (gradients, fp64, 4 ranks); *matters*: leaving the loss out.",
            "",
            "| case | error |",
            "| --- | --- |",
            *(f"| {case} | {error:.1e} |" for case, error in balance.items()),
            "",
            "## Pairs that cannot be",
            "",
            "| value | value | why |",
            "| --- | --- | --- |",
            *impossible,
            "",
            "Held by the values themselves: interleaved stages need more than one stage, so they are a value of `pp`;",
            "the distributed optimizer refuses doubles, so the optimizer says the precision; a case runs on",
            f"the fewest of {', '.join(map(str, RANKS))} ranks that have its groups (TP x PP x CP, PP x EP).",
            "",
        ]
    )


def _number(found: dict[str, Any], name: str) -> str:
    return f"{found[name]:.1e}" if name in found else ""


def main() -> None:
    """Launch all and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for launched in LAUNCHES:
            results[launched] = launched.run(Path(folder))
            print(*lines_of(launched, results[launched]), sep="\n", flush=True)
    COVERAGE.write_text(text_of(results))
    print(f"written: {COVERAGE.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
