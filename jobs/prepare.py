"""Turn a detection data set into shards: Parquet files of encoded images with their boxes, and one manifest.json.

    python -m jobs.prepare coco /data/coco --split train2017 --out /shards/coco/train2017
    python -m jobs.prepare coco --images DIR --annotations FILE.json --split train --out s3://bucket/mine/train
    python -m jobs.prepare objects365 /data/objects365 --split train --out /shards/objects365/train
    python -m jobs.prepare voc /data/VOC2012 --split train --out /shards/voc/train
    python -m jobs.prepare yolo /data/mine/data.yaml --split train --out /shards/mine/train
    python -m jobs.prepare synthetic --images 2000 --split train --out /tmp/shapes/train

One command makes one split in one folder. Killed, it goes on where it was when it is given again. Images and boxes that
cannot be used are listed with the reason in rejected.parquet. Paths must be readable from every node of the cluster; a
job started alone starts Ray on this machine, one submitted with `ray job submit` uses that cluster.
"""

import argparse

from jobs.command import local_path, location, user_errors
from pipeline.data.prepare.prepare import prepare, read_rejected, reasons
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.sources import objects365
from pipeline.data.sources.coco import coco_source
from pipeline.data.sources.index import DatasetSource, SourceError
from pipeline.data.sources.synthetic import synthetic_source
from pipeline.data.sources.voc import voc_source
from pipeline.data.sources.yolo import yolo_source
from pipeline.ray_cluster import start_ray


@user_errors()
def main(argv: list[str] | None = None) -> None:
    prepare_shards(parser().parse_args(argv))


def prepare_shards(args: argparse.Namespace) -> None:
    options = PrepareOptions(
        shard_mib=args.shard_mib,
        row_group_rows=args.row_group_rows,
        shuffle=args.shuffle,
        seed=args.seed,
        longest_side=args.longest_side or None,
        jpeg_quality=args.jpeg_quality,
        max_pixels=args.max_pixels,
        verify=args.verify,
    )
    source = _source(args)
    start_ray(args.num_cpus)
    shards = prepare(source, args.out, split=args.split, options=options, strict=args.strict)
    manifest, rejected = shards.manifest, read_rejected(shards)
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(f"{shards.uri}: {manifest.images} images, {manifest.boxes} boxes of {len(manifest.categories)} classes")
    print(f"{len(manifest.shards)} shards, {megabytes:.1f} MB, digest {manifest.digest}")
    print(f"rejected: {reasons(rejected)}, see rejected.parquet" if rejected else "rejected: nothing")


def _source(args: argparse.Namespace) -> DatasetSource:
    match args.source:
        case "coco":
            if args.root is None and (args.images is None or args.annotations is None):
                raise SourceError("coco needs its folder, or both --images and --annotations")
            return coco_source(
                args.images or f"{args.root}/{args.split}",
                args.annotations or f"{args.root}/annotations/instances_{args.split}.json",
            )
        case "objects365":
            return objects365.objects365_source(
                args.root, args.split, train_json=args.train_json, val_json=args.val_json, val_images=args.val_images
            )
        case "voc":
            return voc_source(args.root, args.split, classes=args.classes, one_based=not args.zero_based)
        case "yolo":
            return yolo_source(args.data_yaml, args.split)
        case _:
            return synthetic_source(
                args.images,
                seed=args.draw_seed,
                longest_side=args.image_side,
                max_shapes=args.max_shapes,
                classes=dict(_renamed(text) for text in args.classes),
            )


def _renamed(text: str) -> tuple[str, str]:
    shape, _, name = text.partition("=")
    return shape, name or shape


def parser() -> argparse.ArgumentParser:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    coco = sources.add_parser("coco", help="a folder of images and an instances json")
    coco.add_argument("root", nargs="?", type=location, help="folder with SPLIT/ and annotations/instances_SPLIT.json")
    coco.add_argument("--images", type=location, metavar="DIR", help="instead: the folder of the images")
    coco.add_argument("--annotations", type=location, metavar="FILE", help="and their json")
    _add_common(coco)

    o365 = sources.add_parser("objects365", help="the patchN folders and the released json files")
    o365.add_argument("root", type=location, help="folder of the data set; --split is train or val")
    o365.add_argument(
        "--train-json", type=location, metavar="FILE", help="default ROOT/annotations/zhiyuan_objv2_train.json"
    )
    o365.add_argument(
        "--val-json", type=location, metavar="FILE", help="default ROOT/annotations/zhiyuan_objv2_val.json"
    )
    o365.add_argument(
        "--val-images", type=int, default=objects365.VAL_IMAGES, metavar="N", help="others are trained on"
    )
    _add_common(o365, longest_side=objects365.LONGEST_SIDE)

    voc = sources.add_parser("voc", help="Annotations/*.xml, ImageSets/Main and JPEGImages")
    voc.add_argument("root", type=local_path)
    voc.add_argument(
        "--classes", nargs="+", default=(), metavar="NAME", help="in order; default: all that occur, sorted"
    )
    voc.add_argument("--zero-based", action="store_true", help="the XML has ordinary coordinates, not pixels from 1")
    _add_common(voc)

    yolo = sources.add_parser("yolo", help="a data.yaml with images and txt labels")
    yolo.add_argument("data_yaml", type=local_path)
    _add_common(yolo)

    synthetic = sources.add_parser("synthetic", help="drawn shapes, no files needed")
    synthetic.add_argument("--images", type=int, required=True, metavar="N")
    synthetic.add_argument("--draw-seed", type=int, default=0, help="take another one for another split")
    synthetic.add_argument("--image-side", type=int, default=320, metavar="PX", help="the longer side")
    synthetic.add_argument("--max-shapes", type=int, default=12, metavar="N")
    synthetic.add_argument(
        "--classes", nargs="+", default=(), metavar="SHAPE[=NAME]", help="annotate these alone, under these names"
    )
    _add_common(synthetic)
    return parser


def _add_common(parser: argparse.ArgumentParser, longest_side: int = 0) -> None:
    """Options of every source; not a parent parser, since subparsers would share its defaults."""
    defaults = PrepareOptions()
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument(
        "--out", type=location, required=True, metavar="DIR", help="folder of the shards: path, s3:// or gs://"
    )
    parser.add_argument("--split", required=True, help="what to prepare, by the source's name for it")
    parser.add_argument("--strict", action="store_true", help="fail if anything is rejected")
    parser.add_argument("--shard-mib", type=float, default=defaults.shard_mib, metavar="MIB")
    parser.add_argument("--row-group-rows", type=int, default=defaults.row_group_rows, metavar="N")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the order of the images")
    parser.add_argument("--shuffle", action=yes_or_no, default=True, help="or keep the order of the image ids")
    parser.add_argument(
        "--longest-side", type=int, default=longest_side, metavar="PX", help="shrink images; 0: as they are"
    )
    parser.add_argument("--jpeg-quality", type=int, default=defaults.jpeg_quality, help="of images made smaller")
    parser.add_argument("--max-pixels", type=int, default=defaults.max_pixels, metavar="N", help="reject larger files")
    parser.add_argument("--verify", action=yes_or_no, default=True, help="decode every image to find broken ones")
    parser.add_argument("--num-cpus", type=int, metavar="N", help="of a Ray started here; default: all")


if __name__ == "__main__":
    main()
