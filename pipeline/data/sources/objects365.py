"""Objects365 source in its `patchN` folders, split as D-FINE splits it.

The validation set is the first 5,000 images of the released one, in file order. The training set is the rest of those and all
released training images. The two released files number their images independently, so `VAL_ID_OFFSET` is added to the ids of
the validation file: an id is unique over both splits and still shows the original one.

Some images are known to be missing or damaged; they are listed in `rejected.parquet` like any other.
"""

import posixpath
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from pydantic import JsonValue

from pipeline import storage
from pipeline.data.shards.manifest import Category
from pipeline.data.sources.coco import Reject, file_sha256, image_names, read_boxes, read_categories, read_image_entries
from pipeline.data.sources.index import AnnotationIndex, DatasetSource, ImageEntry, SourceError

VAL_IMAGES = 5000
VAL_ID_OFFSET = 10**9
LONGEST_SIDE = 640  # px, of the images that the released models were trained on

# Folder layouts in use for `images/v1/patch8/objects365_v1_00420917.jpg` of the "train" or "val" file.
LAYOUTS = (
    "{part}/{file_name}",
    "{part}/{patch}/{name}",
    "images/{part}/{patch}/{name}",
    "images/{part}/{name}",
    "{part}/{name}",
    "{file_name}",
)
PROBES = 32  # images probed to detect the layout


def objects365_source(
    root: str, split: str, *, train_json: str | None = None, val_json: str | None = None, val_images: int = VAL_IMAGES
) -> DatasetSource:
    """Source of the new training or validation set.

    Args:
        root: folder of the data set, path or URI.
        split: "train" or "val".
        train_json, val_json: the released annotations; by default root/annotations/zhiyuan_objv2_{train,val}.json.
        val_images: number of images of the released validation set that form the new one.
    """
    root = storage.absolute(root)
    if split not in ("train", "val"):
        raise SourceError(f"split is {split!r}; Objects365 has train and val")
    files = {"val": val_json or storage.join(root, "annotations", "zhiyuan_objv2_val.json")}
    if split == "train":
        files["train"] = train_json or storage.join(root, "annotations", "zhiyuan_objv2_train.json")

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        categories = read_categories(files["val"])
        validation = {entry.image_id for entry in islice(_image_entries(root, "val", files["val"]), val_images)}
        first, last = (0, val_images) if split == "val" else (val_images, None)
        index.add_images(islice(_image_entries(root, "val", files["val"], index.reject), first, last))
        index.add_boxes(
            read_boxes(
                files["val"],
                categories,
                index,
                selects=lambda image_id: (image_id + VAL_ID_OFFSET in validation) == (split == "val"),
                id_offset=VAL_ID_OFFSET,
            )
        )
        if split == "train":
            if read_categories(files["train"]) != categories:
                raise SourceError(f"{files['train']} and {files['val']} have different categories")
            index.add_images(_image_entries(root, "train", files["train"], index.reject))
            index.add_boxes(read_boxes(files["train"], categories, index))
        return categories

    description: dict[str, JsonValue] = {
        "kind": "objects365",
        "val_images": val_images,
        **{f"{part}_annotations": posixpath.basename(path) for part, path in files.items()},
        **{f"{part}_annotations_sha256": file_sha256(path) for part, path in files.items()},
    }
    return DatasetSource(description, fill)


def _image_entries(root: str, part: str, annotations: str, reject: Reject = lambda _: None) -> Iterator[ImageEntry]:
    """Read the images of a released file, with their final ids and paths."""
    offset = VAL_ID_OFFSET if part == "val" else 0
    for entry in read_image_entries(annotations, _locator(root, part, annotations), offset, reject=reject):
        if not offset <= entry.image_id < offset + VAL_ID_OFFSET:
            raise SourceError(f"{annotations}: image id {entry.image_id - offset} is not in 0..{VAL_ID_OFFSET - 1}")
        yield entry


def _locator(root: str, part: str, annotations: str) -> Callable[[str], str | None]:
    """Return the function from file name to path that finds most of the first images.

    Raises:
        SourceError: no known layout finds any.
    """
    names = list(islice(image_names(annotations), PROBES))

    def hits(layout: str) -> int:
        return sum(storage.exists(_path(root, part, layout, name)) for name in names)

    best = max(LAYOUTS, key=hits)
    if names and not hits(best):
        tried = "".join(f"\n  {_path(root, part, layout, names[0])}" for layout in LAYOUTS)
        raise SourceError(f"{annotations}: none of its first {len(names)} images exists; tried{tried}")
    return partial(_located, root, part, best)


def _located(root: str, part: str, layout: str, file_name: str) -> str | None:
    return _path(root, part, layout, file_name) if storage.stays_inside(file_name) else None


def _path(root: str, part: str, layout: str, file_name: str) -> str:
    patch, _, name = file_name.rpartition("/")
    return storage.join(root, layout.format(part=part, file_name=file_name, patch=posixpath.basename(patch), name=name))
