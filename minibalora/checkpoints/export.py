"""Merge a base and its adapter into one checkpoint, or make the adapter smaller: `python -m minibalora export --help`.

The base is read one tensor at a time and is never in memory as a whole. Merging takes little more memory than the
largest shard that it writes, 5 GB.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

from minibalora.base import cli, progress
from minibalora.base.errors import InputError
from minibalora.base.files import new_folder, recorded_settings
from minibalora.checkpoints.adapters import put_adapter, read_adapter, save_adapter
from minibalora.checkpoints.families import read_family
from minibalora.checkpoints.merged import save_model
from minibalora.checkpoints.template import copy_template
from minibalora.checkpoints.weights import skeleton
from minibalora.truncate import truncate
from minibalora.variants import fold


def main() -> int:
    args = parser().parse_args()
    adapter = read_adapter(args.adapter)
    if args.adapter_rank is not None and adapter.config.get("use_dora"):
        raise InputError(f"{args.adapter}: the change that DoRA makes has full rank: leave --adapter-rank out")
    is_classifier = adapter.config.get("task_type") == "SEQ_CLS"
    classes = adapter.whole.get(read_family(Path(args.model))[0].names.classes)
    num_labels = None if classes is None else len(classes)
    model = skeleton(args.model, "classifier" if is_classifier else "lm", num_labels)
    put_adapter(model, adapter)
    with new_folder(args.out) as folder:
        if args.adapter_rank is not None:
            lost = truncate(fold(model), args.adapter_rank)
            rank = f"rank {args.adapter_rank}"
            print(f"adapter of at most {rank}: relative error {lost:.2e} of the change in the weights")
            save_adapter(model, folder)
            if (args.adapter / "run.json").exists():
                shutil.copyfile(args.adapter / "run.json", folder / "run.json")  # the names of the classes, and more
        else:
            bar = partial(progress.over, name="merge", unit="shard")
            save_model(model, folder, recorded_settings(args.adapter).get("labels"), bar)
        copy_template(args.adapter, folder)
    print(f"saved to {args.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = cli.OneLineParser(
        prog="python -m minibalora export",
        description="Merge an adapter into its base: a Hugging Face checkpoint that needs no adapter.",
    )
    add = parser.add_argument
    add(
        "--model",
        type=cli.folder,
        metavar="DIR",
        required=True,
        help="the base: the checkpoint that the adapter was trained on",
    )
    add("--adapter", type=cli.folder, metavar="DIR", required=True, help="the folder with adapter_config.json")
    add("--out", type=cli.path, metavar="DIR", required=True, help="new folder")
    add("--adapter-rank", type=cli.positive_int, metavar="R", help="don't merge: write the best approximation of this "
        "rank as an adapter (a PiSSA adapter is saved with twice the rank it was trained with)")  # fmt: skip
    return parser
