"""List, fetch, examine and convert published weights and weight files.

    dfine weights list                          names that `init` and every command take as a detector
    dfine weights fetch dfine-s-obj365          into the cache of huggingface_hub (HF_HOME), compared by SHA-256
    dfine weights verify dfine_s_coco.pth       what a file or folder holds, and whether it fits
    dfine weights convert dfine-s-coco --to released --out dfine_s_coco.pth
    dfine weights convert deim_s_coco.pth --activation silu --to safetensors --out deim_s_coco

HF_HUB_OFFLINE=1 uses the cache alone; HF_TOKEN opens gated repositories; HF_ENDPOINT names a mirror. Layouts of `convert`:
safetensors (a folder for dfine_core.load), huggingface (a folder for Transformers), released (a .pth file). Each is read back
and compared tensor by tensor; `dfine export` also compares detections.
"""

import argparse

from jobs.command import add_log_level, announce, command_parser, detector, local_path, parsed, user_errors

LAYOUTS = ("safetensors", "huggingface", "released")


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    args.run(args)


def _list(_: argparse.Namespace) -> None:
    from pipeline.pretrained import table

    print(f"{'name':20}{'AP':>7}{'MB':>7}  {'licence':12}{'classes':38}repository")
    for name, row in table().items():
        ap = "" if row.ap is None else f"{row.ap:.3f}"
        size = "" if row.size_mb is None else f"{row.size_mb:g}"
        print(f"{name:20}{ap:>7}{size:>7}  {row.licence:12}{row.classes:38}{row.repo}")
    print("AP on COCO val2017, as published; hf://ORG/NAME[@REVISION] names any other repository")


def _fetch(args: argparse.Namespace) -> None:
    from pipeline.pretrained import fetch

    announce("weights", f"fetch {args.name}: asking the hub …")
    fetched = fetch(args.name)
    print(f"{fetched.origin}, licence {fetched.published.licence}")
    print(f"{fetched.folder / fetched.files[0]}, SHA-256 {fetched.sha256}")


def _verify(args: argparse.Namespace) -> None:
    announce("weights", f"verify {args.file}: opening it …")
    from pipeline.weight_files import examine

    print("\n".join(examine(args.file)))


def _convert(args: argparse.Namespace) -> None:
    announce("weights", f"convert {args.source}: opening it …")
    from pipeline.weight_files import convert

    out = convert(args.source, args.to, args.out, args.activation)
    print(f"{out}: as {args.to}, read back and equal in every tensor")


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("weights", __doc__)
    actions = arguments.add_subparsers(dest="action", required=True, metavar="list|fetch|verify|convert")
    for name, run, text in (
        ("list", _list, "print the table of names"),
        ("fetch", _fetch, "download into the cache"),
        ("verify", _verify, "examine a file or folder"),
        ("convert", _convert, "write a detector in another layout"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(run=run)
        add_log_level(action)
        if name == "fetch":
            action.add_argument("name", type=detector, help="a name of the list, or hf://ORG/NAME[@REVISION]")
        if name == "verify":
            action.add_argument("file", type=detector, metavar="FILE", help="file, folder, URI or published name")
        if name == "convert":
            action.add_argument("source", type=detector, help="any detector: file, folder, URI or published name")
            action.add_argument("--to", choices=LAYOUTS, required=True, help="layout, see above")
            action.add_argument(
                "--activation",
                choices=("relu", "silu"),
                help="of a released file, which does not name it; DEIM's is silu",
            )
            action.add_argument("--out", type=local_path, required=True, metavar="PATH", help="folder, or .pth file")
    return arguments


if __name__ == "__main__":
    main()
