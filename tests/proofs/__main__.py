"""``python -m tests.proofs PART``, or ``make prove PART=…``: a proof too long for a test.

Continues where it was stopped, as long as the sources that it covers are the same. The log is
``tests/proofs/PART.jsonl``; a fault in it makes the exit status 1.
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from tests.proofs.parts import PARTS, log_of, part
from tests.proofs.workers import results


def main() -> int:
    """Run a part; 1 if its log has a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.proofs", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="these, once more")
    parser.add_argument("--limit", type=int, help="stop after that many cases")
    parser.add_argument("--number", type=int, help="of calls that part properties draws")
    arguments = parser.parse_args()
    proof = part(arguments.part)
    if arguments.number is not None and not hasattr(proof, "CHUNK"):
        parser.error(f"--number: part {arguments.part} has a fixed set of cases")
    order = proof.cases() if arguments.number is None else proof.cases(arguments.number)
    log = log_of(arguments.part)
    unknown = set(arguments.only) - set(order)
    if unknown:
        parser.error(f"--only: unknown cases {sorted(unknown)}")
    done = log.read()
    if not done:
        log.start()
    todo = arguments.only or [case for case in order if case not in done]
    todo = todo[: arguments.limit]
    with tqdm(total=len(todo), disable=not todo) as progress:
        for line in results(arguments.part, todo, proof.LIMIT_SECONDS):
            log.append(line)
            progress.update()
            progress.set_postfix_str(line["case"])
            if proof.fault(line):
                progress.write(f"{line['case']}: {proof.fault(line)}")
    log.sort(order)
    done = log.read()
    faults = {case: proof.fault(line) for case, line in done.items() if proof.fault(line)}
    print(f"{len(done)} of {len(order)} cases, {len(faults)} with faults: {log.path}")
    return int(bool(faults) or len(done) < len(order))


if __name__ == "__main__":
    sys.exit(main())
