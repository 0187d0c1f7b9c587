"""perceiver-ar serve."""

from perceiver_ar.cli.options import make_parser, parse


def serve_verb(argv: list[str]) -> None:
    parser = make_parser(
        "serve",
        "RUN",
        "Serves the model of a run: OpenAI's completions interface at /v1, and a page to write on at /.",
        "  perceiver-ar serve runs/books                           (this machine only: http://127.0.0.1:8000)\n"
        "  perceiver-ar serve runs/books --host 0.0.0.0 --api_key KEY --slots 32\n"
        "  perceiver-ar serve runs/books --config server.yaml      (`api_key: KEY` there is in no list of processes)",
    )
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="an address of this machine; one that others "
                        "can reach, such as 0.0.0.0, needs --api_key")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument("--api_key", type=str | None, help="a key that every request must send, except to /health")
    parser.add_argument("--slots", type=int, default=8, help="texts that are drawn simultaneously; others wait")
    parser.add_argument("--max_context", type=int | None, help="context length of a text in tokens; a shorter one "
                        "takes less memory (default: the model's)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="half a minute of compiling, then faster tokens")
    parser.add_argument("--precision", choices=["32", "bf16", "int8"], default="32", help="of weights and computation; "
                        "int8 (extra [int8]): int8 weights, bf16 computation, slow unless compiled")  # fmt: skip
    parser.add_argument("--device", type=str | None, help="such as cpu or cuda:1 (default: a GPU if there is one)")
    args = parse(parser, argv)

    from perceiver_ar.data.codec import importing

    with importing("serve"):
        from perceiver_ar.serving.server import serve
    options = args.as_dict()
    options.pop("config")
    serve(options.pop("run"), **options)
