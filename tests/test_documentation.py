"""The README and the pages of docs/: their code runs, their commands compose and run, their links lead somewhere.

How a page is written:

- Its Python blocks are executed in order, in an empty folder that holds two trained runs, `runs/first` and
  `runs/second`. `/data/` and `/my/` are replaced by folders with small data sets, see `documented_data.py`.
- A block that begins with a path in a comment, such as `# my_conf/loss/volume.yaml`, is also written to that file.
  (Hydra wants `# @package` in the very first line; the path is then in the second.)
- `<!-- not run: reason -->` before a bash block: its commands are composed, but not run. Nor are commands that need a
  GPU, several processes, a cluster or a download.
"""

from __future__ import annotations

import copy
import doctest
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented_data import write_data, write_inputs
from helpers import run_command
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lightning_dice import calibrate, compare, evaluate, export, plan, predict
from lightning_dice.cli import command, config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
LANGUAGES = {"python", "pycon", "bash", "yaml", "json", "text"}

# What a training gets besides, to end within a second or two.
SHORT = [
    *("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "data.num_workers=0", "data.batch_size=2"),
    "data.patch_size=[32,32]",
]
LEAN = ["test=false", "+trainer.limit_train_batches=1"]
# What cannot run here: GPUs, several processes, clusters, downloads.
ELSEWHERE = re.compile(
    r"=gpu|multi_gpu|multi_node|srun |torchrun |devices=[2-9]|submitit|joblib|=imagenet|download=true|wandb|mlflow"
)
COMMAND = re.compile(r"(?:-m lightning_dice\.(?!kernels)|\bdice-)(\w+)(.*)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `reason` is why its commands are not run, if they are not."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def file(self) -> str | None:
        """The file that the block is, named in its first lines."""
        match = re.match(r"(?:# @package \S+\n)?# ([\w/.-]+\.(?:py|yaml))\n", self.text)
        return match[1] if match else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL):
        before = text[: match.start()].rstrip().rpartition("\n")[2]
        reason = re.fullmatch(r"\s*<!-- not run: (.+) -->", before)
        line = text.count("\n", 0, match.start()) + 1
        language = match[2].split()[0] if match[2].split() else ""
        found.append(Block(page, line, language, textwrap.dedent(match[3]), reason[1] if reason else None))
    return tuple(found)


ALL = [block for page in PAGES for block in blocks(page)]


@dataclass(frozen=True)
class Line:
    """A command of the package in a bash block."""

    block: Block
    text: str

    def __str__(self) -> str:
        return f"{self.block}: {self.text}"

    @property
    def name(self) -> str:
        return COMMAND.search(self.text)[1]

    @property
    def arguments(self) -> list[str]:
        return shlex.split(COMMAND.search(self.text)[2], comments=True)

    @property
    def runs_here(self) -> bool:
        return self.block.reason is None and not ELSEWHERE.search(self.text)


LINES = [
    Line(block, line.strip())
    for block in ALL
    if block.language == "bash"
    for line in block.text.replace("\\\n", " ").splitlines()
    if COMMAND.search(line) and not line.lstrip().startswith("#")
]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """The folders that replace `/data/`, `/my/` and `runs/`; pages get a copy of the runs."""
    root = tmp_path_factory.mktemp("documented")
    write_data(root / "data")
    write_inputs(root / "my")
    for seed, name in enumerate(("first", "second")):
        train = [f"data.root={root / 'data/cells'}", "data=folder", "data.classes=[cell]", "data.channels=1"]
        small = ["model=custom", "device=cpu", "logger=csv", f"seed={seed}"]
        run_command("fit", *train, *small, *SHORT, f"folder={root / 'runs' / name}", cwd=root)
    return {"/data/": root / "data", "/my/": root / "my", "runs": root / "runs"}


@pytest.fixture
def desk(tmp_path, places, monkeypatch) -> Iterator[Path]:
    """An empty folder with the two runs, to work in."""
    # A copy, since commands write into runs, and links, which cost no time, for the checkpoints.
    shutil.copytree(places["runs"], tmp_path / "runs", copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        origin = getattr(sys.modules[name], "__file__", None)
        if origin and Path(origin).is_relative_to(tmp_path):
            del sys.modules[name]


def here(text: str, places: dict[str, Path]) -> str:
    """A text with the paths of the documentation replaced by those of the test."""
    for written in ("/data/", "/my/"):
        text = re.sub(rf"(?<![\w./]){written}", f"{places[written]}/", text)
    return text


def execute(block: Block, names: dict[str, Any], places: dict[str, Path]) -> None:
    """Execute a Python block, or compare the output of a session with the one that the page shows."""
    text = here(block.text, places)
    padding = "\n" * block.line  # so that a traceback names the page's line
    if block.language == "python":
        exec(compile(padding + text, str(block.page), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(text, names, str(block), str(block.page), block.line)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=report.append, clear_globs=False)  # The next block goes on with its names.
    assert not report, "".join(report)
    names.update(test.globs)


def write_file(block: Block, folder: Path, places: dict[str, Path] | None = None) -> None:
    """Write the file that a block is."""
    if block.file is not None:
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(here(block.text, places) if places else block.text, encoding="utf-8")


def pages_with(*languages: str) -> list[Any]:
    used = dict.fromkeys(block.page for block in ALL if block.language in languages)
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in used]


@pytest.mark.parametrize("page", pages_with("python", "pycon"))
@pytest.mark.filterwarnings("ignore:.*shuffle")  # a page's own data loader need not be the best
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # a page resumes where it has trained
def test_python_blocks_run_in_order(page, desk, places):
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks(page):
        write_file(block, desk, places)
        if block.language in ("python", "pycon"):
            execute(block, names, places)


@pytest.mark.parametrize("line", [pytest.param(line, id=str(line)) for line in LINES])
def test_commands_compose(line, tmp_path):
    if "--help" in line.arguments:
        assert command.help_text(line.name)
        return
    sweep = {"-m", "--multirun"} & set(line.arguments)
    arguments = [argument for argument in line.arguments if argument not in ("-m", "--multirun")]
    command.refuse_renamed(arguments, line.name)
    config.register_resolvers()
    if any(argument.startswith("resume=") for argument in arguments):
        # The others change the config of the run, or of the sweep.
        own = ("resume=", "retry_failed=", "hydra.")
        config.apply_overrides(a_run(), (argument for argument in arguments if not argument.startswith(own)))
        return
    # A sweep's values are taken one by one.
    arguments = [first_value(argument) if sweep else argument for argument in arguments]
    if "--config-dir" in arguments:
        for block in blocks(line.block.page):
            write_file(block, tmp_path)
        if (tmp_path / arguments[arguments.index("--config-dir") + 1]).is_dir():  # not that of plan, which is not here
            run_command(line.name, *arguments, "--cfg", "job", cwd=tmp_path)
        return
    if "--cfg" in arguments:
        arguments = arguments[: arguments.index("--cfg")]
    # What is not a setting of such a command is an override of a run's config, or of a training's.
    with_overrides = {"calibrate": calibrate, "evaluate": evaluate, "export": export, "plan": plan, "predict": predict}
    overrides: list[str] = []
    arguments = compare.quote_folders(arguments) if line.name == "compare" else command.hydra_escape(arguments)
    if line.name in with_overrides:
        settings = with_overrides[line.name].SETTINGS
        arguments, overrides = command.split_arguments(arguments, settings)
        command.refuse_misspelled(overrides, settings)
    composed = composed_config(line.name, *arguments)
    if line.name == "plan" or (line.name == "evaluate" and composed.run is None):
        composed_config("fit", *overrides)
    elif overrides:
        config.apply_overrides(a_run(), overrides)


def first_value(argument: str) -> str:
    """One of the values that an argument sweeps."""
    key, equals, value = argument.partition("=")
    if match := re.fullmatch(r"(?:tag\(\w+,\s*)?interval\(([^,]+),.*", value):
        value = match[1]
    return f"{key}{equals}{value if value[:1] in '[{' else value.partition(',')[0]}"


@cache
def composed_config(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def a_run() -> DictConfig:
    """The config of a run that has all settings that a page may override."""
    return copy.deepcopy(composed_config("fit", "data=folder", "data.root=/data/cells"))


def shortened(line: Line) -> list[str]:
    """What a command gets besides, where the page leaves it open."""
    if line.name == "inspect":
        return SHORT[-2:]
    if line.name != "fit":
        return []
    if "resume=" in line.text:
        return ["trainer.max_epochs=2", *(["hydra.sweeper.n_trials=3"] if "n_trials" in line.text else [])]
    extra = [*SHORT, *LEAN]
    if "experiment=plan" in line.text:
        extra.remove("data.patch_size=[32,32]")
    elif re.search(r"data=(volumes|nnunet)", line.text):
        extra.append("data.patch_size=[32,32,32]")  # of 16 the strides leave a single voxel
        extra += [] if "model" in line.text else ["model.filters=[4,4,4,4,4]"]
    elif not re.search(r"\bmodel[=.]|experiment=(?!sweep)", line.text):
        extra.append("model=custom")
    if not re.search(r"\bdata=|experiment=(?!sweep)", line.text):
        extra.append("data.cases={train:4,val:2,test:2}")
    if "experiment=sweep" in line.text:
        extra.append("loss.smooth=1")  # two trials instead of six
    if "n_trials" in line.text:
        extra.append("hydra.sweeper.n_trials=2")
    if "callbacks" not in line.text:
        extra.append("callbacks=[progress_bar,history,checkpoint,interrupt]")
    return extra if "logger" in line.text else [*extra, "logger=none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.relative_to(ROOT).as_posix())
        for page in dict.fromkeys(line.block.page for line in LINES if line.runs_here)
    ],
)
def test_commands_run(page, desk, places):
    for block in blocks(page):
        write_file(block, desk, places)
    for line in [line for line in LINES if line.block.page == page and line.runs_here]:
        arguments = [here(argument, places) for argument in line.arguments]
        folder = next((a.removeprefix("folder=") for a in arguments if a.startswith("folder=")), None)
        if line.name == "fit" and folder is not None:
            shutil.rmtree(desk / folder, ignore_errors=True)
        # Flags last: argparse takes no overrides on both sides of one.
        flags = next((index for index, argument in enumerate(arguments) if argument in ("-m", "--cfg")), len(arguments))
        run_command(line.name, *arguments[:flags], *shortened(line), *arguments[flags:], cwd=desk)


def test_every_block_has_a_language_and_parses():
    for block in ALL:
        assert block.language in LANGUAGES, f"{block}: {block.language!r}"
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "json":
            json.loads(block.text)
    assert len(LINES) > 100


def test_only_commands_are_not_run():
    marked = [block for block in ALL if block.reason is not None]
    assert {block.language for block in marked} == {"bash"}
    assert len(marked) <= 5, [f"{block}: {block.reason}" for block in marked]


def test_bash_blocks_hold_known_programs():
    known = re.compile(
        r"(?:[A-Z_]+=\S+ )*(?:pip|python|pytest|ruff|mypy|mkdocs|git|cd|srun|sbatch|torchrun|dice-\w+|bash)\b|#"
    )
    for block in ALL:
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                assert not line.strip() or known.match(line.strip()), f"{block}: {line}"
                if "-m lightning_dice." in line and "-m lightning_dice.kernels" not in line:
                    assert COMMAND.search(line), f"{block}: {line}"


@cache
def known_settings() -> frozenset[str]:
    """The dotted names of all settings in conf/."""
    names: set[str] = set()

    def add(prefix: str, node: Any) -> None:
        if prefix:
            names.add(prefix)
        for key, value in node.items() if isinstance(node, dict) else ():
            add(f"{prefix}.{key}" if prefix else str(key), value)

    for path in config.CONF_DIR.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        package = re.match(r"# @package (\S+)", text)
        group = path.parent.relative_to(config.CONF_DIR).as_posix().replace("/", ".").strip(".")
        prefix = {"_global_": ""}.get(package[1], package[1]) if package else group
        add(prefix, yaml.safe_load(text))
    return frozenset(names)


# A setting in the running text: `data.channels=4`, or a choice: `model=unet`.
SETTING = re.compile(r"[+~]?(?P<key>[a-z_/]+(?:\.\w+)*)=(?P<value>\S*)")
# Whose entries are the reader's own, or the arguments of a class that the reader chooses.
OPEN = ("hydra.", "trainer.", "model.", "loss.", "callbacks.freeze.parts", "optimizer.", "scheduler.")


def settings_in_text(page: Path) -> Iterator[tuple[str, str]]:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        for word in re.split(r"\s+", code.strip("'\"")):
            if (match := SETTING.fullmatch(word.strip("'\""))) is not None:
                yield match["key"], match["value"].strip("'\"")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_settings_in_the_text_exist(page):
    for key, value in settings_in_text(page):
        folder = config.CONF_DIR / key
        if folder.is_dir():
            choices = [name.strip("[]") for name in re.split(r",", value)]
            # The reader's own files, which the page names, and those that plan writes.
            own = {name for name in choices if f"{key}/{name}.yaml" in page.read_text(encoding="utf-8")} | {"plan"}
            missing = {name for name in choices if not (folder / f"{name}.yaml").is_file()} - own
            placeholder = "<" in value or "..." in value or not value
            assert placeholder or not missing or key == "hydra/launcher", f"{page.name}: there is no {key}={value}"
        elif "." in key and not key.startswith(OPEN) and key.partition(".")[0] in known_settings():
            in_list = re.match(r"(.+?)\.\d+(?:\.|$)", key)  # such as augment.transforms.2.p
            assert (in_list[1] if in_list else key) in known_settings(), f"{page.name}: there is no setting {key}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and GitHub make them, and its own."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = set(re.findall(r'(?:id="|\{ ?#)([\w.-]+)', text))
    for heading in re.findall(r"^#+ (.+?)(?: *\{.*\})?$", text, flags=re.MULTILINE):
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).lower()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return found


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"^( *)```.*?^\1```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
        # The headings of a generated page are not in its file.
        if anchor and target.suffix == ".md" and not re.search(r"^(:::|<!-- \w+)", target.read_text(), re.MULTILINE):
            assert anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}"


def test_every_page_is_reached_by_a_link():
    linked = set()
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", page.read_text(encoding="utf-8")):
            linked.add((page.parent / link).resolve())
    linked.add(DOCS / "index.md")  # the site's home
    assert set(PAGES[1:]) <= linked, sorted(str(page.relative_to(ROOT)) for page in set(PAGES[1:]) - linked)


def test_the_readme_is_short_and_has_the_two_commands():
    assert README.stat().st_size <= 8192
    commands = [block.text for block in blocks(README) if block.language == "bash"]
    assert "pip install -e . && python -m lightning_dice.fit model=unet\n" in commands
    assert "pip install -e '.[dev]' && pytest -n 2\n" in commands


def test_extras_that_are_named_exist():
    texts = [
        *(page.read_text(encoding="utf-8") for page in PAGES),
        *(path.read_text() for part in ("lightning_dice", "conf") for path in (ROOT / part).rglob("*.*[ly]")),
    ]
    named = {
        extra
        for extras in re.findall(r"(?:lightning-dice|['\"]?\.)\[([a-z,]+)\]", "\n".join(texts))
        for extra in extras.split(",")
    }
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    existing = set(re.findall(r"^(\w+) = ", table, flags=re.MULTILINE))
    assert {"dev", "docs", "export", "loggers", "sweep"} <= named <= existing
    # The page on installing describes them all.
    install = (DOCS / "getting-started" / "install.md").read_text(encoding="utf-8")
    assert existing == set(re.findall(r"^\| `\[(\w+)\]` \|", install, flags=re.MULTILINE))


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+)"|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(https?:[^"]+)"',
            page.read_text(encoding="utf-8"),
        )
        assert not loaded, f"{page.name}: {loaded}"
