"""Check shard sets for damaged files, broken images, impossible boxes and duplicates.

    dfine doctor /shards/coco/train2017
    dfine doctor /shards/coco/train2017 /shards/coco/val2017 --html doctor.html
    dfine doctor s3://bucket/mine/train --json > report.json

Several splits are also compared with each other: no image may be in two of them. Every file is read and every image
decoded, in one task per shard. The exit code is 0 without errors, 1 with errors, and 2 if nothing could be checked;
warnings and notes do not change it.
"""

import argparse
import sys

from jobs.command import announce, command_parser, location, parsed, user_errors

NOTHING_CHECKED = 2  # exit code


@user_errors(exit_code=NOTHING_CHECKED)
def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    args = parsed(parser(), argv)

    # 1. Open the shard sets.
    from pipeline import storage
    from pipeline.config import ConfigError
    from pipeline.data.shards.manifest import load_shards
    from pipeline.output_folder import HTML, refuse_foreign_file

    refuse_foreign_file(args.html, "--html", HTML)
    shard_sets = [load_shards(uri) for uri in args.manifests]
    if len({storage.absolute(shards.uri) for shards in shard_sets}) < len(shard_sets):
        raise ConfigError("a shard set is named twice; name each split once")
    announce("doctor", "starting Ray …")

    # 2. Examine them on Ray.
    from pipeline.data.doctor.examine import examine
    from pipeline.data.doctor.html_report import doctor_page, doctor_text
    from pipeline.ray_cluster import start_ray

    start_ray(args.num_cpus)
    report = examine(shard_sets, decode=args.decode)

    # 3. Report.
    print(report.model_dump_json() if args.json else doctor_text(report))
    if args.html:
        storage.write_atomic(args.html, doctor_page(report, shard_sets, seed=args.seed).encode())
        print(f"doctor: see {args.html}", file=sys.stderr)
    return 1 if report.count("error") else 0


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("doctor", __doc__)
    arguments.add_argument(
        "manifests",
        nargs="+",
        type=location,
        metavar="MANIFEST",
        help="manifest.json or its folder: path, s3:// or gs://",
    )
    arguments.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments.add_argument("--html", type=location, metavar="FILE", help="also write a page with plots and images")
    arguments.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image, or read its header alone",
    )
    arguments.add_argument("--seed", type=int, default=0, help="seed of the sample of images on the page")
    arguments.add_argument("--num-cpus", type=int, metavar="N", help="CPUs of a Ray started here; default: all")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
