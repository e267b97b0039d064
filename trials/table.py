"""What has come of the trials: a row for each, over its seeds."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from trials.plan import Plan, words_of
from trials.running import Outcome
from utils.tables import Table


def table_of(plan: Plan, outcomes: Sequence[Outcome]) -> Table:
    """Make the table, the best trial first; spread is the standard deviation over seeds."""
    by_trial: dict[str, list[Outcome]] = defaultdict(list)
    for one in outcomes:
        by_trial[one.trial].append(one)
    reaches = math.isfinite(plan.reach)
    ranked = sorted(by_trial.items(), key=lambda item: -_mean([one.best for one in item[1]], -math.inf))
    rows = []
    for name, runs in ranked:
        settings = runs[0].settings
        title = name if plan.by == "variants" else f"{name}: {' '.join(words_of(settings))}"
        sound = [one for one in runs if math.isfinite(one.best)]
        row = [
            title,
            str(len(sound)) + (f" of {len(runs)}" if len(sound) < len(runs) else ""),
            spread([one.best for one in sound], 2),
            spread([one.last for one in sound], 2),
            spread([one.seconds for one in sound], 0),
        ]
        if reaches:
            row.append(time_to([one.reached for one in sound]))
        rows.append(row)
    metric = plan.metric or "metric"
    columns = ["trial", "runs", f"best {metric}", f"last {metric}", "seconds"]
    return Table("Trials", [*columns, *([f"seconds to {plan.reach:g}"] if reaches else [])], rows)


def _mean(values: list[float], otherwise: float) -> float:
    sound = [value for value in values if math.isfinite(value)]
    return statistics.mean(sound) if sound else otherwise


def spread(values: list[float], digits: int) -> str:
    """Write a mean, and the deviation where there are several."""
    if not values:
        return ""
    text = f"{statistics.mean(values):,.{digits}f}"
    return f"{text} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else text


def time_to(seconds: list[float]) -> str:
    """Write the median of times, and from where to where they go; runs that never got there come last."""
    if not seconds:
        return ""
    ordered = sorted(math.inf if math.isnan(one) else one for one in seconds)
    words = [
        "never" if math.isinf(one) else f"{one:,.0f}" for one in (statistics.median(ordered), ordered[0], ordered[-1])
    ]
    return words[0] if len(seconds) == 1 else f"{words[0]} ({words[1]} to {words[2]})"
