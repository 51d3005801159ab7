"""Check whether a comparison is a new record of the speed run: `python -m bench.record_check FOLDER` (RECORDS.md)."""

from dataclasses import dataclass

from bench.report.placeholder import Logs
from bench.report.records import check, read_records
from bench.workers.machine import ROOT
from mlx_transformer.run.flags import Argument, parse
from mlx_transformer.utils.errors import RunFailed, exit_cleanly
from mlx_transformer.utils.terminal import Terminal

PUBLISHED = ROOT / "results" / "published"


@dataclass
class Flags:
    """Check whether a finished comparison is a new record: five seeds, the same text, faster than the last record."""

    folder: Argument
    """folder of the comparison"""


def main() -> None:
    """Print each condition and whether it is met. Raises RunFailed if the comparison is no record."""
    flags = parse(Flags, "python -m bench.record_check")
    records = read_records(Logs(PUBLISHED))
    places = [(PUBLISHED / record.folder).resolve() for record in records]
    if (here := flags.folder.resolve()) in places:  # a record of the history: judged by those before it
        records = records[: max(1, places.index(here))]
    name, rules = check(flags.folder, records)
    columns = {
        "condition": [rule.text for rule in rules],
        "met": ["yes" if rule.met else "NO" for rule in rules],
        "found": [rule.found for rule in rules],
    }
    Terminal().print_columns(columns, ["condition", "met"])
    if broken := [rule.text for rule in rules if not rule.met]:
        raise RunFailed(f"{name} is not a record: not met: {'; '.join(broken)}")
    print(f"{name} is a record: its place is results/published/records/, with a line in results/published/records.json")


if __name__ == "__main__":
    exit_cleanly(main)
