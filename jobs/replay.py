"""Replay a step that was skipped because its loss or gradient was not finite.

    dfine replay runs/mine/non_finite/step-00000123
    dfine replay runs/mine/non_finite/step-00000123 --precision fp16

Each image of the step passes through the saved weights alone, forward and backward. The output names the image that is not
finite, the loss term, and the first module. Try fp32 as well as the precision of the training: an error in fp16 alone is an
overflow.
"""

import argparse

from jobs.command import announce, command_parser, location, parsed, refuse_missing, user_errors


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.folder, "saved step")
    announce("replay", f"{args.folder}: opening the step …")
    import torch

    from pipeline.training.replay import replay

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bad = total = 0
    for finding in replay(args.folder, precision=args.precision, device=device):
        print(f"worker {finding.rank}, micro-batch {finding.micro_batch}, {finding}", flush=True)
        bad, total = bad + (not finding.finite), total + 1
    print(f"{bad} of {total} images are not finite on their own in {args.precision}")
    if not bad:
        print("none alone: try the precision of the training; effects of batch norms between images are not replayed")


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("replay", __doc__)
    arguments.add_argument(
        "folder", type=location, help="folder of the step, printed by the training when it was skipped"
    )
    arguments.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    return arguments


if __name__ == "__main__":
    main()
