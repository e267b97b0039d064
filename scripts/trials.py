"""Run many trials of a training with other settings, and compare them.

    python scripts/trials.py my_trials.yaml --output output/rates          all of them, one after another
    python scripts/trials.py my_trials.yaml --output output/rates --table  what has come of them so far
    python scripts/trials.py my_trials.yaml --count                        how many runs there are
    python scripts/trials.py my_trials.yaml --output output/rates --only 3 one run, as the tasks of a Slurm array do

docs/recipes.md says what the file holds. Trials that are stopped carry on with the same command.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import default_config
from reports.page import write_page
from reports.results import read_runs
from trials.plan import read_plan
from trials.running import Asked, Runs, run_listed, run_with_optuna
from trials.table import table_of
from utils.command import Parser, run_command
from utils.errors import UserError
from utils.files import write_whole
from utils.settings import flatten
from utils.surroundings import a_path
from utils.tables import show


def main(arguments: list[str]) -> int:
    parser = Parser(prog="scripts/trials.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("plan", type=a_path, metavar="FILE", help="YAML: what varies")
    parser.add_argument("--output", type=a_path, metavar="DIR", help="folder of all results (output/NAME of the file)")
    parser.add_argument("--only", type=int, metavar="N", help="run number N alone; with Optuna, worker N")
    parser.add_argument("--count", action="store_true", help="print how many runs there are, and end")
    parser.add_argument("--table", action="store_true", help="print the table of what is done, and end")
    given = parser.parse_args(arguments)
    plan = read_plan(given.plan)
    if given.count:
        print(plan.count if plan.is_drawn_by_optuna else len(plan.trials()) * len(plan.seeds))
        return 0
    runs = Runs(plan, given.output or Path("output", given.plan.stem), lambda line: print(line, flush=True))
    if not given.table:
        runs.listen()
        try:
            if plan.is_drawn_by_optuna:
                run_with_optuna(runs, given.only or 0)
            else:
                run_listed(runs, given.only)
        except Asked as asked:
            print("stopped; the same command carries on", flush=True)
            return asked.status
    outcomes = runs.outcomes()
    if not outcomes:
        raise UserError(f"no trial in {runs.output} is done yet")
    table = table_of(plan, outcomes)
    show(table)
    folders = [Path(one.folder) for one in outcomes if one.folder]
    if folders and not given.table:
        write_whole(runs.output / "trials.md", (table.markdown() + "\n").encode())
        page = write_page(read_runs(folders)[0], flatten(default_config()))
        write_whole(runs.output / "trials.html", page.encode(errors="backslashreplace"))
        print(f"results in {runs.output / 'trials.html'}, the table in {runs.output / 'trials.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
