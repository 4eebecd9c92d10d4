"""Look into a step that was skipped because its loss or gradient was not finite.

    python -m jobs.replay runs/mine/non_finite/step-00000123
    python -m jobs.replay runs/mine/non_finite/step-00000123 --precision fp16

Every image of the step goes through the kept weights alone, forward and backward: which one breaks, in which term of the
loss, in which module first. Try fp32 as well as the precision of the training: what breaks in fp16 alone is an overflow.
"""

import argparse

import torch

from jobs.command import location, user_errors
from pipeline.training.replay import replay


@user_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=location, help="that the training named when it skipped the step")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bad = total = 0
    for finding in replay(args.folder, precision=args.precision, device=device):
        print(f"worker {finding.rank}, micro-batch {finding.micro_batch}, {finding}", flush=True)
        bad, total = bad + (not finding.finite), total + 1
    print(f"{bad} of {total} images are not finite on their own in {args.precision}")
    if not bad:
        print(
            "none alone: try the precision of the training; batch norms also see images together, which is not repeated here"
        )


if __name__ == "__main__":
    main()
