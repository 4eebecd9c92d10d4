"""Turn a detection data set into shards: Parquet files of encoded images, and one manifest.

    dfine prepare coco /data/coco --split train2017 --out /shards/coco/train2017
    dfine prepare coco --images DIR --annotations FILE.json --split train --out s3://bucket/mine/train
    dfine prepare objects365 /data/objects365 --split train --out /shards/objects365/train
    dfine prepare voc /data/VOC2012 --split train --out /shards/voc/train
    dfine prepare yolo /data/mine/data.yaml --split train --out /shards/mine/train
    dfine prepare auto /data/export --out /shards/mine
    dfine prepare auto /data/export --split train --split-off val=0.2 --out /shards/mine
    dfine prepare yolo /data/aerial --split train --tile 640 --overlap 0.2 --out /shards/aerial/train
    dfine prepare coco /data/mine --split train --pseudo found --score 0.6 --ignore 0.3 --out /shards/mine/train
    dfine prepare synthetic --images 2000 --split train --out /tmp/shapes/train
    dfine prepare teacher /shards/mine/train --results /found/large --out /shards/mine/train-teacher

One command writes one split into one folder; `auto` and --split-off write one folder for each split. The same
command again resumes an interrupted preparation. Rejected images and boxes are listed with the reason in rejected.parquet.
`teacher` joins detections of another detector (COCO results, or the folder of a `dfine predict`) with a finished shard set.
Paths must be readable from every node of the cluster; without RAY_ADDRESS the command starts Ray on this machine, and a
submitted job uses its cluster.
"""

import argparse
from typing import TYPE_CHECKING

from jobs.command import (
    add_log_level,
    add_tiles,
    announce,
    command_parser,
    local_path,
    location,
    parsed,
    share,
    tiling,
    user_errors,
)
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.prepare.pseudo_labels import PseudoLabels
    from pipeline.data.prepare.shard_writer import PrepareOptions
    from pipeline.data.prepare.tiled_records import TileRule
    from pipeline.data.sources.index import DatasetSource

OBJECTS365_VAL_IMAGES = 5000
PSEUDO_SCORE, PSEUDO_IGNORE = 0.6, 0.3
OBJECTS365_LONGEST_SIDE = 640  # px


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    if args.source == "teacher":
        join_teacher(args)
    else:
        prepare_shards(args)


def join_teacher(args: argparse.Namespace) -> None:
    """Write the boxes of teachers that the arguments describe."""
    announce("prepare", f"{args.shards}: joining {len(args.results)} results …")
    from pipeline.data.prepare.teacher_boxes import prepare_teacher_boxes
    from pipeline.data.shards.manifest import load_shards
    from pipeline.wording import plural

    shards = load_shards(args.shards)
    given = {"images": args.images, "bonus": args.bonus, "min_score": args.min_score, "max_boxes": args.max_boxes}
    manifest = prepare_teacher_boxes(
        shards, args.results, args.out, **{name: value for name, value in given.items() if value is not None}
    )
    read = sum(int(str(source["detections"])) for source in manifest.sources)
    print(
        f"{args.out}: {plural(manifest.boxes, 'box')} of a teacher for {manifest.images} of"
        f" {plural(shards.manifest.images, 'image')}, digest {manifest.digest}\nleft out: {read - manifest.boxes:,} of {read:,}"
        " detections, as weak, beyond the best of an image, outside of it, or of images that the set does not have"
    )
    print(f"to train with them: --set teacher.boxes.folder={args.out}")


def prepare_shards(args: argparse.Namespace) -> None:
    """Write the shard sets that the arguments describe."""
    announce("prepare", f"{args.source}: reading the annotations …")
    from pipeline.data.prepare.shard_writer import PrepareOptions

    # 1. Check the options, and find the sources.
    options = PrepareOptions(
        shard_mib=args.shard_mib,
        row_group_rows=args.row_group_rows,
        shuffle=args.shuffle,
        seed=args.seed,
        longest_side=args.longest_side or None,
        jpeg_quality=args.jpeg_quality,
        **({} if args.max_pixels is None else {"max_pixels": args.max_pixels}),
        verify=args.verify,
        exif=args.exif,
        tiles=_tile_rule(args),
        weights=args.pseudo is not None,
    )
    parts = _parts(args)

    # 2. Write the shards, on Ray.
    from pipeline.ray_cluster import start_ray

    start_ray(args.num_cpus)
    for split, source, out in parts:
        _prepare_one(split, source, out, options, strict=args.strict)


def _tile_rule(args: argparse.Namespace) -> "TileRule | None":
    from pipeline.data.prepare.tiled_records import TileRule

    cut = tiling(args)
    if cut is None and args.empty_tiles is not None:
        raise UserError(f"--empty-tiles {args.empty_tiles:g}: there are no tiles without --tile, such as --tile 640")
    if cut is None:
        return None
    empty = {} if args.empty_tiles is None else {"empty": args.empty_tiles}
    return TileRule(side=cut.side, overlap=cut.overlap, **empty)


def _pseudo_labels(args: argparse.Namespace) -> "PseudoLabels | None":
    from pipeline.data.prepare.pseudo_labels import PseudoLabels

    given = {"--score": args.score, "--ignore": args.ignore, "--pseudo-images": args.pseudo_images}
    alone = [option for option, value in given.items() if value is not None]
    if args.pseudo is None:
        if alone:
            raise UserError(f"{', '.join(alone)}: there are no labels of a teacher without --pseudo RESULTS")
        return None
    if args.split_off is not None:
        raise UserError(
            "--pseudo with --split-off: the part that is split off would be measured by the teacher's labels; prepare the parts"
            " first, and give --pseudo for the one to train on"
        )
    score = PSEUDO_SCORE if args.score is None else args.score
    ignore = min(PSEUDO_IGNORE, score) if args.ignore is None else args.ignore
    return PseudoLabels(args.pseudo, args.pseudo_images, score, ignore)


def _parts(args: argparse.Namespace) -> "list[tuple[str, DatasetSource, str]]":
    """Every shard set to write: its split, its source and its folder."""
    if args.source == "auto":
        from pipeline.data.sources.detect import find_source

        found = find_source(args.root)
        print(f"{args.root} is {found.text}; splits: {', '.join(found.splits)}", flush=True)
        if args.split is not None and args.split not in found.splits:
            raise UserError(f"--split {args.split}: the splits are {', '.join(found.splits)}")
        sources = {name: make() for name, make in found.splits.items() if args.split in (None, name)}
        parts = [(name, source, args.out if args.split else f"{args.out}/{name}") for name, source in sources.items()]
    else:
        parts = [(args.split, _source(args), args.out)]
    if (pseudo := _pseudo_labels(args)) is not None:
        from pipeline.data.prepare.pseudo_labels import with_pseudo_labels

        if len(parts) > 1:
            raise UserError(
                f"--pseudo: name the split to label, {' or '.join(name for name, *_ in parts)}, with --split"
            )
        return [(split, with_pseudo_labels(source, pseudo), out) for split, source, out in parts]
    if args.split_off is None:
        return parts
    from pipeline.data.prepare.split_off import SplitOff, split_off

    if len(parts) > 1:
        raise UserError(
            f"--split-off: there are {', '.join(name for name, *_ in parts)} already; name one with --split"
        )
    ((split, source, _),) = parts
    part = SplitOff.parse(args.split_off)
    rest, taken = split_off(source, part, split=split, seed=args.seed)
    return [(split, rest, f"{args.out}/{split}"), (part.name, taken, f"{args.out}/{part.name}")]


def _prepare_one(split: str, source: "DatasetSource", out: str, options: "PrepareOptions", *, strict: bool) -> None:
    from pipeline.data.doctor.findings import FINDING_KINDS
    from pipeline.data.prepare.prepare import prepare, read_rejected, reasons
    from pipeline.data.shards.classes import repeated_names
    from pipeline.data.shards.manifest import Notice, merge_notices
    from pipeline.wording import plural

    shards = prepare(source, out, split=split, options=options, strict=strict, report=print)
    manifest, rejected = shards.manifest, read_rejected(shards)
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    images, boxes = plural(manifest.images, "image"), plural(manifest.boxes, "box")
    print(f"{shards.uri}: {images}, {boxes} of {plural(len(manifest.categories), 'class')}")
    print(f"{plural(len(manifest.shards), 'shard')}, {megabytes:.1f} MB, digest {manifest.digest}")
    print(f"rejected: {reasons(rejected)}, see rejected.parquet" if rejected else "rejected: nothing")
    repeated = [
        Notice(code="class-name-repeated", count=1, example=text) for text in repeated_names(manifest.categories)
    ]
    for notice in merge_notices([*manifest.notices, *repeated]):
        kind = FINDING_KINDS[notice.code]
        print(
            f"{kind.severity}: {plural(notice.count, kind.unit)}, such as {notice.example}: {kind.meaning} {kind.advice}"
        )


def _source(args: argparse.Namespace) -> "DatasetSource":
    from pipeline.data.sources import objects365
    from pipeline.data.sources.coco import coco_source
    from pipeline.data.sources.detect import coco_in_folder
    from pipeline.data.sources.index import SourceError
    from pipeline.data.sources.synthetic import synthetic_source
    from pipeline.data.sources.voc import voc_source
    from pipeline.data.sources.yolo import yolo_source

    match args.source:
        case "coco":
            if args.root is None and (args.images is None or args.annotations is None):
                raise SourceError("coco needs its folder, or both --images and --annotations")
            if args.images is None and args.annotations is None:
                return coco_in_folder(args.root, args.split)
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
    """Parser of the arguments."""
    arguments = command_parser("prepare", __doc__)
    sources = arguments.add_subparsers(dest="source", required=True, metavar="SOURCE")

    auto = sources.add_parser(
        "auto", help="a folder whose format is recognised: COCO, YOLO or VOC, as tools write them"
    )
    auto.add_argument("root", type=local_path, help="folder of an export; its layout is recognised")
    _add_common(auto, split_required=False)

    coco = sources.add_parser("coco", help="a folder of images and an instances json")
    coco.add_argument("root", nargs="?", type=location, help="folder with SPLIT/ and annotations/instances_SPLIT.json")
    coco.add_argument("--images", type=location, metavar="DIR", help="instead of ROOT: the folder of the images")
    coco.add_argument("--annotations", type=location, metavar="FILE", help="and the json of their annotations")
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
        "--val-images",
        type=int,
        default=OBJECTS365_VAL_IMAGES,
        metavar="N",
        help="images of the validation split; the others are trained on",
    )
    _add_common(o365, longest_side=OBJECTS365_LONGEST_SIDE)

    voc = sources.add_parser("voc", help="XML files, in the folders of VOC or beside the images")
    voc.add_argument("root", type=local_path)
    voc.add_argument(
        "--classes",
        nargs="+",
        default=(),
        metavar="NAME",
        help="classes in their order; default: all that occur, sorted",
    )
    voc.add_argument("--zero-based", action="store_true", help="coordinates in the XML start at 0, not at 1")
    _add_common(voc)

    yolo = sources.add_parser("yolo", help="a data.yaml with images and txt labels")
    yolo.add_argument("data_yaml", type=local_path, help="the data.yaml, or its folder")
    _add_common(yolo)

    synthetic = sources.add_parser("synthetic", help="generated images of shapes, no files needed")
    synthetic.add_argument("--images", type=int, required=True, metavar="N")
    synthetic.add_argument(
        "--draw-seed", type=int, default=0, help="seed of the images; take another one for another split"
    )
    synthetic.add_argument("--image-side", type=int, default=320, metavar="PX", help="the longer side")
    synthetic.add_argument("--max-shapes", type=int, default=12, metavar="N")
    synthetic.add_argument(
        "--classes",
        nargs="+",
        default=(),
        metavar="SHAPE[=NAME]",
        help="shapes to annotate, and the names of their classes",
    )
    _add_common(synthetic)

    teacher = sources.add_parser("teacher", help="detections of another detector, for a shard set that exists")
    teacher.add_argument("shards", type=location, help="shard set to train on")
    teacher.add_argument(
        "--results",
        nargs="+",
        type=location,
        required=True,
        metavar="FILE",
        help="COCO results or folders of `dfine predict`, one for each teacher",
    )
    teacher.add_argument(
        "--images", type=location, metavar="FILE", help="images that the ids of plain results belong to, if others"
    )
    teacher.add_argument("--min-score", type=float, metavar="P", help="leave out boxes below it; default: 0.05")
    teacher.add_argument("--max-boxes", type=int, metavar="N", help="per image and teacher, best first; default: 50")
    teacher.add_argument(
        "--bonus", nargs="+", type=float, metavar="A", help="added to each teacher's scores where they are ranked"
    )
    teacher.add_argument("--out", type=location, required=True, metavar="DIR", help="folder of the boxes")
    add_log_level(teacher)
    return arguments


def _add_common(parser: argparse.ArgumentParser, longest_side: int = 0, *, split_required: bool = True) -> None:
    """Options of every source; not a parent parser, since subparsers would share its defaults."""
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument(
        "--out", type=location, required=True, metavar="DIR", help="folder of the shards: path, s3:// or gs://"
    )
    parser.add_argument(
        "--split",
        required=split_required,
        help="split to prepare, by the source's name for it"
        + ("" if split_required else "; default: all, each into DIR/SPLIT"),
    )
    parser.add_argument(
        "--split-off",
        metavar="NAME=SHARE",
        help="split a share of the images off, such as val=0.2, near-duplicates together; writes DIR/SPLIT and DIR/NAME",
    )
    parser.add_argument("--strict", action="store_true", help="fail if anything is rejected")
    parser.add_argument("--shard-mib", type=float, default=128.0, metavar="MIB")
    parser.add_argument("--row-group-rows", type=int, default=32, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the images")
    parser.add_argument(
        "--shuffle", action=yes_or_no, default=True, help="shuffle the images, or keep the order of their ids"
    )
    parser.add_argument(
        "--longest-side", type=int, default=longest_side, metavar="PX", help="shrink larger images to this; 0: never"
    )
    parser.add_argument("--jpeg-quality", type=int, default=75, help="quality of images made smaller")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="reject larger files; default: 89 million")
    parser.add_argument("--verify", action=yes_or_no, default=True, help="decode every image to find broken ones")
    parser.add_argument(
        "--exif",
        choices=("upright", "ignore"),
        default="upright",
        help="turn images upright by their EXIF orientation, as labelling tools show them, or take the stored pixels",
    )
    parser.add_argument(
        "--pseudo",
        type=location,
        metavar="RESULTS",
        help="label images without boxes by a teacher: COCO results, or the folder of a `dfine predict --threshold` IGNORE",
    )
    parser.add_argument(
        "--score", type=share, metavar="P", help=f"least score of a teacher's label (with --pseudo; {PSEUDO_SCORE:g})"
    )
    parser.add_argument(
        "--ignore",
        type=share,
        metavar="P",
        help=f"ignore detections from here to --score (with --pseudo; {PSEUDO_IGNORE:g})",
    )
    parser.add_argument(
        "--pseudo-images",
        type=location,
        metavar="FILE",
        help="images that the ids of plain results belong to, if others (with --pseudo)",
    )
    add_tiles(parser, "boxes are cut with them")
    parser.add_argument(
        "--empty-tiles",
        type=share,
        metavar="SHARE",
        help="keep this share of the tiles without boxes, drawn by seed (with --tile; 1). Validation needs all",
    )
    parser.add_argument("--num-cpus", type=int, metavar="N", help="CPUs of a Ray started here; default: all")
    add_log_level(parser)


if __name__ == "__main__":
    main()
