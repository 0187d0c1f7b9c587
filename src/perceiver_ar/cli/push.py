"""perceiver-ar push."""

import sys

from perceiver_ar.cli.options import make_parser, parse


def push_verb(argv: list[str]) -> None:
    parser = make_parser(
        "push",
        "RUN OWNER/NAME",
        "Uploads a run to the Hugging Face Hub: model, codec, recipe, summary, report and a model card. The card is\n"
        "RUN/README.md, written if it is missing. Tokens, checkpoints and samples are not uploaded.",
        "  perceiver-ar push runs/books me/books --dry_run         (write the card, and show what would be uploaded)\n"
        "  perceiver-ar push runs/books me/books --private",
    )
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("repo_id", type=str, help="the repository on the Hub")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--dry_run", action="store_true", help="write the card and list the files; upload nothing")
    args = parse(parser, argv)

    from perceiver_ar.card import CARD, push, shared_files, write_card
    from perceiver_ar.run import Run

    run = Run.open(args.run)
    written = write_card(run, args.repo_id)
    state = "written; add a licence to its head" if written else "kept as it was: remove it to get a new one"
    print(f"{run.path / CARD} is {state}", file=sys.stderr)
    print("\n".join(shared_files(run)) if args.dry_run else push(run, args.repo_id, private=args.private))
