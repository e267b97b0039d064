"""Look at runs: one page with their figures and curves, a table, or a picture.

    python scripts/report.py output/crossformer_small/default              report.html in that folder
    python scripts/report.py output/crossformer_small/* --to runs.html     several, side by side
    python scripts/report.py output/crossformer_small/* --to runs.csv      their figures; --to runs.png draws the curves
    python scripts/report.py output/crossformer_small/* --table            their figures, in the terminal

The page is one file that needs no network. For a single run it also has what ``main.py --eval --report`` has written
into its folder: classes, confusions, calibration and the images it gets wrong.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import default_config
from reports.charts import draw_png
from reports.page import write_page
from reports.results import FACTS, facts_of, in_words, known, read_runs
from utils.command import Parser, run_command
from utils.errors import UserError
from utils.files import write_whole, writing
from utils.names import printable
from utils.settings import flatten
from utils.surroundings import a_path
from utils.tables import Table, csv_of, show

KINDS = (".html", ".csv", ".png")


def report(arguments: list[str]) -> None:
    parser = Parser(prog="scripts/report.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", type=a_path, metavar="RUN", help="results folder of a run, with metrics.jsonl"
    )
    parser.add_argument("--to", type=a_path, help="file to write: .html, .csv or .png (report.html in the first RUN)")
    parser.add_argument("--table", action="store_true", help="print the figures, and write what --to names only")
    given = parser.parse_args(arguments)
    folders = list(dict.fromkeys(given.runs))
    if given.to and given.to.suffix not in KINDS:
        raise UserError(f"--to {given.to} is to end with one of {', '.join(KINDS)}")
    if len(folders) > 1 and not (given.to or given.table):
        raise UserError("several runs need a file to be written to, for example --to runs.html, or --table")
    runs, missing = read_runs(folders)
    for line in missing:
        print(f"left out: {printable(line)}", file=sys.stderr)
    facts = [facts_of(run) for run in runs]
    if given.table:
        told = known(facts)
        rows = [[in_words(name, of_run[name]) for name in told] for of_run in facts]
        show(Table(f"{len(runs)} run{'s' * (len(runs) > 1)}", [FACTS[name] for name in told], rows))
        if not given.to:
            return
    to = given.to or folders[0] / "report.html"
    match to.suffix:
        case ".html":
            content = write_page(runs, flatten(default_config())).encode(errors="backslashreplace")
        case ".csv":
            content = csv_of(list(FACTS), ([of_run[name] for name in FACTS] for of_run in facts))
        case _:
            content = draw_png(runs)
    with writing(to, "choose another --to"):
        write_whole(to, content)
    print(f"report in {to}")


if __name__ == "__main__":
    sys.exit(run_command(report, sys.argv[1:]))
