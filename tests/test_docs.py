"""The documentation: its links lead somewhere, its flags exist, and the commands that are marked as tested run."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from process_helpers import ScriptRun
from source_tree import ROOT, scripts

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASH = re.compile(r"^(<!-- tested: (?P<name>.*?) -->\n)?```bash\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path, tested: str | None = None) -> list[list[str]]:
    """The words of each command line in the bash blocks of a page, or in those marked `tested: <name>`."""
    found = []
    for block in BASH.finditer(page.read_text()):
        if tested is None or block["name"] == tested:
            lines = re.sub(r"\\\n", " ", block["text"]).splitlines()
            found += [shlex.split(line, comments=True) for line in lines if not line.lstrip().startswith("#")]
    return [words for words in found if words]


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-") for heading in headings}


@cache
def flags(script: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"--(?:\[no_\])?(\w+)", shown))
    return named | {f"no_{name}" for name in named}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = page if not file else (page.parent / file).resolve()
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_flags_of_commands_exist(page):
    names = {script.name for script in scripts()}
    for words in commands(page):
        script = next((word for word in words if word in names), None)
        if script is not None:
            given = {word[2:].partition("=")[0] for word in words[words.index(script) :] if word.startswith("--")}
            assert given <= flags(script), f"{script}: {given - flags(script)}"


@pytest.mark.slow(30)
@pytest.mark.timeout(600)  # seven scripts, one after the other
def test_the_quick_start_runs_as_it_is_written(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for words in commands(ROOT / "docs" / "quick_start.md", "quick start"):
        script, *arguments = words[2:] if words[:2] == ["accelerate", "launch"] else words[1:]
        done = ScriptRun(script, *arguments, folder=tmp_path).wait()
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    assert (tmp_path / "runs/digits-samples/grid.png").is_file() and (tmp_path / "runs/digits/unet").is_dir()
