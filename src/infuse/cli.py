"""The command line: a sub-command per dataclass of settings. No logic here; every flag is a field."""

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, fields
from io import StringIO, TextIOWrapper, UnsupportedOperation
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from safetensors import SafetensorError

from infuse import console
from infuse.calibrating.settings import CalibrateConfig
from infuse.comparing.settings import CompareConfig
from infuse.errors import InfuseError, listed
from infuse.method import make, names, spelled
from infuse.mistakes import sentence, unknown
from infuse.recommending.settings import RecommendConfig
from infuse.serving.settings import ServeConfig
from infuse.settings import METHODS, FromFile, from_yaml
from infuse.training.config import AverageConfig, FuseConfig, TrainConfig
from infuse.tuning.config import TuneConfig

# What a command does is imported when it runs: --help and a mistyped flag need not wait for all of transformers.


@dataclass
class EvaluateConfig(FromFile):
    """Measure a trained run on labelled data."""

    run: tyro.conf.Positional[Path]
    """A run folder, or an adapter's folder."""
    data: str
    """CSV, TSV, JSONL or Parquet file, folder, hub data set, or sample."""
    split: str = "test"
    """Which split, where the data has several."""
    text: str = "text"
    """Column of the texts."""
    label: str = "label"
    """Column of the labels."""
    multi: bool = False
    """Several labels a row, separated by | in CSV files."""
    base: str | None = None
    """The base model, if it is not found under the name used in training."""
    format: Literal["table", "json"] = "table"
    """How to print."""


@dataclass
class PredictConfig(FromFile):
    """Label texts: from the arguments, a file, or standard input (a text a line)."""

    run: tyro.conf.Positional[str]
    """A run folder, or an adapter's folder; with --url an adapter's name."""
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """The texts; without any (and without --data), they are read from standard input."""
    data: str | None = None
    """A CSV, TSV, JSONL or Parquet file of texts."""
    text: str = "text"
    """Column of the texts in --data."""
    url: str | None = None
    """Ask a server of infuse serve instead, e.g. http://localhost:8000."""
    top_k: int = 3
    """How many labels to give per text."""
    format: Literal["table", "json", "csv"] = "table"
    """How to print."""
    base: str | None = None
    """The base model, if it is not found under the name used in training."""


@dataclass
class SummaryConfig(FromFile):
    """Trained parameters of methods on a base, or of a run's adapter by role."""

    target: tyro.conf.Positional[str] = "minilm"
    """A base model (nothing is downloaded but its config), or a run folder."""
    methods: tuple[str, ...] = ()
    """Methods to count, e.g. ia3 lora:rank=4; all by default."""
    layers: str = "all"
    """Which layers to adapt."""
    base: str | None = None
    """The base model of a run folder, if it is not found under the name used in training."""


@dataclass
class SitesConfig(FromFile):
    """The sites of a base model: every role, where it is, and how wide."""

    base: tyro.conf.Positional[str] = "minilm"
    """A base model (nothing is downloaded but its config)."""


@dataclass
class MergeConfig(FromFile):
    """Fold a run's adapter into its base and write a plain transformers model."""

    run: tyro.conf.Positional[Path]
    """A run folder, or an adapter's folder."""
    out: tyro.conf.Positional[Path]
    """The folder to write."""
    base: str | None = None
    """The base model, if it is not found under the name used in training."""


def _train(config: TrainConfig) -> None:
    from infuse.progress import ShowProgress
    from infuse.training.run import train

    console.show_run(train(config, say=console.say, callbacks=[ShowProgress()]))


def _calibrate(config: CalibrateConfig) -> None:
    from infuse.calibrating.calibrate import calibrate

    console.show_calibration(calibrate(config), config.format)


def _evaluate(config: EvaluateConfig) -> None:
    from infuse.data import read
    from infuse.training.predictor import open_run
    from infuse.training.run import evaluate

    rows = read(config.data, text=config.text, label=config.label, split=config.split, multi=config.multi)
    measures, classes = evaluate(open_run(config.run, config.base), rows)
    console.show_evaluation(measures, classes, len(rows), config.format)


def _predict(config: PredictConfig) -> None:
    if config.top_k < 1:
        raise InfuseError(f"--top-k must be at least 1, not {config.top_k}.")
    if config.data and config.texts:
        raise InfuseError("Give texts either as arguments or by --data, not both.")
    if config.url is not None and config.base:
        raise InfuseError("The server of --url has its base already: leave out --base.")
    texts = config.texts
    if config.data:
        from infuse.data import read

        texts = read(config.data, text=config.text, labelled=False).texts
    elif not texts:
        try:
            texts = tuple(line.strip() for line in sys.stdin if line.strip())
        except UnicodeDecodeError:
            raise InfuseError("Standard input is not UTF-8 text: give it in the encoding UTF-8.") from None
    if not texts:
        raise InfuseError("There is no text to label: give texts as arguments, by --data FILE, or on standard input.")
    if config.url is not None:
        from infuse import client  # needs httpx, an optional dependency

        answers = client.predict(config.url, config.run, texts, config.top_k)
    else:
        from infuse.training.predictor import open_run

        answers = open_run(config.run, config.base).answers(texts, config.top_k)
    console.show_predictions(texts, answers, config.format)


def _summary(config: SummaryConfig) -> None:
    from infuse.bases import skeleton
    from infuse.method import registry
    from infuse.model import attach, detach, summary
    from infuse.training.predictor import open_run

    if Path(config.target).is_dir() and not (Path(config.target) / "config.json").exists():
        if config.methods or config.layers != "all":
            raise InfuseError(
                f"The run in {config.target} has its method and layers: leave out --methods and --layers."
            )
        console.out.print(str(summary(open_run(config.target, config.base).base.model)))
        return
    if config.base is not None:
        raise InfuseError(f"--base is for run folders, and {config.target} is a base model: leave out --base.")
    model, rows, unfit = skeleton(config.target), [], []
    total = sum(p.numel() for p in model.parameters())
    for method in map(make, config.methods or registry()):
        if method.maker:
            raise InfuseError(f"{method.name} builds on trained adapters, whose parameters count; give other methods.")
        try:
            adapter = attach(model, method, "counted", layers=config.layers)
        except InfuseError as error:
            if config.methods:
                raise
            unfit.append(error)
            rows.append((spelled(method), str(error)))
            continue
        rows.append((spelled(method), (len(adapter.sites), summary(model).deltas("counted"))))
        detach(model)
    if len(unfit) == len(rows):  # the fault of the base or the layers
        raise unfit[0]
    console.show_counts(config.target, total, rows)


def _sites(config: SitesConfig) -> None:
    from infuse.bases import skeleton
    from infuse.sites import find_sites

    console.show_sites(config.base, find_sites(skeleton(config.base)))


def _merge(config: MergeConfig) -> None:
    from infuse.export import merge_run

    console.out.tell(f"merged model: {merge_run(config.run, config.out, config.base)}")


def _fuse(config: FuseConfig) -> None:
    from infuse.progress import ShowProgress
    from infuse.training.fusing import fuse_runs

    console.show_run(fuse_runs(config, say=console.say, callbacks=[ShowProgress()]))


def _tune(config: TuneConfig) -> None:
    from infuse.progress import ShowTuning
    from infuse.tuning.run import tune

    with ShowTuning() as watch:
        tuned = tune(config, say=console.say, watch=watch)
    console.show_tuned(tuned)


def _average(config: AverageConfig) -> None:
    from infuse.training.fusing import average_runs

    console.out.tell(f"average: {average_runs(config, say=console.say)}")


def _compare(config: CompareConfig) -> None:
    from infuse.comparing.compare import compare
    from infuse.progress import ShowProgress

    compared = compare(config, say=console.say, callbacks=lambda: [ShowProgress()])
    console.show_comparison(compared.report, compared.folder)


def _serve(config: ServeConfig) -> None:
    from infuse.serving.server import serve

    serve(config, say=console.say)


def _recommend(config: RecommendConfig) -> None:
    from infuse.recommending.recommend import recommend

    found = recommend(config, say=console.say, spent=console.seconds_since_start())
    console.show_recommendation(found)
    if found.train is None:
        sys.exit(1)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (TrainConfig, _train),
    "tune": (TuneConfig, _tune),
    "fuse": (FuseConfig, _fuse),
    "average": (AverageConfig, _average),
    "compare": (CompareConfig, _compare),
    "recommend": (RecommendConfig, _recommend),
    "evaluate": (EvaluateConfig, _evaluate),
    "calibrate": (CalibrateConfig, _calibrate),
    "predict": (PredictConfig, _predict),
    "summary": (SummaryConfig, _summary),
    "sites": (SitesConfig, _sites),
    "merge": (MergeConfig, _merge),
    "serve": (ServeConfig, _serve),
}


def main(arguments: list[str] | None = None) -> None:
    """What ``infuse`` does: exit code 0; 1 if nothing meets the constraints; 2 and one sentence for a mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    try:
        config = _parse(arguments)
        run = next(run for kind, run in COMMANDS.values() if type(config) is kind)
        run(config)
        sys.stdout.flush()
    except InfuseError as error:
        console.err.tell(f"infuse: {error}", style="red")
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    except (OSError, SafetensorError) as error:  # a path that can't be written, a full disk
        what, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        console.err.tell(
            f"infuse: {what or 'The output'} can't be read or written ({why or error}); "
            "check the path, its permissions and the space left.", style="red",
        )  # fmt: skip
        _drop_output()
        sys.exit(2)


def _open_streams() -> None:
    """Standard input and output are UTF-8 as files are, whatever the locale; where they are closed, they are empty."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115  # open to the end
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream, encoding in ((sys.stdin, "utf-8-sig"), (sys.stdout, "utf-8")):
        if isinstance(stream, TextIOWrapper) and stream.encoding != encoding:
            with suppress(UnsupportedOperation):  # of a stream that was read from before
                stream.reconfigure(encoding=encoding)


def _drop_output() -> None:
    """Send what standard output still holds to nowhere: Python would try again to write it when it ends, and fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(arguments: list[str]) -> Any:
    choices = []
    for name, (kind, _) in COMMANDS.items():
        described = {"name": name, "description": kind.__doc__}
        if arguments[:1] == [name] and {"-h", "--help"} & set(arguments) and METHODS & set(kind.__dataclass_fields__):
            described["description"] = f"{kind.__doc__} The methods are {listed(names(), 40)}."
        if arguments[:1] == [name] and (paths := _given(arguments, "--config")):
            if len(paths) > 1:
                raise InfuseError(f"Give one --config, not {len(paths)}: settings come from one file.")
            described["default"] = from_yaml(kind, Path(paths[0]))
        choices.append(Annotated[kind, tyro.conf.subcommand(**described, prefix_name=False)])
    union = tyro.conf.OmitArgPrefixes[Union[tuple(choices)]]  # noqa: UP007  # built at run time
    command = next(iter(arguments), "")
    if command and not command.startswith("-") and command not in COMMANDS:
        raise InfuseError(unknown(command, COMMANDS, "infuse"))
    where = f"infuse {command}" if command in COMMANDS else "infuse"
    report = StringIO()
    try:
        with redirect_stderr(report):
            config, others = tyro.cli(
                union,
                prog="infuse",
                args=_joined(arguments, "--must"),
                description="Parameter-efficient fine-tuning of text classifiers: "
                "train, tune, compare, recommend, calibrate, predict, serve, merge.",
                return_unknown_args=True,
            )
    except SystemExit as ended:
        if ended.code in (0, None):
            raise
        raise InfuseError(sentence(report.getvalue(), where)) from None
    if others:
        raise InfuseError(unknown(next((o for o in others if o.startswith("-")), others[0]), _flags(config), where))
    return config


def _flags(config: Any) -> list[str]:
    names = [field.name.replace("_", "-") for field in fields(config)]
    return [f"--{no}{name}" for name in names for no in ("", "no-")]


def _joined(arguments: list[str], name: str) -> list[str]:
    """``--must a … --must b`` as ``… --must a b``: else the last would win, and a constraint be lost in silence."""
    others: list[str] = []
    values: list[str] = []
    taking = False
    for argument in arguments:
        flag, given, value = argument.partition("=")
        if argument.startswith("-"):
            taking = flag == name
        if not taking:
            others.append(argument)
        elif flag != name:
            values.append(argument)
        elif given:
            values.append(value)
    return [*others, name, *values] if values or name in arguments else others


def _given(arguments: list[str], name: str) -> list[str]:
    """The values that an option is given, one for each time that it stands there."""
    values = []
    for argument, after in zip(arguments, [*arguments[1:], None], strict=True):
        flag, given, value = argument.partition("=")
        if flag == name and (given or after is not None):
            values.append(value if given else after)
    return values
