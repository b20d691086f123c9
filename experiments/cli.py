"""What every command shares: flags in, one clear line out when something is wrong."""

import contextlib
import ctypes
import difflib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from llama_jax import config, files
from llama_jax.analysis import hardware

# What a user can mend: a message, no traceback.
USER_ERRORS = (ValueError, OSError)
ROOT = Path(__file__).resolve().parents[1]

# Flags that are defined here are those of the command that asks for them, and stand in its --help.
flags.disclaim_key_flags()
# The command's settings, {"train.steps": default}, for messages on one that there is not.
_settings: dict[str, Any] = {}
_at_error: list[Callable[[str, int], None]] = []
_at_parsing: list[Callable[[], object]] = []  # definitions of flags that wait for the command line


def at_error(tell: Callable[[str, int], None]) -> None:
    """Have `tell(message, code)` called when a command ends with an error, once that is printed."""
    _at_error.append(tell)


def tune_for_cpu() -> None:
    """Keep the memory of a step in the process; call before JAX's first array.

    XLA's CPU client takes the memory of a step anew each time. From glibc's defaults that is an mmap, and
    zeroing its pages was a tenth to a fifth of a training step (LOG.md). Without asynchronous dispatch
    the memory of two steps never exists at once. Accelerators and other C libraries are not touched.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu":
        keep_memory()


def keep_memory() -> None:
    """Memory that is freed stays in the process, already zeroed by the kernel once (LOG.md)."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in _MALLOPT.items():
            libc.mallopt(option, value)


# M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h.
_MALLOPT = {-8: 1, -4: 0, -1: -1, -2: 64 << 20}


def claim_gpu_memory() -> None:
    """Have JAX take the share of a GPU that layouts count on, unless the user set one; before it starts."""
    # The second name is the older one; JAX refuses both together.
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(hardware.GPU_MEMORY_FRACTION)


def define_config() -> flags.FlagHolder:
    """--config=FILE, and --config.part.name=VALUE for every setting of it."""
    words = (
        "The config file, as configs/7b.py, or configs/7b.py:v4_32 laid out for a slice. Each setting of it "
        "is --config.part.name=VALUE; llama_jax/config lists them all."
    )
    flag = config_flags.DEFINE_config_file("config", None, words, lock_config=True)
    flags.FLAGS["config"].parser = _Page("config")
    _settings.update(config.flatten(config.Run()))
    flags.mark_flag_as_required("config")
    return flag


def define_path(
    name: str, default: str | None, help: str, *, required: bool = False
) -> flags.FlagHolder:
    """--name=PATH, a file or folder on this machine; the address of a bucket is refused at once."""
    return flags.DEFINE(
        _Path(), name, default, help, serializer=flags.ArgumentSerializer(), required=required
    )


def define_hosts() -> None:
    """The flags that `join` reads, of a command that runs on several hosts."""
    flags.DEFINE_string(
        "coordinator", "", "HOST:PORT on which process 0 listens; TPU slices and SLURM know it."
    )
    flags.DEFINE_integer(
        "processes", 0, "Processes of the run, one a host; TPU slices and SLURM know it."
    )
    flags.DEFINE_integer("process", -1, "Which of --processes this is, from 0.")
    flags.DEFINE_integer(
        "host_timeout",
        0,
        "Seconds to wait until every host has started; 0: 60, and 5 more for each host.",
        lower_bound=0,
    )


def join(slice_name: str) -> None:
    """Meet the other hosts, if there are any, before JAX's first array (run/hosts.py).

    From then on a command that ends with an error ends on all of them. ValueError if the flags contradict
    each other, or SLURM the slice.
    """
    from llama_jax.run import exchange, hosts  # which import JAX

    asked = hosts.Peers(flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process)
    given = (bool(asked.coordinator), asked.processes > 0, asked.process >= 0)
    if any(given) and (not all(given) or asked.process >= asked.processes):
        raise ValueError(
            f"--coordinator={asked.coordinator!r} --processes={asked.processes} "
            f"--process={asked.process}: give all three, --process from 0 to --processes - 1"
        )
    if hosts.join(slice_name, asked if any(given) else None, flags.FLAGS.host_timeout):
        at_error(exchange.fail)


class _Path(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        if why := files.why_not_local(argument):
            raise ValueError(why)
        return argument


class _Page(config_flags.config_flags.ConfigFileFlagParser):
    """Finds and reads a page, and adds sources that only the command line names, before it sets anything."""

    def parse(self, path):
        file, colon, slice_ = path.partition(":")
        page = super().parse(find_config(file) + colon + slice_)
        if not isinstance(page, ml_collections.ConfigDict):
            return page  # it could not be loaded, and says so when it is read
        run: Any
        run, place = (page.base, "base.") if "base" in page else (page, "")
        start = re.compile(rf"--?config\.{place}data\.sources\.([^=]*)")
        settings = [found[1] for argument in sys.argv[1:] if (found := start.match(argument))]
        try:
            config.add_sources(run, settings)
        except ValueError as error:  # of which absl would make "flag --config=PAGE: ..."
            raise AttributeError(str(error)) from error
        return page


def find_config(name: str) -> str:
    """The file of a config that may be called without its folder or ending: tiny is configs/tiny.py."""
    for folder in ("", f"{ROOT}/"):
        for file in (name, f"{name}.py", f"configs/{name}", f"configs/{name}.py"):
            if Path(folder + file).is_file():
                return folder + file
    there = {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix(): path
        for path in sorted((ROOT / "configs").rglob("*.py"))
        if "def get_config(" in path.read_text()
    }
    near = config.nearest(name.removeprefix("configs/").removesuffix(".py"), there)
    raise AttributeError(  # of a ValueError absl would make "flag --config=PAGE: ..."
        f"--config={name} is not there; nearest: --config=configs/{near}.py; in configs/ are "
        f"{', '.join(there)}"
    )


class Parts:
    """The settings of `define_parts`, once the command line is parsed."""

    @property
    def value(self) -> Any:
        """A locked ConfigDict, a group of settings for each part."""
        return flags.FLAGS["config"].value


def define_parts(**parts: object) -> Parts:
    """--config.part.name=VALUE for the settings of frozen parts, without a page."""
    values = {name: config.to_dict(part) for name, part in parts.items()}
    _settings.update(
        {f"{part}.{name}": value for part, of in values.items() for name, value in of.items()}
    )
    words = (
        "Not given itself: each setting is --config.part.name=VALUE; llama_jax/config lists them."
    )
    # It reads the command line when it is called.
    _at_parsing.append(
        lambda: config_flags.DEFINE_config_dict(
            "config", ml_collections.ConfigDict(values), help_string=words, lock_config=True
        )
    )
    return Parts()


def frozen(flag: flags.FlagHolder[ml_collections.ConfigDict]) -> config.Run:
    return config.freeze(flag.value)


def unescaped(stop: str) -> str:
    """A stop of nothing but newlines and tabs, as shells hand them over: "\\n" is two characters there."""
    if not re.fullmatch(r"(\\[nrt])+", stop):
        return stop
    return stop.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")


def slice_of(run: config.Run) -> str:
    """The slice that the page was laid out for. ValueError if for none."""
    if run.mesh.hardware == "any":
        raise ValueError(
            f"a slice is needed, as in --config=configs/7b.py:v4_32; there are {hardware.names()}"
        )
    hardware.find_slice(run.mesh.hardware, "mesh.hardware")
    return hardware.name_of(run.mesh.hardware)


def run(
    main: Callable[[], int], *errors: type[Exception], settings: Mapping[str, Any] | None = None
) -> None:
    """Parse the flags, run `main`, exit with its code; 1, or the error's own `exit_code`, and one line for
    what a user can mend.

    settings: what there is behind --config., with defaults, if not those of a run.
    """
    parser = functools.partial(_parse, settings or _settings)
    try:
        app.run(lambda _: _guarded(main, errors), flags_parser=parser)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def _parse(settings: Mapping[str, Any], argv: list[str]) -> list[str]:
    try:
        _check_settings(argv, settings)
        for define in _at_parsing:
            define()
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        _stop(_unknown(error.flagname, settings), 2)
    except flags.Error as error:
        # What a page raised comes with its traceback; its own words are at the end.
        words = str(error).rpartition("\nValueError: ")[2].strip()
        _stop(_lacking(re.findall(r"Flag --(\w+) must have a value", words)) or words, 2)
    except (*USER_ERRORS, TypeError, AttributeError, KeyError) as error:
        _stop(_plain(error), 2)
    if rest[1:]:
        near = "settings are given as --config.part.name=value"
        with contextlib.suppress(AttributeError):
            near = f"try --config={find_config(rest[1].partition(':')[0]) and rest[1]}"
        _stop(f"unexpected argument {rest[1]!r}; {near}", 2)
    return rest


def _guarded(main: Callable[[], int], errors: tuple[type[Exception], ...]) -> int | None:
    logging.set_verbosity(logging.ERROR)  # absl's app sets INFO, at which Orbax writes pages
    claim_gpu_memory()
    try:
        return main()
    except (*USER_ERRORS, *errors) as error:
        _stop(_plain(error), getattr(error, "exit_code", 1))
    except Exception as error:
        if not _at_error:
            raise
        traceback.print_exc()
        _end(_plain(error), 1)


def _check_settings(argv: list[str], settings: Mapping[str, Any]) -> None:
    """ValueError on the first --config.part.name that is not known, or no number where one must be.

    In `argv` itself 1e3 for a whole number becomes 1000, and true or false for a choice of on and off that.
    """
    # Names of sources and choices are the page's own.
    sources = {place.partition(".sources.")[0] for place in settings if ".sources." in place}
    for i, argument in enumerate(argv[1:], 1):
        name, equals, value = argument.partition("=")
        place = name.removeprefix("--config.")
        if place == name or place.partition(".sources.")[0] in sources or ".axes." in name:
            continue
        if place not in settings:
            raise ValueError(_unknown(f"config.{place}", settings))
        kind = type(settings[place])
        if settings[place] in ("on", "off") and value.lower() in ("true", "false"):
            argv[i] = f"{name}={'on' if value.lower() == 'true' else 'off'}"
        if not equals or kind not in (int, float):
            continue
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{name}={value!r} must be a number") from None
        if kind is int and not number.is_integer():
            raise ValueError(f"{name}={value!r} must be a whole number")
        if kind is int:
            argv[i] = f"{name}={int(number) if 'e' in value.lower() or '.' in value else value}"


# What is no setting, though it may be expected.
_NOTES = {
    "tokens": "a run's tokens are train.steps x train.batch_size x data.seq_len: set --config.train.steps",
    "epochs": "a run ends after train.steps x train.batch_size rows: set --config.train.steps",
}


def _unknown(name: str, settings: Mapping[str, Any]) -> str:
    """A message on a flag or setting that there is not."""
    what = "setting" if name.startswith("config.") else "flag"
    last = name.rpartition(".")[2].replace("-", "_")
    if settings and last in _NOTES:
        return f"unknown {what} --{name}; {_NOTES[last]}"
    places = [f"config.{place}" for place in settings]
    if same := [place for place in places if place.rpartition(".")[2] == last]:
        near = same[:3]
    else:
        own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
        near = [_likest(name, places if what == "setting" else [*own, *places])]
    return f"unknown {what} --{name}; nearest: {' or '.join(f'--{one}' for one in near)}"


def _likest(name: str, known: Iterable[str]) -> str:
    """By initials (lr is learning_rate), else by words that are the same, else by letters."""
    asked = name.rpartition(".")[2].replace("-", "_")

    def likeness(other: str):
        words = other.rpartition(".")[2].split("_")
        initials = "".join(word[0] for word in words)
        shared = len({*words} & {*asked.split("_")})
        letters = difflib.SequenceMatcher(None, name, other).ratio()
        return len(words) > 1 and asked == initials, shared, letters

    return max(known, key=likeness)


def _lacking(names: list[str]) -> str:
    """A message on flags that must be given, with the first example of the command's docstring."""
    if not names:
        return ""
    text = sys.modules["__main__"].__doc__ or ""
    example = re.search(r"python -m experiments(?:\\\n|[^`\n])+", text)
    lines = [
        f"{' and '.join(f'--{name}' for name in names)} must be given" + ", as in" * bool(example)
    ]
    if example:
        lines.append(f"  {example[0].strip()}")
    return "\n".join(
        [*lines, "--help says more; configs/ has the configs" * ("config" in names)]
    ).strip()


def _plain(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _stop(message: str, code: int):
    print(f"error: {message}", file=sys.stderr)
    _end(message, code)


def _end(message: str, code: int):
    for tell in _at_error:
        tell(message, code)
    sys.exit(code)
