"""README.md: its measured numbers are in tools/results/README.md, which is made from the results, and its links lead
somewhere.
"""

import re
from pathlib import Path

import pytest
from benchmarks.results import anchor

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "tools/results/README.md").read_text()

# Numbers that are not measured. They are taken out of the text before numbers are looked for.
EXEMPT = {
    "commands and programs": r"```.*?```",
    "settings and file names": r"`[^`]*`",
    "targets of links, with arXiv ids": r"\]\([^)]*\)",
    "versions of Python": r"Python 3\.\d+ to 3\.\d+",
    "numbers of parameters": r"\b\d+(\.\d+)? ?[MB]\b",
}
# A number with a decimal point, or an integer with a unit. The integer and its unit have to be found together.
MEASURED = re.compile(r"(?<![\w.])(?:\d+\.\d+|\d+ ?(?:%|h|min|s|ms|µs|[KMG]i?B(?:/s)?|times)(?!\w))")
LINK = re.compile(r"\]\(tools/results/README\.md#([^)]*)\)")


def blank(match: re.Match) -> str:
    """As many spaces, so that what follows stays where it is."""
    return re.sub(r"[^\n]", " ", match[0])


def without_exempt(text: str) -> str:
    for pattern in EXEMPT.values():
        text = re.sub(pattern, blank, text, flags=re.DOTALL)
    return text


def sections() -> dict[str, str]:
    """The text below each heading of the results, by the heading's anchor, to the next heading of its level."""
    headings = list(re.finditer(r"^(#+) (.*)$", RESULTS, flags=re.MULTILINE))
    found = {}
    for place, heading in enumerate(headings):
        further = (later.start() for later in headings[place + 1 :] if len(later[1]) <= len(heading[1]))
        found[anchor(heading[2])] = RESULTS[heading.end() : next(further, len(RESULTS))]
    return found


SECTIONS = sections()


def occurs(number: str, source: str) -> bool:
    """With or without the space before a unit."""
    spelled = re.escape(number).replace(r"\ ", " ?")
    return re.search(rf"(?<![\d.]){spelled}(?![\d.]*\d)", source) is not None


def unfounded(readme: str) -> list[str]:
    """Measured numbers, and lines of tables that have some, that the results do not have.

    A paragraph links to the sections that its numbers are from; the numbers of a table are from the sections of the
    paragraph above it, which must have each line of it.
    """
    problems, source, start = [], "", 0
    plain = without_exempt(readme)
    for block in re.split(r"(\n\n)", readme):
        numbers = MEASURED.findall(plain[start : start + len(block)])
        start += len(block)
        table = block.startswith("|")
        if not table and block.strip():
            source = "\n".join(SECTIONS[name] for name in LINK.findall(block))
        if table and numbers:
            problems += [line for line in block.splitlines() if line not in source.splitlines()]
        elif numbers:
            plain_source = re.sub(r"`[^`]*`", "", source)
            problems += [number for number in numbers if not occurs(number, plain_source)]
    return problems


def test_every_measured_number_is_in_the_results():
    assert unfounded(README) == []
    assert len(MEASURED.findall(without_exempt(README))) > 50


def test_a_changed_digit_of_any_measured_number_is_reported():
    """Any digit in tables, and the last one in prose: 100 GB/s could be 200 GB/s, which the section has, too."""
    for match in MEASURED.finditer(without_exempt(README)):
        in_table = README[: match.start()].splitlines()[-1].startswith("|")
        places = [at for at in range(match.start(), match.end()) if README[at].isdigit()]
        for place in places if in_table else places[-1:]:
            changed = README[:place] + str((int(README[place]) + 1) % 10) + README[place + 1 :]
            assert unfounded(changed), f"{match[0]} could be {changed[match.start() : match.end()]}"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("at 1.3B with 2.6 M parameters on Python 3.10 to 3.12", []),
        ("`optimizer.lr=3.5` [a paper](https://arxiv.org/abs/2404.19737)", []),
        ("```\nrun 1.5 s\n```", []),
        ("n = 4, T = 4096 and 64 ranks", []),
        ("it takes 3 min 27 s or 0.5 times as long, 25 % more", ["3 min", "27 s", "0.5", "25 %"]),
        ("| loss | 4.359 | at 100 GB/s |", ["4.359", "100 GB/s"]),
    ],
)
def test_what_counts_as_measured(text, numbers):
    assert MEASURED.findall(without_exempt(text)) == numbers


def test_a_number_without_a_source_is_reported():
    assert unfounded("A step takes 12.5 ms.") == ["12.5"]
    assert unfounded("[Losses](tools/results/README.md#quickstartjson) of 4.359 and 4.36") == ["4.36"]


def test_links_lead_to_files_and_sections():
    targets = re.findall(r"\]\(([^)]*)\)", README)
    files = [target.split("#")[0] for target in targets if not target.startswith("https://")]
    assert len(files) > 8
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [name for name in LINK.findall(README) if name not in SECTIONS] == []


def test_named_modules_exist():
    names = re.findall(r"`((?:megamtp|tools|launch|configs)/[\w./]+)`", README)
    assert len(names) >= 4 and [name for name in names if not (ROOT / name).exists()] == []


def test_the_page_is_short():
    assert len(README.splitlines()) <= 150
    assert max(map(len, README.splitlines())) <= 120
