"""Runs the comparison for many seeds and sizes and prints the largest errors as Markdown.

    python -m tests.parity.table 0-19 nano
    python -m tests.parity.table 0,1 tiny,small --resolution=256 -k "mask1"

Every run is a pytest of its own; what follows the sizes is handed to it. Exit status 1 if a run
failed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile


def numbers(text: str) -> list[int]:
    """'0-3,7' to [0, 1, 2, 3, 7]."""
    spans = [part.split("-") for part in text.split(",")]
    return [i for span in spans for i in range(int(span[0]), int(span[-1]) + 1)]


def run(seed: int, variant: str, resolution: int, rest: list[str]) -> tuple[dict, bool]:
    """The report of one pytest, and whether all passed."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "-q", str(pathlib.Path(__file__).parent)]
        command += [f"--parity-seed={seed}", f"--parity-variant={variant}"]
        command += [f"--parity-resolution={resolution}", f"--parity-json={path}", *rest]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
        report = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    return report, done.returncode == 0


def table(reports: list[dict]) -> str:
    """Markdown of the largest error of every part over some reports."""
    lines = [
        "| part | seeds | largest error | the reference's own | tolerance |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for part in sorted({part for report in reports for part in report["parts"]}):
        found = [report["parts"][part] for report in reports if part in report["parts"]]
        error = max(x["error"] for x in found)
        noises = [x["noise"] for x in found if x["noise"] is not None]
        noise = f"{max(noises):.1e}" if noises else ""
        tolerance = max(x["tolerance"] for x in found)
        lines.append(f"| {part} | {len(found)} | {error:.1e} | {noise} | {tolerance:g} |")
    return "\n".join(lines)


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("seeds", type=numbers, help="such as 0-3,7")
    parser.add_argument("variants", help="such as nano,tiny")
    parser.add_argument("--resolution", type=int, default=0, help="0: 64 for nano, else 256")
    args, rest = parser.parse_known_args()
    status = 0
    for variant in args.variants.split(","):
        reports = []
        for seed in args.seeds:
            report, passed = run(seed, variant, args.resolution, rest)
            print(f"{variant}, seed {seed}: {'passed' if passed else 'FAILED'}", file=sys.stderr)
            reports.append(report)
            status |= not passed
        print(f"\n{variant}, {len(reports)} seeds\n\n{table(reports)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
