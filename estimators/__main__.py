"""List the gradient estimators: how their ids are written, what they need of a model, what they declare, their source.

    python -m estimators                          # all families
    python -m estimators ovis-gamma1 tvo-part5    # those of some ids, in full
    python -m estimators --user_dir DIR           # those of your own folder too

In an id, <words> stand for numbers or for one of the words listed, [parts] may be left out. K is estimator.iw; alpha,
beta and freebits are the options of the bound. Exit status: 0, or 2 for an id that no family holds.
"""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from estimators import registry
from estimators.registry import Family
from orchestration.command_line import DONE, Parser, existing_folder, guarded

WIDTH = 120  # where no terminal says its own
COLUMNS = {"id": 5, "needs": 3, "declares": 4, "source": 3}  # and their shares of the width


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(__doc__)
    p.prog = "python -m estimators"
    p.add_argument("ids", nargs="*", metavar="ID", help="show what these ids stand for (default: list all families)")
    p.add_argument("--user_dir", type=existing_folder, metavar="DIR", help="your own modules and conf/")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of authors need not be ASCII
    arguments = parser().read(argv)
    return guarded(lambda: command(arguments.ids, arguments.user_dir))


def command(ids: list[str], user_dir: Path | None) -> int:
    """Print all families, or what some ids stand for."""
    if user_dir:
        registry.add_directory(user_dir)
    console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)
    if not ids:
        console.print(overview(registry.families()))
        return DONE
    families = {family.name: family for family in registry.families()}
    parsed = [registry.parse(id) for id in ids]
    for i, each in enumerate(parsed):
        console.print(*[""][:i], details(each, families[each.family]), sep="\n")
    return DONE


def overview(families: tuple[Family, ...]) -> Table:
    """Return one row a family, in the order of their ids; what is refused stands below what is declared."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name, ratio in COLUMNS.items():
        table.add_column(name, ratio=ratio, overflow="fold")
    for family in sorted(families, key=lambda family: family.id.lower()):
        declares = f"{family.declares} ({family.limits})" if family.limits else family.declares
        table.add_row(*map(Text, ("\n".join([family.id, *legend(family)]), family.needs, declares, family.source)))
    return table


def legend(family: Family) -> Iterator[str]:
    """Yield what may stand for each of the parameters that are words, and ids of a family that has several."""
    for name, kind in family.parameters.items():
        if not isinstance(kind, str):
            yield f"  {name}: {', '.join(kind)}"
    if family.parameters:
        yield f"  such as {', '.join(family.examples)}"


def details(parsed: registry.EstimatorId, family: Family) -> Table:
    """Return all that is known of one id, a line each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    parameters = ", ".join(f"{name} = {registry.spell(value)}" for name, value in parsed.parameters.items())
    for name, value in (
        ("id", parsed.id),
        ("form", family.id),
        ("parameters", parameters),
        ("needs", family.needs),
        ("declares", family.declares),
        ("limits", family.limits),
        ("source", family.source),
        ("class", parsed.target),
        ("file", str(family.file)),
    ):
        if value:
            table.add_row(name, Text(value))
    return table


if __name__ == "__main__":
    sys.exit(main())
