"""GFLOPs of the deployed variants for one image of 640 x 640 pixels, compared with the published ones.

    python -m benchmarks.flops
    python -m benchmarks.flops --variants s --classes 366 --size 480

Counted operations: see `pipeline.benchmark.gflops`. The products inside attention are listed separately.
"""

import argparse

from dfine_core import ModelConfig
from pipeline.benchmark import MODEL_PARTS, gflops

PUBLISHED = {"n": 7.17, "s": 25.17, "m": 56.68, "l": 91.03, "x": 202.49}  # 80 classes, deployed, 640 x 640


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--size", type=int, default=640)
    args = parser.parse_args(argv)
    print("GFLOPs   " + "".join(f"{name:>10}" for name in (*MODEL_PARTS, "total", "published", "ratio", "attention")))
    for variant in args.variants:
        counts = gflops(ModelConfig.variant(variant, num_classes=args.classes, input_size=(args.size, args.size)))
        total = sum(counts[part] for part in MODEL_PARTS)
        columns = [*(counts[part] for part in MODEL_PARTS), total, PUBLISHED[variant]]
        row = "".join(f"{column:10.2f}" for column in columns)
        print(f"{variant:9}{row}{total / PUBLISHED[variant]:10.3f}{counts['attention']:10.2f}")


if __name__ == "__main__":
    main()
