"""One run after another: each is main.py with its own tag, carries on where it was stopped, and is not done twice."""

import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reports.results import METRICS, Results, read_run
from trials.plan import Plan, Trial, words_of
from utils.errors import UserError
from utils.processes import CTRL_C_STATUS, STOP_SIGNALS
from utils.randomness import derive_seed

ROOT = Path(__file__).resolve().parent.parent
SECONDS_BETWEEN_LOOKS = 1.0
DONE = "done: best"
"""How the last line of a run begins that has reached its end."""


class Asked(BaseException):
    """A signal has asked to stop; the run is saved."""

    def __init__(self, number: int):
        super().__init__(number)
        self.status = CTRL_C_STATUS if number == signal.SIGINT else 0


@dataclass
class Outcome:
    """How a run went.

    Attributes:
        flags: of main.py.
        status: ``done``, ``pruned``, or why it failed.
        best, last: of the metric, over its evaluations of whatever weights.
        seconds: of training, to the end and to the value that was to be reached.
    """

    trial: str
    seed: int
    settings: dict[str, Any]
    flags: list[str]
    status: str
    best: float = math.nan
    last: float = math.nan
    seconds: float = math.nan
    reached: float = math.nan
    folder: str = ""


class Runs:
    """Starts the runs of a plan, and keeps what has become of them in a file.

    Args:
        output: folder of all results.
        say: prints a line.
    """

    def __init__(self, plan: Plan, output: Path, say: Callable[[str], None]):
        self.plan, self.output, self.say = plan, output.absolute(), say
        self.file = self.output / "trials.jsonl"
        self.asked = 0
        self.process: subprocess.Popen | None = None

    def outcomes(self) -> list[Outcome]:
        """List those that have come to an end, in the order of their ends."""
        found = {}
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError):  # the last one may have been cut short
                    one = Outcome(**json.loads(line))
                    found[one.trial, one.seed] = one
        return list(found.values())

    def has(self, trial: Trial, seed: int) -> bool:
        """Tell whether this run is done. One that has failed is tried again.

        Raises:
            UserError: a run of this name had other settings.
        """
        for one in self.outcomes():
            if (one.trial, one.seed) == (trial.name, seed):
                now = json.loads(json.dumps(trial.settings)), self.plan.flags
                if (one.settings, one.flags) != now:
                    was = one.settings if one.settings != now[0] else " ".join(one.flags)
                    raise UserError(
                        f"{self.output} has {trial.name} with other settings, {was}: give the trials another "
                        "--output, or the variant another name"
                    )
                return one.status in ("done", "pruned")
        return False

    def run(self, trial: Trial, seed: int, look: Callable[[list[dict]], bool] = lambda _: False) -> Outcome:
        """Take a run to its end.

        Args:
            look: is shown the run's evaluations now and then; True ends it.

        Raises:
            Asked: a signal has come.
        """
        tag = f"{trial.name}_seed_{seed}"
        several = [str(ROOT / "scripts" / "launch.py"), "--standalone", "--nproc_per_node", str(self.plan.processes)]
        command = [
            sys.executable, *(several if self.plan.processes > 1 else []), str(ROOT / "main.py"), *self.plan.flags,
            "--output", str(self.output), "--tag", tag, "--opts", *words_of(trial.settings), "SEED", str(seed),
        ]  # fmt: skip
        said = self.output / f"{tag}.txt"
        self.output.mkdir(parents=True, exist_ok=True)
        pruned = False
        with open(said, "wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            if self.asked:
                self.process.send_signal(self.asked)
            while self.process.poll() is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                if not pruned and look(self.evaluations(tag)):
                    pruned = True
                    self.process.terminate()
        status, self.process = self.process.returncode, None
        if self.asked:
            raise Asked(self.asked)
        lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
        if status == 0 and not pruned and any(line.startswith(DONE) for line in lines):
            ended = "done"
        else:
            ended = "pruned" if pruned else next((line for line in reversed(lines) if line.strip()), f"status {status}")
        outcome = self._look_at(trial, seed, tag, ended)
        with open(self.file, "a", encoding="utf-8") as table:
            table.write(json.dumps(vars(outcome)) + "\n")
        return outcome

    def _look_at(self, trial: Trial, seed: int, tag: str, status: str) -> Outcome:
        outcome = Outcome(trial.name, seed, trial.settings, self.plan.flags, status)
        run = self.results(tag)
        if run is None or not run.measured:
            return outcome
        metric = self.plan.metric or run.measured[0]
        if metric not in run.measured:
            return outcome
        values = [(one[metric], 3600 * one.get("hours", math.nan)) for one in run.evaluations if metric in one]
        last_step = run.evaluations[-1]["step"]
        outcome.folder = str(run.folder)
        outcome.best = max(value for value, _ in values)
        outcome.last = max(one[metric] for one in run.evaluations if one["step"] == last_step)
        outcome.seconds = values[-1][1]
        outcome.reached = next((seconds for value, seconds in values if value >= self.plan.reach), math.nan)
        return outcome

    def results(self, tag: str) -> Results | None:
        """Read what a run has written so far; None where it has not begun."""
        with suppress(UserError, StopIteration):
            folder = next(path.parent for path in self.output.rglob("metrics.jsonl") if path.parent.name == tag)
            return read_run(folder, tag)
        return None

    def evaluations(self, tag: str) -> list[dict]:
        run = self.results(tag)
        return run.evaluations if run else []

    def listen(self) -> None:
        """Hand signals on to the run that is under way, which saves and ends."""

        def answer(number: int, _: Any) -> None:
            self.asked = number
            if self.process is not None:
                self.process.send_signal(number)

        for number in STOP_SIGNALS:
            signal.signal(number, answer)


def run_listed(runs: Runs, only: int | None) -> None:
    """Run the trials of a plan that lists them: seed by seed, so that all trials see the same weather.

    Args:
        only: the number of a run, in this order; None for all.
    """
    order = [(trial, seed) for seed in runs.plan.seeds for trial in runs.plan.trials()]
    if only is not None and not 0 <= only < len(order):
        raise UserError(f"--only {only}: there are {len(order)} runs, from 0 to {len(order) - 1}")
    for number, (trial, seed) in enumerate(order):
        if only not in (None, number) or runs.has(trial, seed):
            continue
        runs.say(f"{number + 1}/{len(order)}  {trial.name} seed {seed}  {' '.join(words_of(trial.settings))}")
        tell(runs, runs.run(trial, seed))


def run_with_optuna(runs: Runs, worker: int) -> None:
    """Let Optuna choose each trial by how those before it went.

    Its storage is a file in the results folder, which several workers may share. A trial that was stopped carries on.

    Args:
        worker: the number of this one.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UserError(f"by: {runs.plan.by} needs a package: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan, states = runs.plan, optuna.trial.TrialState
    runs.output.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(runs.output / "optuna.log")))
    study = optuna.create_study(
        study_name="trials",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        pruner={
            "none": optuna.pruners.NopPruner,
            "median": optuna.pruners.MedianPruner,
            "hyperband": optuna.pruners.HyperbandPruner,
        }[plan.pruner](),
    )
    for stale in study.get_trials(states=[states.RUNNING]):
        if stale.user_attrs.get("worker") == worker:
            study.tell(stale.number, state=states.FAIL)
            carried = {"carries_on": stale.user_attrs.get("carries_on", stale.number)}
            study.enqueue_trial(stale.params, user_attrs=carried)
    while len(study.get_trials(states=[states.COMPLETE, states.PRUNED])) < plan.count:
        study.sampler = sampler_of(optuna, plan, len(study.trials))
        asked = study.ask({key: distribution_of(optuna, what) for key, what in plan.settings.items()})
        asked.set_user_attr("worker", worker)
        trial = Trial(f"trial_{asked.user_attrs.get('carries_on', asked.number):03d}", dict(asked.params))
        runs.say(f"{trial.name}  {' '.join(words_of(trial.settings))}")
        found: list[float] = []
        state = states.COMPLETE
        for seed in plan.seeds:
            prunes = plan.pruner != "none" and seed == plan.seeds[0]
            look = partial(is_hopeless, asked, plan) if prunes else (lambda _: False)
            outcome = runs.run(trial, seed, look)
            tell(runs, outcome)
            found.append(outcome.best)
            if outcome.status != "done":
                state = states.PRUNED if outcome.status == "pruned" else states.FAIL
                break
        study.tell(asked, statistics.mean(found) if state == states.COMPLETE else None, state=state)
        if state == states.FAIL and not math.isfinite(found[-1]):
            raise UserError(f"{trial.name} has failed before its first evaluation: {outcome.status}")


def is_hopeless(trial: Any, plan: Plan, evaluations: list[dict]) -> bool:
    """Report evaluations to Optuna and ask whether the trial is to go on."""
    for number, one in enumerate(evaluations):
        value = one.get(plan.metric or next((name for name in METRICS if name in one), ""))
        if isinstance(value, int | float):
            trial.report(value, number)
    return bool(evaluations) and trial.should_prune()


def sampler_of(optuna: Any, plan: Plan, number: int) -> Any:
    """Make the sampler for the next trial, which draws by the file's seed and the number of trials so far."""
    kinds = {"tpe": "TPESampler", "gp": "GPSampler", "cmaes": "CmaEsSampler", "qmc": "QMCSampler"}
    return getattr(optuna.samplers, kinds[plan.by])(seed=derive_seed(plan.seed, "trial", number) % 2**31)


def distribution_of(optuna: Any, what: Any) -> Any:
    """Say in Optuna's words what a setting may be."""
    if isinstance(what, list):
        return optuna.distributions.CategoricalDistribution(what)
    log = bool(what.get("log"))
    if what.get("whole"):
        return optuna.distributions.IntDistribution(what["from"], what["to"], log=log)
    return optuna.distributions.FloatDistribution(what["from"], what["to"], log=log)


def tell(runs: Runs, outcome: Outcome) -> None:
    """Say in a line how a run went."""
    reached = ""
    if math.isfinite(runs.plan.reach):
        at = f"after {outcome.reached:,.0f} s" if math.isfinite(outcome.reached) else "never"
        reached = f"  {runs.plan.reach:g} {at}"
    runs.say(
        f"    {outcome.status}: best {outcome.best:.2f}, last {outcome.last:.2f}, {outcome.seconds:,.0f} s{reached}"
    )
