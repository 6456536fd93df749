"""Which files belong to the split that --dataset_split names, by the rules of `datasets`.

In this order: the data files of a README's YAML header, names like data/train-00000-of-00004.parquet, folders whose
name holds a split's keyword, file names that hold one. Keywords stand alone or next to one of "-._ " or a digit.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from trainkit.data.account import Account, Kind
from trainkit.errors import UserError

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ALL, DEFAULT = "all", "train"
SHARD = re.compile(r"(?:.*/)?data/([\w]+)-\d{5}-of-\d{5}[^/]*\.[^/]*|(?:[^/]*/)?([\w]+)-\d{5}-of-\d{5}[^/]*\.parquet")
_SEPARATOR = r"[-._ 0-9]"
SPLIT_OF = {word: split for split, words in KEYWORDS.items() for word in words}
_WORDS = "|".join(sorted(SPLIT_OF, key=len, reverse=True))
IN_FOLDER = re.compile(rf"(?:^|.*{_SEPARATOR})({_WORDS})(?:{_SEPARATOR}.*)?", re.DOTALL)
IN_FILE = re.compile(rf"(?:^|.*{_SEPARATOR})({_WORDS}){_SEPARATOR}.*", re.DOTALL)
SplitOf = Callable[[str], str | None]


def split_by_shard(path: str) -> str | None:
    match = SHARD.fullmatch(path)
    return (match[1] or match[2]) if match else None


def split_by_folder(path: str) -> str | None:
    for folder in path.split("/")[:-1]:
        if match := IN_FOLDER.fullmatch(folder):
            return SPLIT_OF[match[1]]
    return None


def split_by_file(path: str) -> str | None:
    match = IN_FILE.fullmatch(path.rpartition("/")[2])
    return SPLIT_OF[match[1]] if match else None


RULES = (split_by_shard, split_by_folder, split_by_file)


def find_splits(paths: Iterable[str], rules: tuple[SplitOf, ...] = RULES) -> tuple[SplitOf | None, Counter]:
    """The rule that separates the splits of `paths`, and how many files each has; None if none applies."""
    counts: list[Counter] = [Counter() for _ in rules]
    outside_root = False
    folder_splits: dict[str, str | None] = {}
    for path in paths:
        folder = path.rpartition("/")[0]
        if folder not in folder_splits:
            folder_splits[folder] = split_by_folder(path)
        by_folder = folder_splits[folder]
        outside_root = outside_root or (by_folder is None and folder != "")
        for rule, count in zip(rules, counts, strict=True):
            count[by_folder if rule is split_by_folder else rule(path)] += 1
    for rule, count in zip(rules, counts, strict=True):
        if set(count) - {None}:
            if rule is split_by_folder and not outside_root:
                count["in the top folder"] = count.pop(None, 0)
            return rule, count
    return None, Counter()


def choose_split(
    paths: Callable[[], Iterable[str]],
    wanted: str,
    given: str,
    account: Account,
    flag: str = "--train_data_dir",
    rules: tuple[SplitOf, ...] = RULES,
    patterns: dict[str, list[str]] | None = None,
    are_images: bool = False,
    are_given: bool = False,
    may_be_unsplit: bool = False,
) -> SplitOf | None:
    """A function that returns `wanted` for each of `paths()` to keep; None to keep all.

    `patterns` are those of a README, which count if one of them matches. What is left out is added to `account`. Names
    of images (`are_images`) count only if all of them name a split: test.png among photos is a photo. Of files that
    the user gave one by one (`are_given`), a single split is what is meant. Data without splits is the split train,
    unless `may_be_unsplit`.

    Raises:
        UserError: there are splits but not the wanted one, or files outside of them, which `datasets` drops silently.
    """
    if wanted == ALL:
        return None
    rule, counts, outside = _rule_for(paths, rules, patterns)
    if rule is None:
        _refuse_capitals(paths(), given, flag)
        if wanted != DEFAULT and not may_be_unsplit:
            raise UserError(
                f"--dataset_split {wanted} is not in {flag} {given}, which has no splits: give the folder or files of "
                f"{wanted} alone, or leave --dataset_split out"
            )
        return None
    if are_given and wanted == DEFAULT and len(counts) == 1 and not outside:
        return None
    if outside and are_images and rule is split_by_file:
        for path in paths():
            if rule(path) is not None:
                account.add(Kind.SPLIT_NAME, path)
        return None
    others = next((path for path in paths() if rule(path) is None), None) if outside else None
    _refuse_mixed_splits(wanted, counts, outside, others, f"{flag} {given}")
    for path in paths():
        if (split := rule(path)) != wanted:
            account.add(Kind.OTHER_SPLIT if split else Kind.NO_SPLIT, path)
    return rule


def _rule_for(
    paths: Callable[[], Iterable[str]], rules: tuple[SplitOf, ...], patterns: dict[str, list[str]] | None
) -> tuple[SplitOf | None, Counter, int]:
    """The rule of the splits, the number of files of each, and that of files outside of them."""
    if patterns is not None:
        by_pattern = split_by_patterns(patterns)
        counts = Counter(map(by_pattern, paths()))
        counts.pop(None, None)
        if counts:
            return by_pattern, counts, 0
    rule, counts = find_splits(paths(), rules)
    counts.pop("in the top folder", 0)
    return rule, counts, counts.pop(None, 0)


def _refuse_mixed_splits(wanted: str, counts: Counter, outside: int, example: str | None, what: str) -> None:
    """Raises `UserError` for files outside of the splits (`example` is one), or if the wanted split is missing."""
    found = ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))
    read_all = f"--dataset_split {ALL} reads everything as one"
    if outside:
        raise UserError(
            f"{what} holds files of splits ({found}) and {outside:,} others, such as {example}: {read_all}; "
            "to read one split, give its folder, or move the others away"
        )
    if wanted not in counts:
        raise UserError(
            f"--dataset_split {wanted} is not in {what}, which has {found}: choose one of these; {read_all}"
        )


def _refuse_capitals(paths: Iterable[str], given: str, flag: str) -> None:
    """Train/ and Test/ are classes to `datasets`, which knows small letters only, and splits to most people."""
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    splits = {match[1] for folder in folders if (match := IN_FOLDER.fullmatch(folder.lower()))}
    if len({SPLIT_OF[word] for word in splits}) > 1:
        raise UserError(
            f"{flag} {given} holds {' and '.join(sorted(folders)[:4])}: write names of splits in small letters, or "
            f"give --dataset_split {ALL} to read them as classes"
        )


def readme_data_files(folder: Path, config: str | None) -> dict[str, list[str]] | None:
    """`data_files_of` the README.md of a folder; None without one."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    return data_files_of(readme.read_text(encoding="utf-8", errors="replace"), config, str(readme))


def data_files_of(text: str, config: str | None, where: str) -> dict[str, list[str]] | None:
    """split -> patterns, from the `configs` in the YAML header of a README; None if it has none.

    `where` names the README. Raises `UserError` if it has no `config` of that name.
    """
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        configs = (yaml.safe_load(header[1]) or {}).get("configs") if header else None
    except (yaml.YAMLError, AttributeError):
        return None
    if not isinstance(configs, list):
        return None
    usable = [entry for entry in configs if isinstance(entry, dict) and entry.get("data_files")]
    if config is not None:
        chosen = [entry for entry in usable if entry.get("config_name") == config]
        if usable and not chosen:
            names = ", ".join(str(entry.get("config_name")) for entry in usable)
            raise UserError(f"--dataset_config_name {config} is not in {where}, which has {names}")
        usable = chosen
    else:
        usable = [entry for entry in usable if entry.get("default") or entry.get("config_name") == "default"] or usable
    return _patterns(usable[0]["data_files"]) if usable else None


def _patterns(data_files: Any) -> dict[str, list[str]]:
    if isinstance(data_files, dict):
        return {str(split): path if isinstance(path, list) else [path] for split, path in data_files.items()}
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, path = "train", entry
        if isinstance(entry, dict):
            split, path = str(entry.get("split", "train")), entry.get("path")
        found.setdefault(split, []).extend(path if isinstance(path, list) else [path])
    return found


def split_by_patterns(patterns: dict[str, list[str]]) -> SplitOf:
    """A rule from glob patterns: `*` within a folder, `**` across folders."""
    compiled = [(split, re.compile(_glob(pattern))) for split, paths in patterns.items() for pattern in paths]
    return lambda path: next((split for split, pattern in compiled if pattern.fullmatch(path)), None)


def _glob(pattern: str) -> str:
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", str(pattern).removeprefix("./"))
    forms = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(forms.get(part, part if part.startswith("[") else re.escape(part)) for part in parts)
