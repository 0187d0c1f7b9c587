"""perceiver-ar push."""

import sys

from perceiver_ar.cli.options import make_parser, parse


def push_verb(argv: list[str]) -> None:
    parser = make_parser(
        "push",
        "RUN OWNER/NAME",
        "Uploads a run to the Hugging Face Hub: model, codec, recipe, summary and report, with a model card. The card\n"
        "is RUN/README.md; it is written unless it is there. Not uploaded are tokens, checkpoints and samples.",
        "  perceiver-ar push runs/books me/books --dry_run         (write the card, and show what would be uploaded)\n"
        "  perceiver-ar push runs/books me/books --private",
    )
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("repo_id", type=str, help="whose repository of which name")
    parser.add_argument("--private", action="store_true", help="for its owner alone")
    parser.add_argument("--dry_run", action="store_true", help="upload nothing")
    args = parse(parser, argv)

    from perceiver_ar.card import CARD, push, shared_files, write_card
    from perceiver_ar.run import Run

    run = Run.open(args.run)
    written = write_card(run, args.repo_id)
    state = "written; add a licence to its head" if written else "there already: remove it to have it written anew"
    print(f"{run.path / CARD} is {state}", file=sys.stderr)
    print("\n".join(shared_files(run)) if args.dry_run else push(run, args.repo_id, private=args.private))
