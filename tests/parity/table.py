"""Runs the comparison for many seeds and sizes and prints the largest errors as Markdown.

    python -m tests.parity.table 0-19 nano
    python -m tests.parity.table 0,1 tiny,small --resolution=256 -k "mask1"

Every size is a pytest of its own; what follows the sizes is handed to it. Exit status 1 if a test
failed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile


def run(seeds: str, variant: str, resolution: int, rest: list[str]) -> tuple[dict, bool]:
    """The report of one pytest, and whether all passed."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "-q", str(pathlib.Path(__file__).parent)]
        command += [f"--parity-seed={seeds}", f"--parity-variant={variant}"]
        command += [f"--parity-resolution={resolution}", f"--parity-json={path}", *rest]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
        report = json.loads(path.read_text()) if path.exists() else {"parts": {}, "seeds": []}
    return report, done.returncode == 0


def table(report: dict) -> str:
    """Markdown of the largest error of every part."""
    lines = [
        "| part | largest error | the reference's own | tolerance |",
        "| --- | ---: | ---: | ---: |",
    ]
    for part, x in sorted(report["parts"].items()):
        noise = "" if x["noise"] is None else f"{x['noise']:.1e}"
        lines.append(f"| {part} | {x['error']:.1e} | {noise} | {x['tolerance']:g} |")
    return "\n".join(lines)


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("seeds", help="such as 0-3,7")
    parser.add_argument("variants", help="such as nano,tiny")
    parser.add_argument("--resolution", type=int, default=0, help="0: 64 for nano, else 256")
    args, rest = parser.parse_known_args()
    status = 0
    for variant in args.variants.split(","):
        report, passed = run(args.seeds, variant, args.resolution, rest)
        status |= not passed
        print(f"\n{variant}, {len(report['seeds'])} seeds\n\n{table(report)}", flush=True)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
