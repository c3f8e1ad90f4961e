"""What the commands share: options from settings classes, the model, its profile, progress on standard error."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from ..calibration import store
from ..calibration.ordinary_prompts import general_prompts
from ..calibration.profile import Ordinary, Profile
from ..calibration.recombined import recombined
from ..core.denoiser import Model, PromptTooLong
from ..core.memory import OutOfMemory, release, telling
from ..core.progress import Stopwatch
from ..core.settings import options_of
from ..core.verdict import Explanation, Verdict, View
from ..explain.views import explain
from ..kept import model_digest
from ..report.terminal import STEERING, one_line, plain, verdict_panel
from ..run.measure import Measured, Measurement, measure, setting_of
from .prompt_files import read_prompts

CHUNK = 64
LARGEST_COUNT = 1_000_000
SHOWN_OF_A_PROMPT = 40  # characters, where a message names it
EXIT_FLAGGED, EXIT_NOT_MEASURED = 3, 4
WORLD_SEED = 77  # of the bundled model's ordinary captions that calibrate
Settings = TypeVar("Settings")


def add_settings(
    parser: argparse.ArgumentParser,
    settings: type,
    title: str,
    leave_out: Sequence[str] = (),
    of: str = "",
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Every option of a settings class as a command-line option; ranges are checked by the class itself.

    With ``of``, the name of a method, an option whose name is taken is called ``--METHOD-OPTION``, and
    :func:`from_arguments` finds the values under the same ``of``. ``defaults`` are a command's own.
    """
    group = parser.add_argument_group(title)
    for known in options_of(settings):
        known = replace(known, default=defaults.get(known.name, known.default))
        if known.name in leave_out:
            continue
        shown = f"{known.default:g}" if isinstance(known.default, float) else known.default
        told = f"{known.help} (default: {shown})" if shown not in (None, "") else known.help
        given: dict[str, Any] = {"dest": _place(known.name, of), "default": known.default, "help": told}
        if known.kind is bool:
            given["action"] = argparse.BooleanOptionalAction
        else:
            values = {"choices": known.choices} if known.choices else {"metavar": known.kind.__name__.upper()}
            given |= {"type": known.kind, **values}
        flag = known.name.replace("_", "-")
        try:
            group.add_argument(*dict.fromkeys((f"--{flag}", f"--{known.id.replace('_', '-')}")), **given)
        except argparse.ArgumentError:
            if not of:
                raise
            group.add_argument(f"--{of}-{flag}", **given)


def _place(name: str, of: str) -> str:
    """Where the value of an option is put among the arguments; methods have places of their own."""
    return f"{of}.{name}" if of else name


def from_arguments(settings: type[Settings], arguments: argparse.Namespace, of: str = "") -> Settings:
    """The settings a user asked for; the defaults of those left out. Raises ValueError for values out of range."""
    known = [f.name for f in fields(settings) if hasattr(arguments, _place(f.name, of))]  # type: ignore[arg-type]
    return settings(**{name: getattr(arguments, _place(name, of)) for name in known})


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="diffusers folder, checkpoint file or hub id (default: the bundled model)")
    group.add_argument("--config", help="diffusers folder or hub id that describes a checkpoint file of unusual sizes")
    add_device_options(group)
    group.add_argument("--prompt-weights", action="store_true", help="read '(word:1.3)' and '[word]' as weights")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        help="most images in one model evaluation; large ones take turns (default: 32)",
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; '-' reads them from standard input")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts from .txt, .csv, .jsonl or .parquet")
    parser.add_argument("--column", help="column or key that holds the prompts (default: prompt, caption or text)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="calibration profile (default: found by itself)")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, a line each")


def add_device_options(group: Any) -> None:
    """Where the model computes, and in what precision."""
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    group.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default: float32)")


def positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"must be at least 1 and at most {LARGEST_COUNT:,}, not {value}")
    return value


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"sd-dejavu: {one_line(text)}", file=sys.stderr)


def tell(text: object, stderr: bool = False) -> None:
    """Lines on standard output (or error), as they are."""
    Console(stderr=stderr).print(plain(text), soft_wrap=True)


def json_text(record: Any, indent: int | None = None) -> str:
    """JSON in which what could steer a terminal is written as escapes."""
    text = json.dumps(record, ensure_ascii=False, indent=indent)
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def print_json(record: Any) -> None:
    """One line on standard output."""
    print(json_text(record), flush=True)  # what cannot be written is told while it can be


def load_model(arguments: argparse.Namespace) -> Model:
    from ..hosts.diffusers.load import load

    return load(arguments.model, arguments.device, arguments.dtype, arguments.config, arguments.prompt_weights)


def ordinary_prompts_of(
    arguments: argparse.Namespace, own: Path | None, like: Sequence[str] | None, count: int
) -> tuple[list[str], Ordinary]:
    """The user's own ordinary prompts, others ``like`` given ones, or generated ones, and which these are; the bundled
    model's generated ones are captions of its little world."""
    if own is not None:
        return list(read_prompts(own, [], None, arguments.column))[:count], "own list"
    if like is not None:
        return recombined(like, count), "recombined"
    if arguments.model is None:
        from ..demo.world import ordinary_captions

        return [caption for caption, _ in ordinary_captions(count, WORLD_SEED)], "generated"
    return general_prompts(count), "generated"


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    return list(read_prompts(arguments.prompts_file, arguments.prompts, sys.stdin, arguments.column))


def profile_of(arguments: argparse.Namespace, model: Model, wanted: Measurement) -> Profile | None:
    """The profile named by the user (refused if it does not fit), else the one found for this setting."""
    from ..demo import bundled

    setting = setting_of(model, wanted)
    if arguments.profile is not None:
        profile = Profile.load(arguments.profile)
        if why := profile.setting.mismatch(setting, wanted.score):
            raise ValueError(f"the calibration profile {arguments.profile} is for another setting: {why}")
        return profile
    return store.find(setting, wanted.score, wanted.images, bundled.CALIBRATIONS)


def place_of(prompts: Sequence[str], index: int) -> str:
    """'prompt 3 (a red boat ...)', for messages about one of many."""
    prompt = prompts[index]
    shown = prompt if len(prompt) <= SHOWN_OF_A_PROMPT else f"{prompt[:SHOWN_OF_A_PROMPT]}..."
    return f"prompt {index + 1} ({one_line(shown)})"


def too_long(model: Model, prompts: Sequence[str], start: int = 0, stop: int | None = None) -> dict[int, str]:
    """Which prompts, of all or of a part, have more tokens than the model can read: their places in the list, and why."""
    found = {}
    for index in range(len(prompts))[start:stop]:
        try:
            model.encode(prompts[index])
        except PromptTooLong as error:
            found[index] = f"{place_of(prompts, index)}: {error}"
    return found


def refuse_too_long(model: Model, prompts: Sequence[str], source: str = "") -> None:
    """Before long work: raises PromptTooLong naming the first prompt that cannot be read, and where it comes from."""
    for why in too_long(model, prompts).values():
        raise PromptTooLong(f"{source}, {why}" if source else why)


def measured_in_chunks(
    model: Model, prompts: Sequence[str], wanted: Measurement, batch_size: int, console: Console
) -> Iterator[Measured]:
    """Measure a long list piece by piece, with a progress bar; results come as they are ready.

    One prompt of many that is too long is not measured, and says why. Raises PromptTooLong where it is the only one.
    """
    with progress_bar(console) as bar:
        task = bar.add_task("measuring", total=len(prompts))
        for start in range(0, len(prompts), CHUNK):
            part = prompts[start : start + CHUNK]
            work = partial(measure, model, wanted=wanted, batch_size=batch_size)
            progress = partial(_advance, bar, task, start)
            try:
                yield from work(part, on_progress=progress)
            except PromptTooLong:
                if len(prompts) == 1:
                    raise
                unread = too_long(model, prompts, start, start + CHUNK)
                readable = [prompt for index, prompt in enumerate(part, start) if index not in unread]
                measured = iter(work(readable, on_progress=progress) if readable else [])
                for index, prompt in enumerate(part, start):
                    yield Measured(prompt, None, (), why=unread[index]) if index in unread else next(measured)


def words_of(
    model: Model, prompt: str, wanted: Measurement, view: View | None = None, batch_size: int = 32
) -> tuple[Explanation | None, str]:
    """The words of a prompt; or None, with the reason, where memory does not suffice or the prompt is too long."""
    try:
        with telling():
            return explain(model, model.encode(prompt), wanted, view, batch_size), ""
    except (OutOfMemory, PromptTooLong) as error:
        why = f"no words: {error}"
    release()
    return None, why


def print_verdict(verdict: Verdict, wanted: Measurement, model: Model, as_json: bool, why_no_words: str = "") -> None:
    """On standard output; the JSON line says why there are no words where that is not as asked for."""
    if as_json:
        missing = {"why_no_words": why_no_words} if why_no_words else {}
        record = {**verdict.as_json(), **missing, "settings": asdict(wanted), "model": model.name}
        print_json(record)
        return
    Console().print(verdict_panel(verdict))
    if why_no_words:
        tell(why_no_words)


def _advance(bar: Progress, task: TaskID, before: int, done: float) -> None:
    bar.update(task, completed=before + done)


class Pace(ProgressColumn):
    """The rate and the time left of each line of a bar."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: dict[TaskID, Stopwatch] = {}

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        watch = self._watches.setdefault(task.id, Stopwatch(task.get_time))
        return Text(watch(task.description, task.completed, task.total).pace)


def progress_bar(console: Console) -> Progress:
    """Hidden where standard error is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Pace())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def stages(bar: Progress) -> Callable[[str, int, int], None]:
    """Shows (stage, done, total), one line of the bar a stage."""
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, completed=done, total=total)
        bar.update(tasks[stage], completed=done, total=total)

    return show


def model_told(model: str | None) -> str:
    """Which model it is, for what is kept of it: a local one by its contents, another by its name on the hub."""
    if model is None:
        return "bundled"
    return model_digest(Path(model)) if Path(model).exists() else model


def new_file(text: str) -> Path:
    """The type of an option for a file that is written at the end, in a folder that is made now; ``-`` stands for standard
    output.

    >>> new_file("/dev/null/rows.json")
    Traceback (most recent call last):
    ...
    argparse.ArgumentTypeError: the folder '/dev/null' cannot be made (Not a directory): name another place
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise argparse.ArgumentTypeError(
            f"the folder {str(path.parent)!r} cannot be made ({why}): name another place"
        ) from None
    return path


def write_rows(document: dict[str, Any], json_file: Path | None, csv_file: Path | None) -> None:
    """A document with its ``rows`` as JSON ('-' prints it), and the rows alone as CSV, where they were asked for."""
    if json_file is not None:
        text = json.dumps(document, indent=1)
        if str(json_file) == "-":
            print(text)
        else:
            json_file.write_text(text + "\n", encoding="utf-8")
    if csv_file is not None:
        with csv_file.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, document["rows"][0])
            writer.writeheader()
            writer.writerows(document["rows"])
