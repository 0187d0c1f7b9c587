"""perceiver-ar convert and perceiver-ar export."""

import json
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from perceiver_ar.cli.options import make_parser, parse
from perceiver_ar.errors import require

# Settings that a checkpoint may not contain: option -> format, type, help.
CONVERT_OPTIONS: dict[str, tuple[str, Any, str]] = {
    "cross_attn_seq_len": ("lucidrains", int, "prefix length; the weights do not determine it"),
    "heads": ("lucidrains", int, "attention heads, if the weights do not determine them"),
    "settings": ("google", str, "random_mirrored_32, random_mirrored_131072, imagenet_w_positions, or a JSON file with "
                 "the arguments of their PerceiverAR"),
    "max_context_length": ("google", int, "as in their settings"),
    "z_index_dim": ("google", int, "as in their settings"),
    "num_cross_attend_heads": ("google", int, "as in their settings"),
    "num_transformer_heads": ("google", int, "as in their settings"),
    "base": ("peft", str, "the run that the adapter was trained on"),
}  # fmt: skip


def convert_verb(argv: list[str]) -> None:
    parser = make_parser(
        "convert",
        "lucidrains|krasserm|google|peft CHECKPOINT --out RUN",
        "Makes a run from a checkpoint of perceiver-ar-pytorch (lucidrains), perceiver-io (krasserm) or\n"
        "google-research/perceiver-ar (google), or from a run and a PEFT adapter (peft). No code in a checkpoint runs.",
        "  perceiver-ar convert krasserm perceiver-ar-clm-base/ --out runs/clm       (a Hugging Face directory)\n"
        "  perceiver-ar convert krasserm epoch=1.ckpt --out runs/clm                 (a Lightning checkpoint)\n"
        "  perceiver-ar convert lucidrains model.pt --cross_attn_seq_len 3072 --heads 8 --out runs/enwik8\n"
        "  perceiver-ar convert google checkpoint.dill --settings random_mirrored_131072 --out runs/copy\n"
        "  perceiver-ar convert peft runs/letters/adapter --base runs/books --out runs/merged",
    )
    formats = ["lucidrains", "krasserm", "google", "peft"]
    parser.add_argument("format", choices=formats, help="the implementation that wrote it")
    parser.add_argument("checkpoint", type=str, help="a file or a directory, as that implementation writes it")
    parser.add_argument("--out", type=str, required=True, help="the run directory to make")
    for name, (form, kind, text) in CONVERT_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind | None, help=f"{form}: {text}")
    args = parse(parser, argv)
    for name, (form, _, _) in CONVERT_OPTIONS.items():
        require(args.format == form or args[name] is None, f"--{name} is no option of {args.format}: leave it out")
    own = {name: args[name] for name, (form, _, _) in CONVERT_OPTIONS.items() if form == args.format}

    from perceiver_ar.compat.weights import LeftOut
    from perceiver_ar.data.codec_file import save_codec
    from perceiver_ar.files import atomic_directory
    from perceiver_ar.run import Run

    require(not Run(args.out).is_taken(), f"--out {args.out} is there already: choose another place, or remove it")
    module = "perceiver_ar.adapters" if args.format == "peft" else f"perceiver_ar.compat.{args.format}"
    read = import_module(module).read
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always", LeftOut)
        model, codec = read(Path(args.checkpoint), **own)
    for notice in notices:
        print(notice.message, file=sys.stderr)
    with atomic_directory(args.out) as directory:
        model.save_pretrained(directory)
        if codec is not None:
            save_codec(codec, directory)
    if codec is None:
        print("the checkpoint does not say what its ids stand for: evaluate and generate need a codec.json in the run; "
              "info and Python work without it", file=sys.stderr)  # fmt: skip
    facts = {"run": args.out, "parameters": model.num_parameters(), "codec": None if codec is None else codec.name}
    print(json.dumps(facts))


def export_verb(argv: list[str]) -> None:
    parser = make_parser(
        "export",
        "huggingface|lucidrains|krasserm|onnx RUN --out PATH",
        "Writes a run's model for other programs.\n"
        "huggingface: a directory with weights, settings, tokenizer and code. transformers loads it with\n"
        "trust_remote_code=True, without this package; it is still a run. (With this package, transformers loads the\n"
        "run itself, after `import perceiver_ar.huggingface`.)\n"
        "lucidrains: a torch.save file for perceiver-ar-pytorch. krasserm: a Hugging Face directory for perceiver-io.\n"
        "Both print the arguments or settings to load it with, and work only for models that these packages can\n"
        "compute, such as those trained with --preset lucidrains or --preset krasserm.\n"
        "onnx: a directory for runtimes without PyTorch: scoring, and generation step by step.",
        "  perceiver-ar export huggingface runs/books --out books-for-transformers/\n"
        "  perceiver-ar export krasserm runs/clm --out clm-for-perceiver-io/\n"
        "  perceiver-ar export lucidrains runs/enwik8 --out model.pt\n"
        "  perceiver-ar export onnx runs/books --out books-onnx/",
    )
    formats = ["huggingface", "lucidrains", "krasserm", "onnx"]
    parser.add_argument("format", choices=formats, help="the program to write for")
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("--out", type=str, required=True, help="the file or directory to write")
    args = parse(parser, argv)

    from perceiver_ar import compat
    from perceiver_ar.data.codec import importing
    from perceiver_ar.data.codec_file import save_codec
    from perceiver_ar.files import atomic_directory, write_text
    from perceiver_ar.onnx import export_onnx
    from perceiver_ar.run import Run

    run = Run.open(args.run)
    require(not Run(args.out).is_taken(), f"--out {args.out} is there already: choose another place, or remove it")
    model = run.model()
    if args.format == "lucidrains":
        about: Any = compat.save_lucidrains(model, args.out)
    else:
        with atomic_directory(args.out) as directory:
            if args.format == "krasserm":
                about = compat.save_krasserm(model, directory, run.codec_if_any())
            elif args.format == "huggingface":
                with importing("hf"):
                    from perceiver_ar import huggingface
                codec = run.codec_if_any()
                huggingface.export(huggingface.PerceiverARForCausalLM.from_pretrained(run.path), codec, directory)
                files = sorted(file.name for file in directory.iterdir())
                about = {"files": files, "codec": None if codec is None else codec.name}
            else:
                about = export_onnx(model, directory)
                write_text(directory / "config.json", model.config.to_json())
                if (codec := run.codec_if_any()) is not None:
                    save_codec(codec, directory)
    print(json.dumps(about, indent=2))
