"""GFLOPs of the deployed variants at 640 x 640, one image, beside the published ones.

    python -m benchmarks.flops
    python -m benchmarks.flops --variants s --classes 366 --size 480

What is counted: a multiply-add as two operations, of convolutions and linear layers. This is the convention of the published
numbers. The products inside attention are listed apart. Norms, activations, softmax and the sampling of deformable
attention are not counted by either.
"""

import argparse

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dfine_core import Detector, ModelConfig

PUBLISHED = {"n": 7.17, "s": 25.17, "m": 56.68, "l": 91.03, "x": 202.49}  # 80 classes, deployed, 640 x 640
PARTS = ("backbone", "encoder", "decoder")


@torch.no_grad()
def gflops(config: ModelConfig) -> dict[str, float]:
    """Of one image: convolutions and linear layers of each part, and the products inside attention."""
    detector = Detector(config).deploy()
    counter = FlopCounterMode(display=False, depth=2)
    # The plain implementation makes attention of two batched products, which the counter sees on every device.
    with counter, sdpa_kernel(SDPBackend.MATH):
        detector(torch.zeros(1, 3, *config.input_size))
    counts = {
        module: {str(operator).removeprefix("aten."): n / 1e9 for operator, n in operators.items()}
        for module, operators in counter.get_flop_counts().items()
    }
    spent = {part: counts[f"Detector.{part}"] for part in PARTS}
    return {part: sum(n for operator, n in spent[part].items() if operator != "bmm") for part in PARTS} | {
        "attention": sum(operators.get("bmm", 0.0) for operators in spent.values())
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--size", type=int, default=640)
    args = parser.parse_args(argv)
    print("GFLOPs   " + "".join(f"{name:>10}" for name in (*PARTS, "total", "published", "ratio", "attention")))
    for variant in args.variants:
        found = gflops(ModelConfig.variant(variant, num_classes=args.classes, input_size=(args.size, args.size)))
        total = sum(found[part] for part in PARTS)
        columns = [*(found[part] for part in PARTS), total, PUBLISHED[variant]]
        row = "".join(f"{column:10.2f}" for column in columns)
        print(f"{variant:9}{row}{total / PUBLISHED[variant]:10.3f}{found['attention']:10.2f}")


if __name__ == "__main__":
    main()
