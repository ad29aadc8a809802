"""Whether a run is better than another one, case by case: `python -m lightning_dice.compare <run> <run>`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from lightning_dice.cli.command import hydra_escape, hydra_quote, run_command
from lightning_dice.cli.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_dice.scoring.comparison import Difference
    from lightning_dice.scoring.table import Cases

TABLE, PICTURE = "compare.csv", "compare.png"


def main() -> None:
    """Entry point of `python -m lightning_dice.compare` and `dice-compare`."""
    sys.argv[1:] = arguments(sys.argv[1:])
    run_command("compare", lambda config, _: compare(config))


def arguments(given: Sequence[str]) -> list[str]:
    """A command line in Hydra's grammar: what is no setting is a folder.

    >>> arguments(["runs/a b", "score=hd95", "runs/c"])
    ['score=hd95', 'runs=["runs/a b","runs/c"]']
    """
    # A folder may have = in its name, and then is one.
    folders = [each for each in given if not each.startswith("-") and ("=" not in each or Path(each).exists())]
    settings = [each for each in given if each not in folders]
    return [*hydra_escape(settings), *([f"runs=[{','.join(map(hydra_quote, folders))}]"] if folders else [])]


def compare(config: DictConfig) -> None:
    """Compare tables of cases, each with the first, and write the differences and their picture to a new folder.

    Args:
        config: as of `conf/compare.yaml`.

    Raises:
        UserError: a folder without a table, other cases, other masks, or a setting that is not as it should be.
    """
    folders = [Path(folder).expanduser() for folder in config.runs]
    if len(folders) < 2:
        raise UserError(f"two runs or more are compared, got {len(folders)}: give their folders")
    if config.split not in (None, "val", "test"):
        raise UserError(f"split must be val or test, got {config.split}")
    if config.cases not in ("same", "common"):
        raise UserError(f"cases must be same or common, got {config.cases}")
    if not isinstance(config.resamples, int) or config.resamples < 100:
        raise UserError(f"resamples must be an integer of at least 100, got {config.resamples}")
    from lightning_dice.cli import run_folder
    from lightning_dice.scoring.comparison import adjusted
    from lightning_dice.scoring.comparison import compare_tables as compare_tables

    names = distinct(folders)
    tables = read_tables(folders, names, config)
    settings = {"resamples": config.resamples, "seed": config.seed}
    pairs = [(0, second) for second in range(1, len(tables))]
    found = [compare_tables(tables[0], tables[second], config.score, **settings) for _, second in pairs]
    lines = iter(adjusted([line for group in found for line in group]))
    groups = [[next(lines) for _ in group] for group in found]
    if config.output is not None:
        made = run_folder.exact_folder(config.output)
    else:
        home = folders[0] if folders[0].is_dir() else folders[0].parent
        made = run_folder.new_folder(home, f"compare_{names[1]}", dated=False)
    write(made, names, tables[0], config.score, groups)
    show(made, names, tables[0], config.score, groups)


def distinct(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its own, with those above it as far as they are needed.

    >>> distinct([Path("/r/a/test"), Path("/r/b/test"), Path("/r/c")])
    ['a_test', 'b_test', 'c']
    """
    parts = [(path.parent if path.suffix == ".csv" else path).absolute().parts for path in folders]
    names = []
    for place, own in enumerate(parts):
        others = parts[:place] + parts[place + 1 :]
        depth = next(
            (depth for depth in range(1, len(own)) if all(other[-depth:] != own[-depth:] for other in others)), len(own)
        )
        names.append("_".join(part for part in own[-depth:] if part != "/"))
    return names


def read_tables(folders: Sequence[Path], names: Sequence[str], config: DictConfig) -> list[Cases]:
    """The tables, of the same cases with the same masks.

    Raises:
        UserError: otherwise.
    """
    from lightning_dice.io import read_csv
    from lightning_dice.scoring.comparison import check_same, common
    from lightning_dice.scoring.table import SCORES, read

    if len(set(names)) < len(names):
        raise UserError(f"the same table is given twice: {', '.join(map(str, folders))}")
    if config.score not in SCORES:
        raise UserError(f"score must be one of {', '.join(SCORES)}, got {config.score}")
    rows = []
    for folder in folders:
        path = folder / "cases.csv" if folder.is_dir() else folder
        if not path.is_file():
            raise UserError(f"{path} is not there: give the folder of a run that was scored, or of an evaluation")
        rows.append(read_csv(path))
    splits = [{row.get("split") for row in entries} for entries in rows]
    split = config.split or ("test" if all("test" in there for there in splits) else "val")
    tables = []
    for folder, entries in zip(folders, rows, strict=True):
        try:
            tables.append(read(entries, split))
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error
    try:
        if config.cases == "common":
            for second in range(1, len(tables)):
                tables[0], tables[second] = common(tables[0], tables[second])
            tables[1:] = [common(tables[0], table)[1] for table in tables[1:]]
        for name, table in zip(names[1:], tables[1:], strict=True):
            check_same(tables[0], table, (names[0], name))
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, table in zip(names, tables, strict=True):
        if config.score not in table.scores:
            raise UserError(f"{name} has no {config.score}; it has {', '.join(table.scores)}")
        if table.unit != tables[0].unit:
            raise UserError(f"distances are in {tables[0].unit} in {names[0]} and in {table.unit} in {name}")
    return tables


def write(folder: Path, names: Sequence[str], table: Cases, score: str, groups: Sequence[Sequence[Difference]]) -> None:
    """Write the table of differences, those of each case, and the picture."""
    from lightning_dice.io import number, write_csv
    from lightning_dice.plotting.comparison_plot import draw_comparison

    columns = ["a", "b", "score", "class", "cases", "only_a", "only_b", "mean_a", "mean_b", "difference", "low", "high"]
    columns += ["wins", "losses", "ties", "wilcoxon", "wilcoxon_holm", "permutation", "permutation_holm"]
    rows, by_case = [], []
    for name, group in zip(names[1:], groups, strict=True):
        for line in group:
            fields = {key: value for key, value in line._asdict().items() if key not in ("name", "differences")}
            fields["difference"] = fields.pop("mean")
            texts = {key: number(value) for key, value in fields.items()}
            rows.append({"a": names[0], "b": name, "score": score, "class": line.name, **texts})
            for case, value in zip(table.names, line.differences.tolist(), strict=True):
                found = {"a": names[0], "b": name, "split": table.split, "case": case}
                by_case.append({**found, "class": line.name, "difference": number(value)})
    write_csv(folder / TABLE, columns, rows)
    write_csv(folder / "compare_cases.csv", ["a", "b", "split", "case", "class", "difference"], by_case)
    draw_comparison(folder / PICTURE, names, groups, score, table.unit_of(score))


def show(folder: Path, names: Sequence[str], table: Cases, score: str, groups: Sequence[Sequence[Difference]]) -> None:
    """Print what came of it."""
    from rich.console import Console

    from lightning_dice.scoring.table import SCORES

    console = Console(width=max(Console().width, 120, len(str(folder)) + 24))
    unit = table.unit_of(score)
    better = {"high": "more is better", "low": "less is better", "zero": "nearer to 0 is better"}[SCORES[score].better]
    for name, group in zip(names[1:], groups, strict=True):
        title = f"{SCORES[score].title}{f' ({unit})' if unit else ''} of {name} less {names[0]}; {better}"
        print(f"\n{title}, {len(table.names)} {table.split} cases")
        console.print(differences_table(group))
        for line in group:
            if line.only_a or line.only_b:
                print(
                    f"{line.name}: {line.only_a} cases have a score in {names[0]} alone and {line.only_b} in {name} "
                    "alone, and are not part of the difference"
                )
    print(
        "interval: 95% percentile bootstrap over cases. p: Wilcoxon signed-rank and sign-flip permutation, two-sided, "
        "adjusted by Holm over the classes and pairs."
    )
    print(f"folder  {folder}\npicture {folder / PICTURE}")


def differences_table(group: Sequence[Difference]) -> Table:
    """Differences as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lightning_dice.report import format_score

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    for name in ("first", "second", "difference", "interval", "wins", "losses", "ties", "Wilcoxon p", "permutation p"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in group:
        ends = f"{line.low:+.4g} to {line.high:+.4g}" if line.low == line.low else ""
        table.add_row(
            Text(line.name),
            format_score(line.mean_a),
            format_score(line.mean_b),
            f"{line.mean:+.4g}" if line.cases else "",
            ends,
            *(str(count) for count in (line.wins, line.losses, line.ties)),
            f"{line.wilcoxon_holm:.3g}",
            f"{line.permutation_holm:.3g}",
        )
    return table


if __name__ == "__main__":
    main()
