"""From a command line to a checked config (see config_checks.py for the checks).

A script defines its flags, then calls `run(main)`; `main(config)` gets a locked ConfigDict.
Whatever the user can mend ends as one line `error: ...` with exit status 2, flags included.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from sam2_jax import presets
from sam2_jax.config_checks import check
from sam2_jax.config_keys import Config, flat_keys
from sam2_jax.reports import read_report
from sam2_jax.rules import nearest
from sam2_jax.types import UserError, fail

# Settings of `config.data` itself that data/catalogue.py reads for evaluation clips
EVALUATED = {"source", "root", "include", "exclude", "folder", "tfds", "synthetic"}


def split_arguments(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --config (the last one counts) and all other arguments."""
    path, rest, skip = "", [], False
    for i, arg in enumerate(argv):
        if skip:
            skip = False
        elif match := re.fullmatch(r"--?config=(.*)", arg):
            path = match[1]
        elif re.fullmatch(r"--?config", arg) and i + 1 < len(argv):
            path, skip = argv[i + 1], True
        else:
            rest.append(arg)
    return path, rest


def split_sets(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Folders by name of --config.eval.sets.NAME=FOLDER, and all other arguments.

    Of arguments as `last_of_each` gives them.

    Raises:
        UserError: a name without a folder, or with a dot.
    """
    sets, rest = {}, []
    for argument in arguments:
        match = re.fullmatch(r"--?config\.eval\.sets\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            rest.append(argument)
        elif match[2] is None:
            raise UserError(f"--config.eval.sets.{match[1]} names no folder: give it one, =FOLDER")
        elif "." in match[1]:
            name = match[1].replace(".", "-")
            raise UserError(f"--config.eval.sets.{match[1]} has a dot in its name: call it {name}")
        else:
            sets[match[1]] = match[2]
    return sets, rest


def last_of_each(arguments: Sequence[str]) -> list[str]:
    """The arguments with only the last setting of each --config.a.b, as --config.a.b=value.

    ml_collections would add up the tuples of a key that is given twice.
    """
    joined: list[str] = []
    for argument in arguments:
        follows = joined and re.fullmatch(r"--?config\.[^=]+", joined[-1])
        if follows and not re.match(r"--?[A-Za-z]", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)

    def key_of(argument: str) -> str | None:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        return match and match[1]

    keys = [key_of(argument) for argument in joined]
    return [x for i, x in enumerate(joined) if keys[i] is None or keys[i] not in keys[i + 1 :]]


def load_file(path: str) -> Config:
    """The config of `FILE.py`, `FILE.py:VARIANT` or `FILE.py:VARIANT,gpu=GB`, locked, unchecked."""
    file, _, argument = path.partition(":")
    if not pathlib.Path(file).is_file():
        raise UserError(
            f"--config={path}: there is no file '{file}' here; see configs/, e.g. configs/smoke.py"
        )
    presets.parse(argument)
    get_config = runpy.run_path(file)["get_config"]
    return (get_config(argument) if argument else get_config()).lock()


def check_overrides(path: str, arguments: Sequence[str]) -> None:
    """Raises `UserError` for the first --config.a.b that the config file does not have, or not use.

    Of the settings of a single source a mixture uses those by which evaluation clips are found.
    """
    config = load_file(path)
    keys = [*flat_keys(config), "eval.sets.NAME"]
    mixture = config.data.mixture
    names = ", ".join(mixture)
    single = {key for entry in mixture.values() for key in entry} - EVALUATED
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if not match:
            continue
        if match[1] not in keys:
            raise UserError(
                f"unknown config key '{match[1]}': did you mean '{nearest(match[1], keys)}'?"
            )
        section, _, key = match[1].partition(".")
        if section == "data" and key.partition(".")[0] in single:
            raise UserError(
                f"--config.{match[1]} is of a single source, and {path} trains on a mixture: set "
                f"--config.data.mixture.NAME.{key}, NAME one of {names}"
            )


def replay_command(report: pathlib.Path) -> list[str]:
    """The arguments of the run that wrote a report of a bad step; see replay.py.

    Where its config is not here but in the folder where it was started, goes there.
    """
    found = read_report(report)
    command = [str(argument) for argument in found["command"]]
    file = split_arguments(command)[0].partition(":")[0]
    folder = pathlib.Path(str(found.get("folder", ".")))
    if not pathlib.Path(file).is_file() and (folder / file).is_file():
        print(f"note: as that run in {folder}, for the paths among the options", file=sys.stderr)
        os.chdir(folder)
    return command


def report_of(arguments: Sequence[str]) -> str:
    """The file of --replay=FILE or --replay FILE; empty without."""
    match = re.search(r"(?:^|\n)--?replay[=\n](.+)", "\n".join(arguments))
    return match[1] if match else ""


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flag parser with every error as `UserError`, keys named as they were typed."""
    given = list(argv[1:])
    path, rest = split_arguments(given)
    report = report_of(rest)
    if report and not path:  # what the bad step was started with, this run's own flags last
        file = pathlib.Path(report).resolve()
        given = [*replay_command(file), *given, f"--replay={file}"]
        path, rest = split_arguments(given)
    wants_help = any(re.fullmatch(r"--?help(full|short|xml)?", argument) for argument in rest)
    if not path and not wants_help:
        raise UserError("--config=FILE.py[:VARIANT] is missing, e.g. --config=configs/smoke.py")
    # Names of these are new, and ml_collections takes new names everywhere or nowhere
    sets, known = split_sets(last_of_each(rest))
    if path:
        check_overrides(path, known)
    # --config comes first whatever the order typed: overrides apply to what it loads.
    first = [f"--config={path}"] if path else []
    ordered = [argv[0], *first, *known]
    sys.argv[1:] = ordered[1:]  # config_flags looks for overrides there
    try:
        left = flags.FLAGS(ordered)
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(" ".join(str(e).split())) from e
    except SystemExit:  # help was shown; absl calls that a failure
        sys.exit(0)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl.app would show the libraries' own chatter
    if len(left) > 1:
        raise UserError(f"argument '{left[1]}' is not a flag: flags look like --name=value")
    if path:
        with flags.FLAGS.config.unlocked():
            flags.FLAGS.config.eval.sets.update(sets)
    sys.argv[1:] = [*first, *rest]  # what repeats this run
    return left


def finish(config: Config) -> Config:
    """Settles what depends on other keys, checks, locks."""
    for source in (config.data, *config.data.mixture.values()):
        if source.source == "tfds" and source.root:
            source.source = "folder"  # configs/davis.py: a folder wins over the downloaded copy
    check(config)
    return config.lock()


def default_workdir(path: str, config: Config) -> str:
    """runs/CONFIG-VARIANT from the value of --config."""
    return f"runs/{pathlib.Path(path.partition(':')[0]).stem}-{config.model.variant}"


def to_json(config: Config) -> str:
    """The config as `config.json` holds it; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def run(
    main: Callable[[Config], int | None],
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Runs a script: parses flags, loads and checks --config, turns `UserError` into exit 2.

    The settings are checked inside `within`, in which processes of one run have found each other,
    so that none waits for one that has ended. --help prints the docstring of the script and its
    flags.
    """
    config_flags.DEFINE_config_file(
        "config", help_string="config file: FILE.py, FILE.py:VARIANT or FILE.py:VARIANT,gpu=GB"
    )
    # A flag of the script's own, for its --help.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])

    def wrapped(argv: Sequence[str]) -> int | None:
        del argv
        try:
            with within():
                return main(finish(flags.FLAGS.config))
        except UserError as e:
            return fail(e)

    try:
        app.run(wrapped, flags_parser=parse_flags)
    except UserError as e:
        sys.exit(fail(e))


class Parser(argparse.ArgumentParser):
    """Flags of a script without a config: `about` is its --help, a wrong flag a `UserError`."""

    def __init__(self, about: str | None):
        super().__init__(
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
