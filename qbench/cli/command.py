"""The command line: answers at once what needs no computing, hands runs and sweeps to Hydra. Only runs import torch."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.cli.overrides import SYNONYMS, check, check_options, forced, parse, resolve_row
from qbench.cli.texts import typed
from qbench.cli.usage import HELP, USAGE
from qbench.cli.waiting import spin_briefly
from qbench.config import allowed, catalog
from qbench.config.kinds import seconds
from qbench.config.options import OPTIONS
from qbench.errors import UserError, unknown
from qbench.screen import Screen, say, speak_any_encoding
from qbench.training.interrupt import SWEEP, Interrupted, handling, interrupt, status, stop_sweep, time_limit

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = (*HELP, "help")
ASKING = ("help", "-h", "--help")
SINGLE: list[
    int | BaseException
] = []  # what a single run came to: hydra.main returns nothing, and prints errors its own way
OWN_CONF = ("--config-dir", "-cd")
FLAGS_WITH_VALUE = (*OWN_CONF, "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c")
SWITCHES = ("--multirun", "-m", "--resolve", "--info", "-i", "--run", "-r", "--hydra-help", "--shell-completion", "-sc")
FLAGS = (*ASKING[1:], *FLAGS_WITH_VALUE, *SWITCHES, "--experimental-rerun")  # Hydra's


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    spin_briefly()
    speak_any_encoding()
    with handling((signal.SIGTERM,), interrupt):
        return _answered(args)


def _answered(args: list[str]) -> int:
    debug = any(a.strip().lower() in ("debug=true", "debug=1") for a in args)
    try:
        return _dispatch(args)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"qbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qbench: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return status()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RecursionError:
        print("qbench: a file holds brackets within brackets, too deep to read", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            raise
        print(f"qbench: {_unexpected(error)}", file=sys.stderr)
        return 1


def _unexpected(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return f"unexpected {type(error).__name__}: {error} (debug=true shows where)"


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ASKING or any(a in ASKING[1:] for a in args) or args[1:] == ["help"]:
        of = next((a for a in args if a not in ASKING), "")
        method = of.removeprefix("method=")
        print(catalog.about(method) if method != of else HELP.get(of, USAGE))
        return 0
    if args[0] == "--version":
        from qbench import __version__

        print(f"qbench {__version__}")
        return 0
    if args[0] == "list":
        if args[1:] not in ([], ["format=md"]):
            raise UserError(f"qbench list takes nothing, or format=md, got {' '.join(args[1:])}")
        print(catalog.table() if args[1:] else catalog.listing())
        return 0
    if args[0] in ("table", "compare"):
        return _table(args[1:]) if args[0] == "table" else _compare(args[1:])
    if args[0] == "eval":
        return _evaluate(args[1:])
    if args[0] in ("export", "inspect"):
        from qbench.cli import packed

        return packed.export(args[1:]) if args[0] == "export" else packed.inspect(args[1:])
    if args[0] == "paper":
        from qbench.papers import study

        return study.command(args[1:], resolve_row)
    if args[0] == "sensitivity":
        from qbench.cli import sensitivity

        return sensitivity.command(args[1:])
    if args[0] == "bench":
        from qbench import bench

        return bench.main(args[1:])
    if "=" not in args[0] and not args[0].startswith("-"):
        raise unknown("command", args[0], COMMANDS)
    return _hydra(args)


def _table(args: list[str]) -> int:
    from qbench.figures import report
    from qbench.records import read_results

    places = [a for a in args if not a.startswith("format=")]
    form = next((a.removeprefix("format=") for a in args if a.startswith("format=")), "text")
    if form not in report.FORMATS:
        raise unknown("format", form, report.FORMATS)
    if len(places) > 1:
        raise UserError(f"qbench table takes one folder, got {len(places)}")
    print(report.table(read_results(Path(places[0] if places else "outputs")), form=form))
    return 0


def _compare(args: list[str]) -> int:
    from qbench.figures import report

    if len(args) != 2:
        raise UserError(f"qbench compare takes two run folders, got {len(args)}")
    print(report.compare(Path(args[0]), Path(args[1])))
    return 0


def _evaluate(args: list[str]) -> int:
    if not args:
        raise UserError("qbench eval takes a packed file, a run folder or a checkpoint, for which options say the rest")
    path, overrides = Path(args[0]), args[1:]
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"no such run or checkpoint: {path}")
    from qbench.lowbit.container import is_packed

    packed = path.is_file() and is_packed(path)
    if packed or ((folder / "config.yaml").is_file() and (path.is_dir() or path.name == "model.pt")):
        given = {o.key_or_group: o.value() for o in parse(overrides)}
        place, packages = given.pop("device", None), given.pop("allow", "")
        strange = [key for key in given if not key.startswith("dataset.")]
        if strange:
            raise UserError(
                f"a run is evaluated as it was trained; only dataset.*, device and allow may be set, got {strange[0]}"
            )
        if place not in (None, "auto", "cpu", "cuda"):
            raise unknown("device", str(place), ("auto", "cpu", "cuda"))
        allow = allowed.packages(",".join(map(str, packages)) if isinstance(packages, list) else str(packages))
        from qbench.figures.report import percent
        from qbench.training.finished import evaluate

        dataset = {k.removeprefix("dataset."): v for k, v in given.items()}
        read = path if packed else folder
        result, loss, accuracy = evaluate(read, dataset, None if place is None else str(place), allow)
        recorded = percent(result.get("accuracy_last"))
        print(f"{read}: accuracy {accuracy:.2f} %, loss {loss:.4f} (recorded: {recorded} %)")
        return 0
    if path.is_dir():
        raise UserError(f"{path} is not a finished run: it has no config.yaml")
    config = resolve_row(["method=float", *overrides])
    from qbench.training.finished import evaluate_checkpoint

    loss, accuracy = evaluate_checkpoint(config, path)
    print(f"{path}: accuracy {accuracy:.2f} %, loss {loss:.4f} (float {config['model']['name']})")
    return 0


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """(flags, overrides) of a command line. Errors: UserError on a flag that Hydra does not have."""
    flags, overrides, rest = [], [], iter(args)
    for arg in rest:
        if arg.startswith("-"):
            if (flag := arg.partition("=")[0]) not in FLAGS:
                option = flag.lstrip("-").replace("-", "_")
                if option in (*OPTIONS, *catalog.GROUPS) or option in SYNONYMS:
                    right = SYNONYMS.get(option, option)
                    value = arg.partition("=")[2] or next(rest, "VALUE")
                    raise UserError(f"options are written name=value: {right}={value} in place of {flag}")
                raise unknown("flag", flag, FLAGS)
            flags.append(arg)
            if arg in FLAGS_WITH_VALUE:
                flags.append(next(rest, ""))
        else:
            overrides.append(arg)
    return flags, overrides


def _hydra(args: list[str]) -> int:
    flags, overrides = split(args)
    sweep = any(f in ("-m", "--multirun") for f in flags)
    check(overrides, sweep, _own_folder(flags))
    overrides = typed(forced(overrides) if sweep else overrides, sweep)
    import hydra

    run: Callable[[], Any] = hydra.main(
        config_path=str(catalog.conf_folder()), config_name="config", version_base="1.3"
    )(job)
    sys.argv = ["qbench", *flags, *overrides]  # argparse wants flags first
    limit = next((o.partition("=")[2] for o in reversed(overrides) if o.lstrip("+").startswith("time_limit=")), None)
    with time_limit(seconds(limit) if limit else None):
        if sweep:
            from qbench.cli.sweep import sweep_of

            return sweep_of(run, overrides)
        run()
        outcome = SINGLE.pop() if SINGLE else 0
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _own_folder(flags: Sequence[str]) -> Path | None:
    """The folder of the user's own configuration. Errors: UserError where there is none at the place named."""
    given = [f.partition("=")[2] or after for f, after in pairwise([*flags, ""]) if f.partition("=")[0] in OWN_CONF]
    if given and not (given[0] and Path(given[0]).is_dir()):
        raise UserError(f"{OWN_CONF[0]}: no folder {given[0] or '(none named)'}")
    return Path(given[0]) if given else None


def job(config: "DictConfig") -> int | float:
    """One run, for Hydra: the exit status alone, in a sweep what a search maximises.

    That is the test accuracy of the last epoch in percent, and 0, the worst there is, of a run that failed or that the
    method does not have: a search goes on after it. What was not computed because the sweep is stopping is an error.

    Errors: in a search alone, Interrupted, and UserError where it would look for the worst net.
    """
    from qbench.config.resolve import NotApplicable, resolve

    if SWEEP not in os.environ:
        try:
            SINGLE.append(_one(resolve(config)))
        except BaseException as error:
            SINGLE.append(error)
        return 0
    from hydra.core.hydra_config import HydraConfig

    from qbench.cli.sweep import Cell

    at = HydraConfig.get()
    words = [o.removeprefix("++") for o in at.overrides.task]
    cell = Cell.begin(at.job.num, words)
    search = at.runtime.choices.get("hydra/sweeper", "basic") != "basic"
    if search and "minimize" in str(at.sweeper.get("direction")):
        raise UserError("hydra.sweeper.direction=maximize is needed: what a search looks at is the test accuracy")
    if cell.settled:
        return _objective(cell.settled, search)
    bits = config.bits or "/".join(str(config[k] or "-") for k in ("w_bits", "a_bits"))
    names = [config[group].name for group in ("method", "model", "dataset", "budget")]
    note: dict[str, Any] = {"overrides": words, "status": "done", "out": str(config.out)}
    note["figures"] = str(config.figures)
    note["cells"] = [names[0], str(bits), *names[1:]]
    try:
        check_options(at.runtime.choices["method"], at.overrides.task)
        note |= _cell(resolve(config), cell.screen)
    except NotApplicable as error:
        note |= {"status": "n/a", "error": str(error)}
    except (Interrupted, KeyboardInterrupt) as error:
        stop_sweep()
        note |= {"status": "stopped", "error": str(error) or "stopped before its first step"}
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        text = str(error) if isinstance(error, UserError) else _unexpected(error)
        note |= {"status": "failed", "error": text}
    if "error" in note:
        cell.screen.line(f"  {note['status']}: {note['error']}")
    cell.end(note)
    return _objective(note, search)


def _objective(note: dict[str, Any], search: bool) -> float:
    """See `job`. No optimizer takes NaN as a value, and a trial that was never begun must not stand in its memory."""
    if search and note["status"] == "stopped":
        raise Interrupted(note["error"])
    return float((note.get("result") or {}).get("accuracy_last") or 0.0)


def _cell(config: dict[str, Any], screen: Screen) -> dict[str, Any]:
    """A run of a sweep, or its plan; returns what there is to note."""
    if config["plan"]:
        _plan(config)
        return {"status": "planned"}
    from qbench.training.execute import execute

    result = execute(config, screen)
    if result.get("reused"):
        screen.line(f"  skipped, done before: {result['accuracy_last']} %")
    return {"result": result}


def _one(config: dict[str, Any]) -> int:
    """A single run; returns the exit status."""
    if config["plan"]:
        _plan(config)
        return 0
    from qbench.figures.report import tell
    from qbench.training.execute import execute

    try:
        result = execute(config)
    except Interrupted as error:
        print(f"qbench: {error}", file=sys.stderr)
        return status()
    if result.get("reused"):
        tell(Path(result["folder"]), result, say)
    return 0


def _plan(config: dict[str, Any]) -> None:
    """Print what a run would do."""
    import yaml

    from qbench.screen import clock
    from qbench.training import finished

    plan = finished.plan(config)
    print(yaml.safe_dump(json.loads(json.dumps(plan["config"])), sort_keys=False))
    for site in ("weights", "activations", "errors"):
        for name, entry in plan["manifest"][site].items():
            what = (
                entry.get("why") or entry.get("part_of") or f"{entry.get('levels')} levels, {entry.get('granularity')}"
            )
            print(f"{site:<12} {name:<40} {entry.get('bits', 32):>5} bits  {what}")
    for name, why in plan["manifest"]["float_inputs"].items():
        print(f"float input  {name:<40}    32 bits  {why}")
    size = plan["manifest"]["size"]
    print(f"\n{size['bits_per_weight']:.2f} bits per quantized weight, {size['bytes']:,} bytes in all")
    print(f"folder: {plan['folder']}")
    parent = f" + {plan['parent_steps']} for the float parent" if plan["parent_steps"] else ""
    print(f"{plan['steps']} steps{parent}: about {clock(plan['seconds'])} of training on this machine")
