"""Every attack, the bars, and the table in `README.md`. Exit status: 0 if no bar was broken, else 1."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.hostile import table
from tests.hostile.attack import run
from tests.hostile.attacks import ATTACKS


async def _main(only: str) -> int:
    attacks = [attack for attack in ATTACKS if only in attack.name or only in attack.area]
    if not attacks:
        print(f"no attack has {only!r} in its name or area", file=sys.stderr)
        return 2
    results = []
    for attack in attacks:
        with tempfile.TemporaryDirectory() as folder:
            result = await run(attack, Path(folder))
        results.append(result)
        print(f"{'above' if result.problems else 'ok':5}  {attack.area}: {attack.name}", flush=True)
        for problem in result.problems:
            print(f"       {problem}", flush=True)
    print(table.table(results))
    if not only:
        table.write(results)
    return 1 if any(result.problems for result in results) else 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="attacks whose name or area contains this")
    return asyncio.run(_main(parser.parse_args().only))


if __name__ == "__main__":
    sys.exit(main())
