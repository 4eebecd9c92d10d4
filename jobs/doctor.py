"""Check shard sets: damaged files, broken images, impossible boxes, repeated images, statistics and more.

    python -m jobs.doctor /shards/coco/train2017
    python -m jobs.doctor /shards/coco/train2017 /shards/coco/val2017 --html doctor.html
    python -m jobs.doctor s3://bucket/mine/train --json > report.json

Several splits are also compared with each other: an image must not be in two of them. Everything is read and every image
decoded, in one task per shard over the cluster. The exit code is 0 without errors, 1 with errors, and 2 if there is
nothing to check; warnings and notes do not change it.
"""

import argparse
import sys

from jobs.command import location, user_errors
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.doctor.examine import examine
from pipeline.data.doctor.html_report import doctor_page, doctor_text
from pipeline.data.shards.manifest import load_shards
from pipeline.ray_cluster import start_ray

NOTHING_CHECKED = 2  # exit code


@user_errors(exit_code=NOTHING_CHECKED)
def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    args = _parser().parse_args(argv)
    shard_sets = [load_shards(uri) for uri in args.manifests]
    if len({storage.absolute(shards.uri) for shards in shard_sets}) < len(shard_sets):
        raise ConfigError("a shard set is named twice; name each split once")
    start_ray(args.num_cpus)
    report = examine(shard_sets, decode=args.decode)
    print(report.model_dump_json() if args.json else doctor_text(report))
    if args.html:
        storage.write_atomic(args.html, doctor_page(report, shard_sets, seed=args.seed).encode())
        print(f"doctor: see {args.html}", file=sys.stderr)
    return 1 if report.count("error") else 0


def _parser() -> argparse.ArgumentParser:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument(
        "manifests",
        nargs="+",
        type=location,
        metavar="MANIFEST",
        help="manifest.json or its folder: path, s3:// or gs://",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--html", type=location, metavar="FILE", help="also write a page with plots and pictures")
    parser.add_argument(
        "--decode", action=argparse.BooleanOptionalAction, default=True, help="decode every image, not only its header"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures on the page")
    parser.add_argument("--num-cpus", type=int, metavar="N", help="of a Ray started here; default: all")
    return parser


if __name__ == "__main__":
    sys.exit(main())
