"""Compare runs case by case: `python -m lightning_dice.compare <run> <run>`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import DictConfig

from lightning_dice.cli.command import hydra_escape, hydra_quote, run_command
from lightning_dice.cli.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_dice.scoring.comparison import Difference
    from lightning_dice.scoring.table import ScoreTable

TABLE, CASE_TABLE, PICTURE = "compare.csv", "compare_cases.csv", "compare.png"


class Comparison(NamedTuple):
    """Several runs compared with the first one.

    Attributes:
        names: the runs' names, in order.
        baseline: table of the first run.
        score: the score that is compared, a key of `SCORES`.
        groups: for each further run, its differences from the first one, class by class.
    """

    names: list[str]
    baseline: ScoreTable
    score: str
    groups: list[list[Difference]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m lightning_dice.compare` or `dice-compare`.

    Args:
        arguments: the command line, such as `["runs/a", "runs/b"]`; `None`: this process's.

    Raises:
        SystemExit: the command failed; its exit status.
    """
    given = sys.argv[1:] if arguments is None else arguments
    run_command("compare", lambda config, _: compare(config), arguments=quote_folders(given))


def compare(config: DictConfig) -> None:
    """Compare tables of cases, each with the first, and write the differences and their plot to a new folder.

    Args:
        config: the settings of `conf/compare.yaml`.

    Raises:
        UserError: a folder has no table, the cases or masks differ, or a setting is invalid.
    """
    folders = [Path(folder).expanduser() for folder in config.runs]
    check_settings(folders, config)
    names = short_names(folders)
    tables = read_tables(folders, names, config)
    comparison = Comparison(names, tables[0], config.score, compare_with_first(tables, config))
    output = make_folder(folders[0], names[1], config)
    write_results(output, comparison)
    print_results(output, comparison)


def check_settings(folders: Sequence[Path], config: DictConfig) -> None:
    """Check the settings before anything is read.

    Raises:
        UserError: a setting is invalid.
    """
    from lightning_dice.scoring.table import SCORES

    if len(folders) < 2:
        raise UserError(f"runs must be the folders of two or more runs, got {len(folders)}")
    if config.split not in (None, "val", "test"):
        raise UserError(f"split must be val or test, got {config.split}")
    if config.cases not in ("same", "common"):
        raise UserError(f"cases must be same or common, got {config.cases}")
    if not isinstance(config.n_resamples, int) or config.n_resamples < 100:
        raise UserError(f"n_resamples must be an integer of at least 100, got {config.n_resamples}")
    if config.score not in SCORES:
        raise UserError(f"score must be one of {', '.join(SCORES)}, got {config.score}")


def read_tables(folders: Sequence[Path], names: Sequence[str], config: DictConfig) -> list[ScoreTable]:
    """Read the tables and check that they can be compared: the same cases, with the same masks and units.

    Raises:
        UserError: a table is missing, or they cannot be compared.
    """
    from lightning_dice.io import read_csv
    from lightning_dice.scoring.comparison import check_same_cases
    from lightning_dice.scoring.table import parse_rows

    if len(set(names)) < len(names):
        raise UserError(f"the same table is given twice: {', '.join(map(str, folders))}")
    rows = [read_csv(table_path(folder)) for folder in folders]
    splits = [{row.get("split") for row in entries} for entries in rows]
    split = config.split or ("test" if all("test" in found for found in splits) else "val")
    tables = []
    for folder, entries in zip(folders, rows, strict=True):
        try:
            tables.append(parse_rows(entries, split))
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error
    try:
        if config.cases == "common":
            tables = keep_common_cases(tables)
        for name, table in zip(names[1:], tables[1:], strict=True):
            check_same_cases(tables[0], table, (names[0], name))
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, table in zip(names, tables, strict=True):
        if config.score not in table.scores:
            raise UserError(f"{name} has no {config.score}; it has {', '.join(table.scores)}")
        if table.unit != tables[0].unit:
            raise UserError(f"distances are in {tables[0].unit} in {names[0]} and in {table.unit} in {name}")
    return tables


def compare_with_first(tables: Sequence[ScoreTable], config: DictConfig) -> list[list[Difference]]:
    """Compare each table with the first one; p-values are adjusted over all of them together."""
    from lightning_dice.scoring.comparison import adjust_p_values, compare_tables

    groups = [
        compare_tables(tables[0], table, config.score, n_resamples=config.n_resamples, seed=config.seed)
        for table in tables[1:]
    ]
    adjusted = iter(adjust_p_values([difference for group in groups for difference in group]))
    return [[next(adjusted) for _ in group] for group in groups]


def make_folder(first: Path, second_name: str, config: DictConfig) -> Path:
    """Make the folder for the results, by default inside the folder of the first run."""
    from lightning_dice.cli import run_folder

    if config.output is not None:
        return run_folder.exact_folder(config.output)
    return run_folder.new_folder(first if first.is_dir() else first.parent, f"compare_{second_name}", dated=False)


def write_results(folder: Path, comparison: Comparison) -> None:
    """Write the differences of each class, those of each case, and the plot."""
    from lightning_dice.io import number, write_csv
    from lightning_dice.plotting.comparison_plot import draw_comparison

    names, table, score, groups = comparison
    columns = ["a", "b", "score", "class", "cases", "only_a", "only_b", "mean_a", "mean_b", "difference", "low", "high"]
    columns += ["wins", "losses", "ties", "wilcoxon", "wilcoxon_holm", "permutation", "permutation_holm"]
    rows, case_rows = [], []
    for name, group in zip(names[1:], groups, strict=True):
        for each in group:
            fields = {key: value for key, value in each._asdict().items() if key not in ("name", "differences")}
            fields["difference"] = fields.pop("mean")
            texts = {key: number(value) for key, value in fields.items()}
            rows.append({"a": names[0], "b": name, "score": score, "class": each.name, **texts})
            for case, value in zip(table.names, each.differences.tolist(), strict=True):
                row = {"a": names[0], "b": name, "split": table.split, "case": case}
                case_rows.append({**row, "class": each.name, "difference": number(value)})
    write_csv(folder / TABLE, columns, rows)
    write_csv(folder / CASE_TABLE, ["a", "b", "split", "case", "class", "difference"], case_rows)
    draw_comparison(folder / PICTURE, names, groups, score, table.unit_of(score))


def print_results(folder: Path, comparison: Comparison) -> None:
    """Print a table of differences for each pair of runs."""
    from rich.console import Console

    from lightning_dice.scoring.table import SCORES

    names, table, score, groups = comparison
    console = Console(width=max(Console().width, 120, len(str(folder)) + 24))
    unit = f" ({table.unit_of(score)})" if table.unit_of(score) else ""
    better = {"high": "higher is better", "low": "lower is better", "zero": "closer to 0 is better"}
    for name, group in zip(names[1:], groups, strict=True):
        print(
            f"\n{SCORES[score].title}{unit} of {name} minus {names[0]}; {better[SCORES[score].better]}, "
            f"{len(table.names)} {table.split} cases"
        )
        console.print(difference_table(group))
        for each in group:
            if each.only_a or each.only_b:
                print(
                    f"{each.name}: cases with a score in only one of the runs are not compared ({each.only_a} in "
                    f"{names[0]}, {each.only_b} in {name})"
                )
    print(
        "interval: 95% percentile bootstrap over cases. p: Wilcoxon signed-rank and sign-flip permutation, two-sided, "
        "adjusted by Holm over the classes and pairs."
    )
    print(f"folder  {folder}\npicture {folder / PICTURE}")


def difference_table(group: Sequence[Difference]) -> Table:
    """Return the differences of a pair of runs as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lightning_dice.report import format_score

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    for name in ("first", "second", "difference", "interval", "wins", "losses", "ties", "Wilcoxon p", "permutation p"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in group:
        table.add_row(
            Text(each.name),
            format_score(each.mean_a),
            format_score(each.mean_b),
            f"{each.mean:+.4g}" if each.cases else "",
            f"{each.low:+.4g} to {each.high:+.4g}" if each.low == each.low else "",
            *(str(count) for count in (each.wins, each.losses, each.ties)),
            f"{each.wilcoxon_holm:.3g}",
            f"{each.permutation_holm:.3g}",
        )
    return table


def quote_folders(arguments: Sequence[str]) -> list[str]:
    """Rewrite a command line for Hydra's grammar: arguments that are not settings are folders.

    >>> quote_folders(["runs/a b", "score=hd95", "runs/c"])
    ['score=hd95', 'runs=["runs/a b","runs/c"]']
    """
    # The name of a folder may contain `=`.
    folders = [each for each in arguments if not each.startswith("-") and ("=" not in each or Path(each).exists())]
    settings = [each for each in arguments if each not in folders]
    return [*hydra_escape(settings), *([f"runs=[{','.join(map(hydra_quote, folders))}]"] if folders else [])]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return a distinct short name for each folder: its own name, preceded by as many parents as necessary.

    >>> short_names([Path("/r/a/test"), Path("/r/b/test"), Path("/r/c")])
    ['a_test', 'b_test', 'c']
    """
    parts = [(path.parent if path.suffix == ".csv" else path).absolute().parts for path in folders]
    names = []
    for index, own in enumerate(parts):
        others = parts[:index] + parts[index + 1 :]
        depth = next(
            (depth for depth in range(1, len(own)) if all(other[-depth:] != own[-depth:] for other in others)), len(own)
        )
        names.append("_".join(part for part in own[-depth:] if part != "/"))
    return names


def table_path(folder: Path) -> Path:
    """Return the path of a run's table of cases; `folder` may also be the table itself."""
    path = folder / "cases.csv" if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a scored run, or of an evaluation")
    return path


def keep_common_cases(tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """Return the tables, restricted to the cases they all have.

    Raises:
        ValueError: there are none.
    """
    from lightning_dice.scoring.comparison import common_cases

    first = tables[0]
    for table in tables[1:]:
        first, _ = common_cases(first, table)
    return [first, *(common_cases(first, table)[1] for table in tables[1:])]


if __name__ == "__main__":
    main()
