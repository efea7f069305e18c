"""The command line.

    python -m nanogen                                  the tour: ten chapters, tiny, on data made by code -> runs/tour/index.html
    python -m nanogen list                             chapters, data sets, recipes and what to expect
    python -m nanogen train maskgit --data cifar10     train a chapter, and first what it stands on
    python -m nanogen sample runs/maskgit-cifar10 --n 64 --guidance 3 --out pictures
    python -m nanogen sample runs/audio_lm-fsdd --label 3 --speaker jackson --out sounds
    python -m nanogen encode runs/codec-fsdd speech.flac --out speech.npz --kbps 2
    python -m nanogen decode runs/codec-fsdd speech.npz --out speech.wav
    python -m nanogen evaluate runs/maskgit-cifar10    metrics on held-out data
    python -m nanogen compare --minutes 5              all image paradigms, like for like -> runs/compare-cifar10/index.html
    python -m nanogen report runs/maskgit-cifar10      one HTML page: curves, samples, how each picture comes to be
    python -m nanogen bench                            speed, against the machine's own limits
"""

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path

from nanogen import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence, without the usage of every field before it."""

    def error(self, message: str):
        raise UserError(f"{message} (python -m {self.prog} --help shows what there is)")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 1 after a sentence about what the user can mend."""
    parser = Parser("nanogen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("tour", help="ten chapters, tiny (also without a command)").add_argument("--out", default="runs/tour")
    add = commands.add_parser("list", help="chapters, data sets, recipes")
    add.add_argument("--markdown", action="store_true", help="the table of recipes as it stands in README.md")
    add = commands.add_parser("train", help="train a chapter; --FIELD VALUE sets any field of its configuration", add_help=False)
    add.add_argument("chapter", nargs="?")
    add.add_argument("-h", "--help", action="store_true", help="the fields of this chapter, and what they mean")
    add.add_argument("--data", help="cifar10, scenes, fsdd, voices or a folder of your own pictures or sounds (cifar10, fsdd)")
    add.add_argument("--recipe", default="first look", help="which recipe: 'first look', 'full' or 'gpu' (list)")
    add.add_argument("--out", help="the run's folder (runs/CHAPTER-DATA)")
    add.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    add = commands.add_parser("sample", help="draw pictures or sounds from a run")
    add.add_argument("run")
    add.add_argument("--n", type=int, default=64, help="how many (64)")
    add.add_argument("--label", nargs="+", help="class names or numbers (all)")
    add.add_argument("--speaker", nargs="+", help="of sounds: names or numbers of the voices (all, in turn)")
    add.add_argument("--steps", type=int, help="steps of the sampler")
    add.add_argument("--guidance", type=float, help="1: none; 2 to 4: clearer, less varied")
    add.add_argument("--temperature", type=float, help="below 1: safer, less varied")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--out", required=True, help="folder for samples.npz, grid.png, process.gif, or .wav and spectrograms.png")
    add = commands.add_parser("encode", help="a picture or sound of your own -> tokens, by a tokenizer or a codec")
    add.add_argument("run")
    add.add_argument("file", help="PNG, JPEG, WebP or GIF; WAV, FLAC or OGG")
    add.add_argument("--out", required=True, help="the file of tokens, .npz")
    add.add_argument("--kbps", type=float, help="codec: kilobits a second (all that it has)")
    add = commands.add_parser("decode", help="tokens -> the picture or sound again")
    add.add_argument("run")
    add.add_argument("file", help="what encode wrote")
    add.add_argument("--out", required=True, help="a .png, or a .wav, .flac or .ogg")
    add = commands.add_parser("evaluate", help="metrics on held-out data")
    add.add_argument("run")
    add.add_argument("--n", type=int, default=1000, help="how many samples or test pictures (1000)")
    add.add_argument("--guidance", type=float)
    add.add_argument("--steps", type=int)
    add = commands.add_parser("compare", help="all image paradigms, like for like: a table and a page")
    add.add_argument("--data", default="cifar10", help="cifar10, scenes or a folder of your own pictures")
    add.add_argument("--minutes", type=float, default=5.0, help="of training for each method, and for each tokenizer (5)")
    add.add_argument("--n", type=int, default=500, help="samples of each method (500)")
    add.add_argument("--seeds", type=int, default=1, help="how often to draw them: the spread of FD-nano (1)")
    add.add_argument("--out", help="folder of the runs and the page (runs/compare-DATA); the same again goes on with it")
    add = commands.add_parser("report", help="one HTML page over runs")
    add.add_argument("runs", nargs="+")
    add.add_argument("--out", default="report.html")
    commands.add_parser("bench", help="speed, against the machine's own limits")
    try:
        options, rest = parser.parse_known_args(arguments)
        if rest and options.command != "train":
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        COMMANDS[options.command or "tour"](options, rest)
    except UserError as error:
        print(f"nanogen: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = {"train": "with --resume goes on", "tour": "goes on", "compare": "goes on"}.get(options.command or "tour")
        print("\nStopped." + (f" What was trained is saved; the same command {how}." if how else ""), file=sys.stderr)
        return 130
    return 0


def train_command(options, rest: list[str]) -> None:
    from nanogen.lab.runs import CHAPTERS, train_run

    if options.chapter is None:
        raise UserError("Which chapter? python -m nanogen list has them, python -m nanogen train CHAPTER --help what can be set.")
    if options.chapter not in CHAPTERS and (late := [part for part in rest if part in CHAPTERS]):  # --minutes 3 flow
        raise UserError(f"The chapter comes first: train {late[0]}, and then what is to be set.")
    fields = field_parser(options.chapter)
    if options.help:
        return fields.print_help()
    rest = [re.sub("^--[^=]+", lambda name: name[0][:2] + name[0][2:].replace("-", "_"), part) for part in rest]  # --batch-size
    overrides = vars(fields.parse_args(rest))
    run = train_run(options.chapter, options.data, overrides, options.out, options.recipe, options.resume)
    print(f"Done: {run.folder}. Next: python -m nanogen evaluate {run.folder}")


def field_parser(chapter: str) -> Parser:
    """--FIELD VALUE ... -> {field: value}, with the types of the chapter's Config and of Training; the comments are the help."""
    from nanogen.lab.runs import CHAPTERS, find_recipe, usual_data
    from nanogen.lab.train import Training

    find_recipe(chapter, usual_data(chapter))  # refuses an unknown chapter
    usage = f"python -m nanogen train {chapter} [--data DATA] [--recipe RECIPE] [--out FOLDER] [--resume] [--FIELD VALUE ...]"
    parser = Parser(f"nanogen train {chapter}", usage, add_help=False, argument_default=argparse.SUPPRESS)
    for title, config in (("the model", CHAPTERS[chapter].Config), ("training", Training)):
        group, source = parser.add_argument_group(f"{title} (recipes may say otherwise)"), inspect.getsource(config)
        for field in dataclasses.fields(config):
            kind = {bool: truth, int: int, float: float, str: str}.get(field.type, numbers)
            default = ",".join(map(str, field.default)) if kind is numbers else field.default
            comment = re.search(rf"^ +{field.name}:[^#\n]*#(.*)", source, re.MULTILINE)
            text = f"{comment[1].strip() if comment else ''} ({default})".replace("%", "%%")
            group.add_argument(f"--{field.name}", type=kind, metavar="", help=text)
    return parser


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def sample_command(options, _) -> None:
    from nanogen.lab.runs import AUDIO, load_run
    from nanogen.lab.sampling import sample

    run = load_run(options.run)
    sample(run, options.n, options.label, Path(options.out), options.seed, speakers=options.speaker, steps=options.steps,
           guidance=options.guidance, temperature=options.temperature)
    if run.chapter in AUDIO:
        print(f"{options.n} sounds: {Path(options.out)}, what they look like: {Path(options.out) / 'spectrograms.png'}")
    else:
        print(f"{options.n} pictures: {Path(options.out) / 'grid.png'}, how they came to be: {Path(options.out) / 'process.gif'}")


def encode_command(options, _) -> None:
    from nanogen.data.folders import SAMPLE_RATE
    from nanogen.lab.coding import encode
    from nanogen.lab.runs import load_run

    content = encode(load_run(options.run), Path(options.file), Path(options.out), options.kbps)
    rate = f", {content['kbps']:g} kbit/s for {content['length'] / SAMPLE_RATE:.2f} seconds" if "kbps" in content else ""
    print(f"{options.out}: tokens of shape {content['tokens'].shape}{rate}")


def decode_command(options, _) -> None:
    from nanogen.lab.coding import decode
    from nanogen.lab.runs import load_run

    decode(load_run(options.run), Path(options.file), Path(options.out))
    print(options.out)


def evaluate_command(options, _) -> None:
    from nanogen.lab.evaluate import evaluate, show
    from nanogen.lab.report import flat
    from nanogen.lab.runs import load_run

    for name, value in flat(evaluate(load_run(options.run), options.n, guidance=options.guidance, steps=options.steps)).items():
        print(f"{name:40} {show(value)}")


def compare_command(options, _) -> None:
    from nanogen.data.datasets import resolved
    from nanogen.lab.compare import compare

    out = Path(options.out or f"runs/compare-{Path(resolved(options.data)).name}")
    compare(options.data, options.minutes, out, options.n, options.seeds)


def report_command(options, _) -> None:
    from nanogen.lab.report import write

    print(write([Path(run) for run in options.runs], Path(options.out)))


def list_command(options, _) -> None:
    from nanogen.lab.tour import list_chapters, markdown

    print(markdown() if options.markdown else list_chapters())


def bench_command(_, __) -> None:
    from nanogen.lab.bench import bench

    bench()


def tour_command(options, _) -> None:
    from nanogen.lab.tour import tour

    tour(Path(getattr(options, "out", "runs/tour")))


COMMANDS = {"tour": tour_command, "list": list_command, "train": train_command, "sample": sample_command,
            "encode": encode_command, "decode": decode_command,
            "evaluate": evaluate_command, "compare": compare_command, "report": report_command, "bench": bench_command}

if __name__ == "__main__":
    sys.exit(main())
