"""Write the table of docs/reliability.md from docs/reliability.json, which ``make fuzz`` makes."""

import json
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- table -->\n", "<!-- end -->"


def table(run: dict) -> str:
    """The counts of a run, and what it ran on."""
    lines = ["| kind | cases | as they must be | refused by a named backend or by name | wrong | minutes |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for kind, found in run["kinds"].items():
        counts = " | ".join(f"{found[how]:,}" for how in ("cases", "held", "refused", "wrong"))
        lines.append(f"| `{kind}` | {counts} | {found['seconds'] / 60:.1f} |")
    about = (
        f"Seed {run['seed']}, numbers from {run['first']}, {run['processes']} processes; torch {run['torch']} ({run['cpu']}), "
    )
    return "\n".join([*lines, "", about + f"Python {run['python']}."]) + "\n"


def main() -> None:
    page = HERE / "reliability.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    run = json.loads((HERE / "reliability.json").read_text(encoding="utf-8"))
    page.write_text(before + BEGIN + "\n" + table(run) + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
