"""Turn an experiment's run directories into tables, figures and one page.

    python report.py --exp gaussian-mixture-model
    python report.py --exp asymptotic-analysis --draw_individual 10
    open reports/gaussian-mixture-model/index.html

What to show is in the experiment file's `report:` section; any flag below takes the place of its entry there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestration.command_line import DONE, Parser, guarded

ROOT, OUTPUT = Path("runs"), Path("reports")


def parser() -> Parser:
    """Return the command line."""
    it = Parser(__doc__)
    it.add_argument("--exp", required=True, metavar="NAME", help="the experiment")
    it.add_argument("--root", default=ROOT, type=Path, metavar="DIR", help="where the runs are (default: runs)")
    it.add_argument("--output", default=OUTPUT, type=Path, metavar="DIR", help="where to write (default: reports)")
    it.add_argument("--user_dir", type=Path, metavar="DIR", help="a folder with experiments/ of your own")
    what = it.add_argument_group("what to show; lists are comma separated, metrics are split:group/name")
    what.add_argument("--keys", help="what tells curves apart: groups and config keys, such as dataset,estimator,iw")
    what.add_argument("--metrics", help="curves to draw, such as test:gmm/posterior_mse,train:grads/snr")
    what.add_argument("--detailed_metrics", help="curves to draw small, in one grid")
    what.add_argument("--pivot_metrics", help="agg:split:group/name; agg is min, max, mean, median, first or last")
    what.add_argument("--include", help="keep these runs only: ids, tags, choices (tvo: all of tvo-...), key=value")
    what.add_argument("--exclude", help="leave these runs out")
    what.add_argument("--ylims", help="limits of the value axis, such as test:loss/L_k:-94:-88")
    what.add_argument("--ema", type=float, help="smooth the curves drawn: weight of the past, from 0 to below 1")
    what.add_argument("--latex", action=argparse.BooleanOptionalAction, help="write the pivot as a LaTeX table too")
    what.add_argument("--caption", help="a sentence for the page and the LaTeX table")
    what.add_argument(
        "--figures",
        help="kinds of figures to draw: curves, pivot, detailed, together; of gradients: asymptotics, distribution; of "
        "many estimators: league, frontier; of cost: efficiency; of DiCE: samples, returns",
    )
    what.add_argument(
        "--draw_individual",
        nargs="?",
        const=True,
        metavar="WHICH",
        help="draw SNR and variance of single parameters against K: of five, of so many, or of these: b[0],A[0,1]",
    )
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    known = parser().read(arguments)
    return guarded(lambda: _report(known))


def _report(known: argparse.Namespace) -> int:
    # Imported here, so that --help and a mistyped flag answer at once.
    from reporting.analyse import analyse
    from reporting.load import load, states
    from reporting.options import READERS, override, parse
    from reporting.output import write

    given = {name: value for name in READERS if (value := getattr(known, name)) is not None}
    study = load(known.exp, known.root, known.user_dir)
    options = override(parse(study.report, f"{study.source}: report"), given)
    results = analyse(study, options, given)
    parts = [f"-{flag[:3]}={given[flag]}" for flag in ("include", "exclude") if given.get(flag)]
    name = "".join([known.exp, _other_root(known.root, known.output), *parts])
    folder = known.output / name.replace("/", "_").replace(" ", "")
    for warning in write(results, folder, known.exp, study.description):
        print(f"warning: {warning}", file=sys.stderr)
    counts = ", ".join(f"{count} {state}" for state, count in states(results.jobs).items())
    print(f"{known.exp}: {counts or 'no job has started'}")
    print(folder / "index.html")
    return DONE


def _other_root(root: Path, output: Path) -> str:
    """Return what tells the report of another root than `runs` from that of `runs`, where both would lie in `reports`.

    It is the root's path, from here where it lies below.
    """
    root, here = root.resolve(), Path.cwd()
    if root == ROOT.resolve() or output.resolve() != OUTPUT.resolve():
        return ""
    path = root.relative_to(here) if root.is_relative_to(here) else root
    return f"-root={str(path).strip('/')}"


if __name__ == "__main__":
    sys.exit(main())
