"""The report of an inspection, as a person reads it."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.inspection import FAULTS, KINDS
from data.near_duplicates import MOST_PAIRS
from utils.names import printable

NAMES_SHOWN = 10


def say(text: str, style: str = "") -> None:
    """Print a text as it is, whatever a name in it holds; its first line may be empty."""
    body = text.lstrip("\n")
    text = text[: len(text) - len(body)] + printable(body)
    Console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_report(report: dict, left_out: str, file: Path, sheet: Path | None) -> None:
    """Print a summary of what :func:`data.inspection.make_report` gives, and where ``file`` and ``sheet`` say more."""
    say(f"\n{report['data_path']}", "bold")
    for name in report["missing_splits"]:
        say(f"there is no {name}: nothing is known of it", "yellow")
    Console().print(class_table(report), "", size_table(report), sep="\n")
    for name, split in report["splits"].items():
        print_colours(name, split["colours"], report)
    for name, split in report["splits"].items():
        heading = f"classes without an image in {name} ({len(split['classes_missing']):,})"
        print_list(heading, split["classes_missing"], file, "yellow")
    for kind, meaning in KINDS.items():
        findings = [entry for split in report["splits"].values() for entry in split["findings"][kind]]
        lines = [f"{entry['image']}: {entry['detail']}" if "detail" in entry else entry["image"] for entry in findings]
        heading = f"{kind.replace('_', ' ')} ({len(findings):,}): {meaning}"
        print_list(heading, lines, file, "red" if kind in FAULTS else "yellow")
    for name, split in report["splits"].items():
        for what, lines in split.get("odd_objects", {}).items():
            print_list(f"{name}: {what} ({len(lines):,})", lines, file, "yellow")
    for name, split in report["splits"].items():
        lines = [f"{' = '.join(group['images'])}{differing(group)}" for group in split["duplicates"]]
        print_list(f"more than once in {name} ({len(lines):,})", lines, file, "yellow")
    lines = [f"{' = '.join(group['val'] + group['train'])}{differing(group)}" for group in report["leaks"]]
    print_list(f"in val and in train too ({len(lines):,})", lines, file, "red")
    lines = [f"{pair['val']} ~ {pair['train']}" for pair in report["alike"]]
    alike = "the same photograph in another size or quality, or frames of one film: they make the accuracy look better"
    count = f"{'at least ' * (len(lines) >= MOST_PAIRS)}{len(lines):,}"
    print_list(f"alike in val and in train ({count}), perhaps {alike}", lines, file, "yellow")
    say(f"\neverything in {file}" + (f", what training makes of the images in {sheet}" if sheet else ""))
    verdict = "the data set is sound" if report["sound"] else "the data set is NOT sound: mend what is listed in red"
    verdict += f"; {left_out}" * bool(left_out)
    say(verdict, "green" if report["sound"] else "red")


def class_table(report: dict) -> Table:
    """Tabulate how many images there are of each split and class."""
    table = Table("", "images", "decoded", "classes", "smallest class", "median", "largest class", box=None)
    for name, split in report["splits"].items():
        counts = split["images_per_class"]
        per_class = [f"{counts[key]['images']:,}" for key in ("smallest", "largest")] if counts else ["-", "-"]
        per_class.insert(1, f"{counts['median']:,.10g}" if counts else "-")
        classes = f"{report['classes'] - len(split['classes_missing']):,}"
        table.add_row(name, f"{split['images']:,}", f"{split['decoded']:,}", classes, *per_class)
    return right_aligned(table)


def size_table(report: dict) -> Table:
    """Tabulate how large the images are."""
    table = Table("", "min", "median", "mean", "max", box=None)
    for name, split in report["splits"].items():
        for what, values in (split["sizes"] or {}).items():
            table.add_row(f"{name} {what}", *(f"{value:,.0f}" for value in values.values()))
    return right_aligned(table)


def right_aligned(table: Table) -> Table:
    """Align all columns but the first."""
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def print_colours(name: str, colours: dict | None, report: dict) -> None:
    """Print a split's colours beside those that the settings normalise by."""
    if not colours:
        return

    def triple(values: list[float]) -> str:
        return "  ".join(f"{value:.3f}" for value in values)

    say(f"\nred, green and blue in {name}, from {colours['sampled_images']:,} images of equal weight")
    say(f"    mean                    {triple(colours['mean'])}    DATA.MEAN  {triple(report['data_mean'])}")
    within = triple(colours["std_within_images"])
    say(f"    deviation in an image   {within}    DATA.STD   {triple(report['data_std'])}")
    say(f"    deviation of all pixels {triple(colours['std_of_all_pixels'])}")


def print_list(heading: str, lines: list[str], file: Path, style: str) -> None:
    """Print the first lines below a heading; nothing if there are none."""
    if not lines:
        return
    say(f"\n{heading}", style)
    for line in lines[:NAMES_SHOWN]:
        say(f"    {line}")
    if len(lines) > NAMES_SHOWN:
        say(f"    and {len(lines) - NAMES_SHOWN:,} more, see {file}")


def differing(group: dict) -> str:
    """Name the classes of equal images where they are several."""
    return f" (in different classes: {', '.join(group['classes'])})" if len(group["classes"]) > 1 else ""
