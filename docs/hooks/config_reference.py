"""MkDocs hook: tables of the settings, from the YAML files of conf/ and their comments.

A page asks for them by a line of its own:

- `<!-- options of loss -->`: each file of conf/loss, with its comment and a table of its settings;
- `<!-- settings of fit -->`: the settings of one command, conf/fit.yaml;
- `<!-- renamed settings -->`: the names of version 0.1.

`missing_meanings` lists the settings that no comment explains; a test requires that there are none.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
# Words of Hydra, not settings.
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "defaults", "hydra"}
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
LENGTH = re.compile(r"\$\{length:\$\{([\w.]+)\}\}")
IMPORTABLE = re.compile(r"[a-z]\w*(\.\w+)+")


@dataclass
class Setting:
    """A key of a YAML file: its full name on the command line, its default as written, and its comment."""

    key: str
    default: str
    comment: str
    path: str | None = None  # dotted path of the class, for `_target_`


@dataclass
class Option:
    """A YAML file of conf/."""

    group: str
    name: str
    description: list[str] = field(default_factory=list)
    bases: list[str] = field(default_factory=list)  # other files of the group, which this one extends
    choices: list[tuple[str, str]] = field(default_factory=list)  # files of other groups that it chooses
    settings: list[Setting] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)


def groups() -> list[str]:
    """Return the folders of conf/ that hold options, such as `loss` and `hydra/sweeper`."""
    return sorted({path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."})


def options(group: str) -> list[Option]:
    """Return the files of a group, by name; `default` comes first."""
    found = [read_option(path) for path in (CONF / group).glob("*.yaml")]
    return sorted(found, key=lambda option: (option.name != "default", option.name))


@cache
def read_option(path: Path) -> Option:
    """Read a YAML file with its comments."""
    text = path.read_text()
    lines = text.splitlines()
    group = path.parent.relative_to(CONF).as_posix()
    option = Option("" if group == "." else group, path.stem)
    package = option.group.replace("/", ".")
    for line in lines:
        if not line.startswith("#"):
            break
        found = re.fullmatch(r"# @package (\S+)", line)
        if found:
            package = "" if found[1] == "_global_" else found[1]
        else:
            option.description.append(line.removeprefix("#").removeprefix(" "))
    tree = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if isinstance(tree, yaml.MappingNode):
        _read_defaults(tree, option)
        option.settings = list(_settings(tree, package, lines, option))
    return option


def _read_defaults(tree: yaml.MappingNode, option: Option) -> None:
    for key, value in tree.value:
        if key.value != "defaults":
            continue
        for item in value.value:
            if isinstance(item, yaml.ScalarNode):
                if item.value != "_self_":
                    option.bases.append(item.value)
            else:
                (name, choice), *_ = item.value
                option.choices.append((name.value.removeprefix("override ").removeprefix("/"), choice.value))


def _settings(node: yaml.Node, prefix: str, lines: list[str], option: Option) -> Iterator[Setting]:
    if isinstance(node, yaml.SequenceNode):
        pairs = [(str(index), item, item) for index, item in enumerate(node.value)]
    else:
        pairs = [(key.value, key, value) for key, value in node.value]
    for name, key, value in pairs:
        if name == "_target_":
            option.targets.append(value.value)
        if name in HYDRA_KEYS:
            continue
        full = f"{prefix}.{name}" if prefix else name
        comment = _comment(key, value, lines)
        if _is_branch(value):
            if comment and isinstance(node, yaml.MappingNode):
                yield Setting(full, "", comment)
            yield from _settings(value, full, lines, option)
        else:
            yield Setting(full, _spelling(value, lines), comment)


def _is_branch(node: yaml.Node) -> bool:
    """Whether the keys below a value are settings of their own: a block of names, or a list of such blocks."""
    if isinstance(node, yaml.MappingNode):
        return not node.flow_style and all(re.match(r"[A-Za-z_]", key.value) for key, _ in node.value)
    if isinstance(node, yaml.SequenceNode):
        return any(isinstance(item, yaml.MappingNode) for item in node.value)
    return False


def _spelling(node: yaml.Node, lines: list[str]) -> str:
    """Return a value as the file writes it; a block becomes one line."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style:
        start, end = node.start_mark, node.end_mark
        if start.line == end.line:
            return lines[start.line][start.column : end.column]
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_spelling(item, lines) for item in node.value) + "]"
    return "{" + ", ".join(f"{key.value}: {_spelling(value, lines)}" for key, value in node.value) + "}"


def _comment(key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    """Return the comment after a setting, and whole lines of comment above it."""
    if isinstance(value, yaml.ScalarNode) or value.flow_style:
        rest = lines[value.end_mark.line][value.end_mark.column :]
    else:
        rest = lines[key.start_mark.line][key.end_mark.column :].lstrip(":")
    found = re.fullmatch(r"\s*#\s*(.*)", rest)
    after = found[1].strip() if found else ""
    above = []
    for line in reversed(lines[: key.start_mark.line]):
        found = re.fullmatch(r"\s+#\s*(.*)", line)
        if not found:
            break
        above.insert(0, found[1].strip())
    if after and above:
        after += "" if after.endswith(".") else "."
    return " ".join([after, *above]).strip()


def meaning(setting: Setting, option: Option) -> str:
    """Return what a setting means: its comment, that of the file that this one extends, or where its value comes from.

    The result is empty where nothing explains it.
    """
    if setting.comment:
        return setting.comment
    if re.search(r"\.\d+\.", setting.key):
        return terms(option.group).get(setting.key.rsplit(".", 1)[1], "")
    for base in _bases(option):
        for other in base.settings:
            if other.key == setting.key and other.comment:
                return other.comment
    found = REFERENCE.fullmatch(setting.default)
    if found:
        return "The folder of the run." if found[1] == "folder" else f"The value of `{found[1]}`."
    found = LENGTH.fullmatch(setting.default)
    if found:
        return f"The number of `{found[1]}`."
    return ""


@cache
def terms(group: str) -> dict[str, str]:
    """Return the arguments that the page of a group explains once, in a table of `argument` and meaning."""
    page = ROOT / "docs" / "reference" / "config" / f"{group}.md"
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.+) \|$", page.read_text() if page.is_file() else "", re.MULTILINE)
    return {name: meaning for names, meaning in rows for name in re.findall(r"`(\w+)`", names)}


def _bases(option: Option) -> Iterator[Option]:
    for name in option.bases:
        path = CONF / option.group / f"{name}.yaml"
        if path.is_file():
            base = read_option(path)
            yield base
            yield from _bases(base)
    # A model's file sets `module.size_divisor`: see module/default.yaml.
    for group in ({setting.key.split(".")[0] for setting in option.settings} & set(groups())) - {option.group}:
        path = CONF / group / "default.yaml"
        if path.is_file():
            yield read_option(path)


def missing_meanings() -> list[str]:
    """Return the settings of conf/ that no comment explains, as `file: key`. Experiments set what other files explain.

    Raises:
        ValueError: a file of conf/ could not be read.
    """
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        option = read_option(path)
        if option.group != "experiment":
            found += [
                f"{path.relative_to(ROOT)}: {setting.key}"
                for setting in option.settings
                if not meaning(setting, option)
            ]
    return found


# What is code in a comment: quoted overrides, `key=value`, dotted settings, placeholders, file names, commands.
CODE = re.compile(
    r"""`[^`]*`
    |pip\ install\ (?:'[^']*'|\S*\w)
    |\b(?:range|interval|int|tag)\([^·]*\)(?=\s·|$)
    |\b[a-z_]+\.[a-z_]+\([^)]*\)
    |'[~+]?[\w.@/]+(?:=[^']*)?'
    |(?<![\w`])[+~]?[a-z_][\w.@/]*=(?:\[[^\]]*\]|\{[^}]*\}|\S*[^\s.,;:)])
    |(?<![\w`])(?:data|module|loss|model|trainer|callbacks|inference|normalize|optimizer|scheduler)\.[a-z_]\w*(?:[.\[]\w+\]?)*
    |\S*<\w+>(?:[/.\w{}]*\w)?
    |(?<!\S)[\w/{}-]*[\w}]\.(?:json|yaml|csv|ckpt|html|txt|pt2)\b
    |(?<![\w-])(?:null|true|false)(?=:)
    |"[^"]*"
    |[\w/]*\{[a-z]+\}[\w/{}*.]*[\w}]
    |\{[^}]*\}
    |\[[^\]]*\]
    """,
    re.VERBOSE,
)


def prose(text: str) -> str:
    """Return a comment as Markdown, with its settings and values as code."""

    def plain(part: str) -> str:
        return html.escape(part, quote=False).replace("*", "\\*")

    pieces, end = [], 0
    for found in CODE.finditer(text):
        pieces += [plain(text[end : found.start()]), f"`{found[0].strip('`')}`"]
        end = found.end()
    return "".join([*pieces, plain(text[end:])])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def description(option: Option) -> list[str]:
    """Return the leading comment of a file as Markdown: prose, and commands as blocks of code."""
    result: list[str] = []
    paragraph: list[str] = []
    code: list[str] = []

    def flush() -> None:
        if paragraph:
            result.extend([prose(" ".join(paragraph)), ""])
        if code:
            result.extend(["```text", *code, "```", ""])
        paragraph.clear()
        code.clear()

    for line in option.description:
        command = re.fullmatch(r"(python -m .*?): (.*)", line)
        if line.startswith("  "):
            if paragraph:
                flush()
            code.append(line[2:])
        elif command:
            flush()
            result.extend([f"`{command[1]}`", f":   {prose(_sentence(command[2]))}", ""])
        else:
            if code:
                flush()
            paragraph.append(line.strip())
    flush()
    return result


@cache
def _package() -> Any:
    import griffe

    return griffe.load("lightning_dice", search_paths=[str(ROOT)])


def class_summary(path: str) -> str:
    """Return the first sentence of the docstring of a class or function of this package."""
    docstring = _package()[path.removeprefix("lightning_dice.")].docstring
    first = docstring.value.split("\n\n")[0].replace("\n", " ") if docstring else ""
    return re.split(r"(?<=\.) (?=[A-Z])", first)[0]


def class_link(path: str) -> str:
    """Return a dotted path as code, linked to its page if it belongs to this package."""
    if not path.startswith("lightning_dice."):
        return f"`{path}`"
    canonical = _package()[path.removeprefix("lightning_dice.")].canonical_path
    return f"[`{path}`][{canonical}]"


def table(option: Option) -> list[str]:
    """Return the table of a file's settings, and a line on those that follow other settings."""
    rows, followers = [], []
    for setting in option.settings:
        is_reference = REFERENCE.fullmatch(setting.default) or LENGTH.fullmatch(setting.default)
        if is_reference and not setting.comment:
            # The parts of a datamodule repeat the settings above them.
            if not re.match(r"data\.datamodule\.", setting.key):
                followers.append(f"`{setting.key}` (`{is_reference[1]}`)")
            continue
        code = f"`{setting.default}`" if setting.default else ""
        default = "required" if setting.default == "???" else code
        key = setting.key.replace(".", ".<wbr>")  # where a narrow screen may break it
        rows.append(f"| <code>{key}</code> | {_cell(default)} | {_cell(prose(meaning(setting, option)))} |")
    result = []
    if rows:
        header = ["| setting | default | meaning |", "|---|---|---|"]
        result = ['<div class="settings" markdown>', "", *header, *rows, "", "</div>", ""]
    if followers:
        result += [f"Taken from other settings: {', '.join(followers)}.", ""]
    return result


def option_markdown(option: Option) -> list[str]:
    """Return the section of one file."""
    choice = f"{option.group}={option.name}"
    result = [f"## `{choice}`" + " { #" + f"{option.group.replace('/', '-')}-{option.name}" + " }", ""]
    result += description(option)
    targets = list(dict.fromkeys(target for target in option.targets if IMPORTABLE.fullmatch(target)))
    is_shown_whole = option.group == "experiment" or any(".transforms." in each.key for each in option.settings)
    if not option.description and targets and targets[0].startswith("lightning_dice."):
        result += [class_summary(targets[0]), ""]
    if targets and not is_shown_whole:
        result += ["Builds " + ", ".join(class_link(target) for target in targets) + ".", ""]
    siblings = [name for name in option.bases if (CONF / option.group / f"{name}.yaml").is_file()]
    if siblings:
        links = ", ".join(f"[`{name}`](#{option.group.replace('/', '-')}-{name})" for name in siblings)
        result += [f"Includes {links}.", ""]
    chosen = [f"`{name}={choice}`" for name, choice in option.choices if choice not in ("null", "~")]
    if chosen:
        result += [f"Chooses {', '.join(chosen)}.", ""]
    if is_shown_whole:
        # The order of transforms matters, and an experiment is read best as a whole.
        body = re.sub(r"\A(#.*\n)*", "", (CONF / option.group / f"{option.name}.yaml").read_text())
        return [*result, "```yaml", *body.strip().splitlines(), "```", ""]
    return [*result, *table(option)]


def command_markdown(command: str) -> list[str]:
    """Return description and settings of a command."""
    option = read_option(CONF / f"{command}.yaml")
    result = description(option)
    chosen = [f"`{name}={choice}`" for name, choice in option.choices if choice != "null" and "hydra" not in name]
    if chosen:
        result += [f"Chooses {', '.join(chosen)}.", ""]
    return [*result, *table(option)]


def renamed_markdown() -> list[str]:
    """Return the table of the settings that were renamed."""
    from lightning_dice.renamed_settings import RENAMED, RENAMED_IN_COMMANDS

    names = RENAMED | {
        f"{old} ({command})": new for command, pairs in RENAMED_IN_COMMANDS.items() for old, new in pairs.items()
    }

    def code(text: str) -> str:
        return re.sub(r"[a-z_]+(?:[.=][a-z_]+)+|^[a-z_]+(?= \(|$)", lambda found: f"`{found[0]}`", text)

    return ["| in 0.1 | since 0.2 |", "|---|---|", *(f"| {code(old)} | {code(new)} |" for old, new in names.items())]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the lines that ask for tables."""

    def replace(found: re.Match[str]) -> str:
        kind, name = found[1], found[2]
        if kind == "options of":
            return "\n".join(line for option in options(name) for line in option_markdown(option))
        return "\n".join(command_markdown(name))

    markdown = re.sub(r"^<!-- (options of|settings of) ([\w/]+) -->$", replace, markdown, flags=re.MULTILINE)
    return re.sub(r"^<!-- renamed settings -->$", lambda _: "\n".join(renamed_markdown()), markdown, flags=re.MULTILINE)
