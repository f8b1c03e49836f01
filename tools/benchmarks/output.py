"""What every benchmark leaves: a Markdown table on the terminal, JSON with every number, and the circumstances of both."""

import datetime
import json
import sys
from pathlib import Path

import torch


def circumstances() -> dict[str, str]:
    """Where, when and how: card, versions, date, command."""
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python tools/benchmark.py", *sys.argv[1:]]),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(folder: Path, name: str, settings: dict, results: list[dict], shown: str) -> None:
    """Prints the table under its circumstances and settings, and writes NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    where = circumstances()
    heading = f"{where['card']}, torch {where['torch']}, {where['date']}; {', '.join(f'{k} {v}' for k, v in settings.items())}"
    text = f"{heading}\n\n{shown}\n\n`{where['command']}`\n"
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps({"circumstances": where, "settings": settings, "results": results}, indent=1))
    print(text, flush=True)
