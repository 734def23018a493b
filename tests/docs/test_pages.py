"""What can be said of the pages without running their commands; `make docs-test` runs those."""

import re
from pathlib import Path

import click
import pytest
from support.pages import ROOT, blocks, inline, launches, links, pages, sections, steps

from mlx_launcher.cli import COMMANDS, _group

PAGES = [pytest.param(page, id=page.name) for page in pages()]
# A measurement: a ratio, or a number with one of these units.
MEASURED = re.compile(r"\d(?:×|\u00a0?x\b| ?(?:ms|µs|MiB)\b)")
SOURCE = re.compile(r"benchmarks/|tests/|`make bench`|RESULTS\.md")
# What looks like one and is set in the code, or a formula.
SET = re.compile(r"\b(?:1|32) MiB|`\"\d+ms\"`|2 × layers")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, section = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (section and section not in sections(target)):
            lost.append(link)
    assert lost == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = {ROOT / "README.md"}, [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists() and target not in reached:
                reached.add(target)
                waiting.append(target)
    assert {page.name for page in pages()} - {page.name for page in reached} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A command that nobody takes for one would never be run."""
    assert [f"{block.page}:{block.line}" for block in blocks(page) if block.kind == "unknown"] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page: Path) -> None:
    written = [step.command for block in blocks(page) for step in steps(block)] + list(inline(page))
    wrong = [reason for text in written for words in launches(text) if (reason := _wrong(words))]
    assert wrong == []


def _wrong(words: list[str]) -> str | None:
    """Why these cannot follow `mlx-launch`; None where they can. Placeholders in capitals stand for anything."""
    command: click.Command = _group
    known = {option for parameter in command.params for option in parameter.opts}
    context = click.Context(command)
    for word in words:
        name = word.partition("=")[0].strip("[]")
        if name.startswith("-") and name not in {*known, "--help", "-h"}:
            return f"mlx-launch {' '.join(words)}: no option {name}"
        if isinstance(command, click.Group) and re.fullmatch(r"[a-z]+", name):
            found = command.get_command(context, name)
            if found is None:
                return f"mlx-launch {' '.join(words)}: no command {name}"
            command, context = found, click.Context(found, parent=context)
            known |= {option for parameter in found.params for option in parameter.opts}
    return None


def test_what_is_wrong_is_seen() -> None:
    assert _wrong(["start", "--demo", "--port", "8081"]) is None
    assert _wrong(["start", "--demon"])
    assert _wrong(["begin"])
    assert _wrong(["cache", "eat"])
    assert _wrong(["--json", "config", "show", "--origin"]) is None


@pytest.mark.parametrize("page", PAGES)
def test_every_measured_number_names_its_source(page: Path) -> None:
    """In its paragraph or row, or in the heading's section."""
    bare = []
    for section in re.split(r"^(?=#+ )", page.read_text(), flags=re.MULTILINE):
        lines = [line for line in section.splitlines() if MEASURED.search(SET.sub("", line))]
        if lines and not SOURCE.search(section):
            bare += lines
    assert bare == []


def test_the_readme_has_a_place_for_what_was_measured() -> None:
    readme, writer = (ROOT / "README.md").read_text(), (ROOT / "benchmarks" / "__main__.py").read_text()
    markers = re.findall(r"<!-- .*results.* -->", readme)
    assert len(markers) == 2
    assert all(f'"{marker}"' in writer for marker in markers)


def test_every_command_is_on_a_page() -> None:
    written = [text for page in pages() for text in inline(page)]
    written += [step.command for page in pages() for block in blocks(page) for step in steps(block)]
    named = {words[0] for text in written for words in launches(text) if words}
    assert set(COMMANDS) - named == set()
