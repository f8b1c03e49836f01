"""tools/results/README.md is up to date with the JSON files, and its links work."""

import json
import shutil

import pytest
from benchmarks import results

from megamtp.errors import InputError


@pytest.fixture(scope="module")
def committed() -> str:
    return results.page(results.FOLDER)


def test_the_committed_page_is_up_to_date(committed):
    assert (results.FOLDER / "README.md").read_text() == committed


def test_every_file_of_the_folder_is_on_the_page(committed):
    names = sorted(path.name for path in results.FOLDER.iterdir())
    assert len(names) > 40
    for name in names:
        if name.endswith(".png"):
            assert f"({name})" in committed
        elif name not in ("README.md", "paper.json"):
            assert f"\n### {name}\n" in committed
    assert all(name.endswith((".json", ".png")) or name == "README.md" for name in names)


def test_every_link_on_the_page_leads_to_a_heading(committed):
    anchors = [results.anchor(line.lstrip("# ")) for line in committed.splitlines() if line.startswith("#")]
    links = [part.split(")")[0] for part in committed.split("](#")[1:]]
    assert len(links) > 40 and set(links) <= set(anchors)
    assert len(anchors) == len(set(anchors))


def test_a_section_shows_the_content_of_its_file(tmp_path):
    """Changed numbers and a note appear. There is no plot if its file is missing."""
    for path in results.FOLDER.glob("*.json"):
        shutil.copy(path, tmp_path)
    content = json.loads((tmp_path / "world.json").read_text()) | {"note": "On a hot day."}
    content["circumstances"]["card"] = "some card"
    content["results"] = [{"ranks": 8, "variant": "ours", "milliseconds": [123.0, 124.0, 127.0]}]
    (tmp_path / "world.json").write_text(json.dumps(content))
    section = results.page(tmp_path).split("### world.json\n\n")[1].split("\n\n## ")[0]
    heading, command, note, table = section.split("\n\n")
    assert heading.startswith("some card, torch 2.11.0+cu130, 2026-11-29; size 1.3b, n 1, bandwidth 100 GB/s, ")
    assert command == f"`{content['circumstances']['command']}`"
    assert note == "On a hot day."
    assert table.splitlines()[-1] == "| 8 | 124.0 [123.0, 127.0] | 1.000 |"


@pytest.mark.parametrize("command", ["python tools/benchmark.py worlds", "bash launch/test.sh"])
def test_a_file_that_no_benchmark_wrote_is_refused(command, tmp_path):
    shutil.copy(results.FOLDER / "paper.json", tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps({"circumstances": {"command": command}}))
    with pytest.raises(InputError, match=f"mine.json: its command is {command}; expected one of tools/benchmark.py"):
        results.page(tmp_path)


def test_a_smoke_run_is_refused(tmp_path):
    shutil.copy(results.FOLDER / "paper.json", tmp_path)
    content = json.loads((results.FOLDER / "world.json").read_text())
    (tmp_path / "world.json").write_text(json.dumps(content | {"smoke": True}))
    with pytest.raises(InputError, match=r"^world.json was written by a smoke run; expected measurements: remove it$"):
        results.page(tmp_path)
