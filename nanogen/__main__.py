"""The command line.

    nanogen                                  the tour: all methods, tiny -> runs/tour/index.html
    nanogen list                             methods, data sets, recipes and what to expect
    nanogen train maskgit --data cifar10     train a method, and first what it requires
    nanogen sample runs/maskgit-cifar10 --label horse --guidance 3
    nanogen sample runs/audio_lm-fsdd --label 3 --speaker jackson --out sounds
    nanogen encode runs/codec-fsdd speech.flac --out speech.npz --kbps 2
    nanogen decode runs/codec-fsdd speech.npz --out speech.wav
    nanogen dub runs/speech-recordings my.wav --language german --out dubbed.wav
    nanogen evaluate runs/maskgit-cifar10    metrics on held-out data
    nanogen compare --minutes 5              methods that draw a class, at one budget: a page
    nanogen report runs/maskgit-cifar10      one HTML page: curves, samples, metrics

`python -m nanogen` is the same. COMMAND --help shows the options of a command.
"""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import os
import re
import sys
from pathlib import Path

from nanogen import UserError, __version__
from nanogen.method import METHODS, Method, find


class Misuse(UserError):
    """Arguments that do not exist or do not fit: exit code 2, as usual for command lines."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence, with the nearest name where one is misspelt."""

    def error(self, message: str):
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += suggestion(found[1], re.findall(r"[\w-]+", found[2]))
        raise Misuse(f"{message} ({self.prog} --help shows what there is)")


def suggestion(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0; 1 after a sentence about what the user can mend; 2
    for arguments that do not exist; 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments and arguments[0] in COMMANDS else "tour"
    if hasattr(sys.stdout, "reconfigure"):  # names of folders that a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        parser, command = build_parser(name)
        if device := peek(arguments, "device")[0].device:
            os.environ["NANOGEN_DEVICE"] = device  # before a run is loaded for its options
        if name in DYNAMIC:
            arguments = DYNAMIC[name](command, arguments)
        arguments = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), part)
                     for part in arguments]  # --batch_size is --batch-size
        options, rest = parser.parse_known_args(arguments)
        if rest:
            near = suggestion(rest[0].partition("=")[0], command._option_string_actions)
            command.error(f"unrecognized arguments: {' '.join(rest)}{near}")
        COMMANDS[name][0](options)
        sys.stdout.flush()
    except BrokenPipeError:  # `nanogen list | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except UserError as error:
        print(f"nanogen: {error}", file=sys.stderr)
        return 2 if isinstance(error, Misuse) else 1
    except KeyboardInterrupt:
        how = {"train": "with --resume goes on", "tour": "goes on", "compare": "goes on"}
        kept = f" What was trained is saved; the same command {how[name]}." if name in how else ""
        print(f"\nStopped.{kept}", file=sys.stderr)
        return 130
    return 0


def build_parser(name: str) -> tuple[Parser, Parser]:
    """The parser of everything, and the one of the command `name` within it."""
    parser = Parser("nanogen", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", action="version", version=f"nanogen {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command, (_, text, *options) in COMMANDS.items():
        added = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        for flag, text, settings in options:
            added.add_argument(flag, help=text, **settings)
        added.add_argument("--device", help="cpu, cuda or mps (the fastest that is there)")
    return parser, commands.choices[name]


# ---- options that depend on the method or on the run

def peek(arguments: list[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """The values of these options, before the others are known, and the arguments without them."""
    scratch = Parser("nanogen", add_help=False, allow_abbrev=False)
    for name in names:
        scratch.add_argument(f"--{name}")
    return scratch.parse_known_args(arguments)


def train_options(command: Parser, arguments: list[str]) -> list[str]:
    """An option for each field of the method's Config and of Training, with the recipe's values.
    The help is the comment behind the field in the source, so it is written once."""
    some, rest = peek(arguments[1:], "data", "recipe", "out")
    method = next((part for part in rest if part in METHODS), None)
    if method is None:
        return arguments
    from nanogen.data.datasets import kind_of

    module = find(method)
    data = some.data or ("fsdd" if module.Model.data == "sounds" else "cifar10")
    kind = kind_of(data) or module.Model.data
    recipe = lab("recipes").find_recipe(method, data, kind, some.recipe or "default")
    command.usage = f"nanogen train {method} [--data D] [--recipe R] [--out DIR] [--FIELD VALUE]"
    for config, part in ((module.Config, "config"), (lab("train").Training, "training")):
        group, source = command.add_argument_group(part), inspect.getsource(config)
        for field in dataclasses.fields(config):
            value = recipe[part].get(field.name, field.default)
            shown = ",".join(map(str, value)) if isinstance(value, tuple | list) else value
            comment = re.search(rf"^ +{field.name}:[^#\n]*#(.*)", source, re.MULTILINE)
            add_option(group, field.name, field.type, f"{comment[1].strip()} ({shown})")
    return arguments


def run_options(command: Parser, arguments: list[str]) -> list[str]:
    """Find the run, wherever its folder stands; its conditions and sampler settings are options."""
    _, rest = peek(arguments[1:], "n", "seed", "out", "device", "data")
    folder = next((part for part in rest if (Path(part) / "config.json").is_file()), None)
    folder = folder or next((part for part in rest if not part.startswith("-")), None)
    if folder is None:
        if not {"-h", "--help"} & set(rest):
            command.error("Which run? Give its folder")
        return arguments
    run = lab("runs").load_run(folder)
    command.set_defaults(run=run, settings=[], conditions={})
    if run.model.kind == "generator":
        group = command.add_argument_group("conditions and settings of the sampler")
        conditions = run.model.conditions if arguments[0] == "sample" else {}
        settings = lab("sample").sampler_settings(run.model)
        command.set_defaults(settings=list(settings), conditions=conditions)
        for name, kind in conditions.items():
            text = {"class": "names or numbers (all)", "text": "texts",
                    "optional text": "texts"}.get(kind, "files")
            group.add_argument(f"--{name.removesuffix('s')}", nargs="+", dest=name, help=text)
        if arguments[0] == "sample" and type(run.model).known_part is not Method.known_part:
            group.add_argument("--known", nargs="+", help="files of which a part stays")
            if run.model.data == "sounds":
                group.add_argument("--keep", type=float, help="so many seconds stay (all)")
            else:
                group.add_argument("--hole", type=numbers, help="to draw: x,y,width,height")
                group.add_argument("--mask", help="instead of --hole: white where to draw")
        for name, kind in settings.items():
            add_option(group, name, kind, f"({run.record['sampling'].get(name, 'as it comes')})")
    at = arguments.index(folder)
    return [arguments[0], *arguments[1:at], *arguments[at + 1 :]]


def add_option(group, name: str, kind: type, text: str) -> None:
    """--NAME VALUE by its type; for a truth value --NAME, --no-NAME and --NAME false."""
    common = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    name = name.replace("_", "-")
    if kind is bool:
        group.add_argument(f"--{name}", type=truth, nargs="?", const=True, metavar="B", **common)
        group.add_argument(f"--no-{name}", action="store_false", **common | {"help": "not that"})
    else:
        convert = kind if kind in (int, float, str) else numbers
        group.add_argument(f"--{name}", type=convert, metavar="", **common)


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# ---- the commands

def lab(name: str):
    """A module of nanogen.lab, imported only when a command needs it: --help should be fast."""
    return importlib.import_module(f"nanogen.lab.{name}")


def train_command(options) -> None:
    ours = ("command", "method", "data", "recipe", "out", "resume", "device")
    overrides = {name: value for name, value in vars(options).items() if name not in ours}
    run = lab("runs").train_run(options.method, options.data, overrides, options.out,
                                options.recipe, options.resume)
    print(f"Done: {run.folder}. Next: nanogen evaluate {run.folder}")


def sample_command(options) -> None:
    run, said = options.run, vars(options)
    conditions = {name: said[name] for name in options.conditions if said[name]}
    settings = {name: said[name] for name in options.settings if name in said}
    out, known = Path(options.out or run.folder / "samples"), None
    part = {name: said[name] for name in ("hole", "mask", "keep") if said.get(name) is not None}
    if files := said.get("known"):
        known = lab("sample").read_known(run, files, **part)
    elif part:
        raise Misuse(f"--{next(iter(part))} needs --known FILE, of which a part stays")
    drawn = lab("sample").sample(run, options.n, conditions, options.seed, out=out, known=known,
                                 **settings)
    files = len(list(out.glob("*.wav")))
    kept = f" ({files} of them as .wav)" if 0 < files < options.n else ""
    what = next((name for name in ("images", "videos", "waveforms") if name in drawn), "texts")
    print(f"{options.n} {what}: {out}{kept}")


def evaluate_command(options) -> None:
    settings = {name: vars(options)[name] for name in options.settings if name in vars(options)}
    run = options.run
    another = options.data and run.model.kind == "tokenizer" and lab("runs").kind_of(options.data)
    dataset = lab("runs").load(options.data) if another else run.dataset(options.data)
    metrics = lab("evaluate").evaluate(run, options.n, dataset, options.seed, **settings)
    for name, value in lab("report").flat(metrics).items():
        print(f"{name:40} {lab('evaluate').show(value)}")


def encode_command(options) -> None:
    run, out = lab("runs").load_run(options.run), Path(options.out)
    content = lab("sample").encode(run, Path(options.file), out, options.kbps)
    rate = f", {content['kbps']:g} kbit/s" if "kbps" in content else ""
    print(f"{out}: tokens of shape {content['tokens'].shape}{rate}")


def decode_command(options) -> None:
    lab("sample").decode(lab("runs").load_run(options.run), Path(options.file), Path(options.out))
    print(options.out)


def dub_command(options) -> None:
    import soundfile

    from nanogen.data.sources import SAMPLE_RATE, read_sound

    run, out = lab("runs").load_run(options.run), Path(options.out)
    listener = lab("runs").expert("listener", run.record["data"]["name"], run.folder.parent)
    clip = read_sound(options.file)
    (dubbed, digits, heard), = lab("dubbing").dub(run, listener.model, [clip], options.language,
                                                  options.seed)
    if not digits:
        raise UserError(f"The listener hears no digit in {options.file}.")
    soundfile.write(out, dubbed, SAMPLE_RATE)
    print(f"{out}: {digits}, heard in {heard}, said in {options.language}, "
          f"{len(dubbed) / SAMPLE_RATE:.2f} s of {len(clip) / SAMPLE_RATE:.2f} s")


def compare_command(options) -> None:
    from nanogen.data.datasets import name_of

    out = Path(options.out or f"runs/compare-{name_of(options.data)}")
    lab("tour").compare(options.data, options.minutes, out, options.n)


def report_command(options) -> None:
    print(lab("report").write([Path(run) for run in options.runs], Path(options.out)))


DATA = "cifar10, scenes, fsdd, voices or a folder of your own images or sounds"
COMMANDS = {  # name -> function, what it does, its options: flag, help, how argparse reads it
    "tour": (lambda options: lab("tour").tour(Path(getattr(options, "out", "runs/tour"))),
             "all methods, tiny, on data made by code; also without a command",
             ("--out", "folder of the page (runs/tour)", dict(default="runs/tour"))),
    "list": (lambda _: print(lab("tour").list_methods()),
             "methods, data sets, recipes, and what to expect"),
    "train": (train_command, "train a method; --FIELD VALUE sets any field of its Config",
              ("method", ", ".join(METHODS), dict(metavar="METHOD", choices=METHODS)),
              ("--data", DATA + " (cifar10 or fsdd)", {}),
              ("--recipe", "default, full or gpu (default)", dict(default="default")),
              ("--out", "the run's folder (runs/METHOD-DATA)", {}),
              ("--resume", "go on with the run in that folder", dict(action="store_true"))),
    "sample": (sample_command, "draw from a run: sample RUN, options in any order",
               ("--n", "how many (64)", dict(type=int, default=64)),
               ("--seed", "of everything drawn (0)", dict(type=int, default=0)),
               ("--out", "folder of samples.npz and what can be opened (RUN/samples)", {})),
    "encode": (encode_command, "an image or sound of your own -> tokens",
               ("run", "the folder of a tokenizer or codec", {}), ("file", "image or sound", {}),
               ("--out", "the file of tokens, .npz", dict(required=True)),
               ("--kbps", "codec: kilobits a second (all that it has)", dict(type=float))),
    "decode": (decode_command, "tokens -> the image or sound again",
               ("run", "the run that encoded", {}), ("file", "what encode wrote", {}),
               ("--out", "a .png, or a .wav, .flac or .ogg", dict(required=True))),
    "evaluate": (evaluate_command, "metrics on held-out data: evaluate RUN",
                 ("--n", "samples or test examples (1000; 200 to 300 where slow)", dict(type=int)),
                 ("--data", "its folder, if it was moved; for a codec, other sounds", {}),
                 ("--seed", "of everything drawn (1)", dict(type=int, default=1))),
    "dub": (dub_command, "what a clip says, in another language, by the same voice",
            ("run", "the folder of a run of speech", {}), ("file", "a sound: digits", {}),
            ("--language", "english, german or spanish", dict(required=True)),
            ("--seed", "of everything drawn (0)", dict(type=int, default=0)),
            ("--out", "the new sound (dubbed.wav)", dict(default="dubbed.wav"))),
    "compare": (compare_command, "methods that draw a class, at one budget: a table and a page",
                ("--data", DATA + " (cifar10)", dict(default="cifar10")),
                ("--minutes", "for each training (5)", dict(type=float, default=5.0)),
                ("--n", "samples of each method (500)", dict(type=int, default=500)),
                ("--out", "folder (runs/compare-DATA); the same again goes on with it", {})),
    "report": (report_command, "one HTML page about runs",
               ("runs", "folders of runs", dict(nargs="+")),
               ("--out", "the page (report.html)", dict(default="report.html"))),
}
DYNAMIC = {"train": train_options, "sample": run_options, "evaluate": run_options}


if __name__ == "__main__":
    sys.exit(main())
