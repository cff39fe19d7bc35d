"""Draw the terms of runs over their steps, or t-SNE of features before and after training; see `--help`.

Needs matplotlib and, for t-SNE, scikit-learn: pip install '.[plots]'. Both are imported only where they are
used. Figures are made without pyplot, so no window, backend or global setting is involved.
"""

import argparse

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import check_file
from minibalora.evaluation.plot_features import read_features, tsne
from minibalora.evaluation.plot_runs import curves, read_runs
from minibalora.evaluation.plot_style import save_picture


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    try:
        if args.features:
            import sklearn  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"can't draw ({error}): pip install '.[plots]'") from None
    if args.features:
        save_picture(args.out, lambda: tsne(read_features(args.features, args.max_rows)))
    else:
        save_picture(args.out, lambda: curves(read_runs(args.runs)))
    print(f"saved to {args.out}")
    return 0


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora plot",
        description="Draw the logs of runs, with a panel for each term; or, with --features, t-SNE of the features "
        "that train_nlu.py --features saved before and after training, as in the paper's figures 5 to 8.",
    )
    add = parser.add_argument
    add("runs", nargs="*", type=cli.path, metavar="run", help="folder of a run, its --out; several are drawn together")
    add(
        "--features", nargs="+", type=cli.path, metavar="FILE", help="files of train_nlu.py --features; each gets a row"
    )
    add("--max-rows", type=cli.positive_int, metavar="N", help="t-SNE of N random rows (default: 2000, half a minute)")
    add(
        "-o",
        "--out",
        type=cli.path,
        required=True,
        metavar="FILE",
        help="picture to write: .png, .pdf or .svg; an existing file is replaced",
    )
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.features):
        raise InputError("give either the folders of runs or --features: see --help")
    if args.max_rows is not None and not args.features:
        raise InputError("--max-rows needs --features, because a log is always drawn whole: leave it out")
    args.max_rows = args.max_rows or 2000
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {args.out}: not the name of a picture: end it in .png, .pdf or .svg")
    check_file(args.out, "--out")  # before t-SNE, not after it
    return args
