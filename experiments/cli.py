"""What every command shares: flags in, one clear line out when something is wrong."""

import contextlib
import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from llama_jax import config, files
from llama_jax.analysis import hardware

# What a user can mend: a message, no traceback.
USER_ERRORS = (ValueError, OSError)


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
    flag = config_flags.DEFINE_config_file("config", None, "The page to run.", lock_config=True)
    flags.FLAGS["config"].parser = _Page("config")
    flags.mark_flag_as_required("config")
    return flag


def define_path(
    name: str, default: str | None, help: str, *, required: bool = False
) -> flags.FlagHolder:
    """--name=PATH, a file or folder on this machine; the address of a bucket is refused at once."""
    return flags.DEFINE(
        _Path(), name, default, help, serializer=flags.ArgumentSerializer(), required=required
    )


class _Path(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        if why := files.why_not_local(argument):
            raise ValueError(why)
        return argument


class _Page(config_flags.config_flags.ConfigFileFlagParser):
    """Reads a page, and adds the sources that only the command line names, before it sets anything."""

    def parse(self, path):
        page = super().parse(path)
        if not isinstance(page, ml_collections.ConfigDict):
            return page  # it could not be loaded, and says so when it is read
        run, place = (page.base, "base.") if "base" in page else (page, "")
        start = re.compile(rf"--?config\.{place}data\.sources\.([^=]*)")
        settings = [found[1] for argument in sys.argv[1:] if (found := start.match(argument))]
        try:
            config.add_sources(run, settings)
        except ValueError as error:  # of which absl would make "flag --config=PAGE: ..."
            raise AttributeError(str(error)) from error
        return page


def define_parts(**parts: object) -> flags.FlagHolder:
    """--config.part.name=VALUE for the settings of frozen parts, without a page.

    ml_collections reads the command line here, so this is where a wrong setting is refused.
    """
    values = {name: config.to_dict(part) for name, part in parts.items()}
    known = [f"--config.{part}.{name}" for part, inside in values.items() for name in inside]
    if message := _unknown_setting(sys.argv, known):
        _stop(message, 2)
    try:
        return config_flags.DEFINE_config_dict(
            "config", ml_collections.ConfigDict(values), lock_config=True
        )
    except (*USER_ERRORS, TypeError, flags.Error) as error:
        _stop(_plain(error), 2)


def frozen(flag: flags.FlagHolder) -> config.Run:
    return config.freeze(flag.value)


def slice_of(run: config.Run) -> str:
    """The slice that the page was laid out for. ValueError if for none."""
    if run.mesh.hardware == "any":
        raise ValueError(
            f"a slice is needed, as in --config=configs/7b.py:v4_32; there are {hardware.names()}"
        )
    hardware.find_slice(run.mesh.hardware, "mesh.hardware")
    return hardware.name_of(run.mesh.hardware)


def run(main: Callable[[], int], *errors: type[Exception], settings: Sequence[str] = ()) -> None:
    """Parse the flags, run `main`, exit with its code; 1, or the error's own `exit_code`, and one line for
    what a user can mend.

    settings: what there is behind --config., for the message on one that there is not; a run's if empty.
    """
    known = [f"--config.{place}" for place in settings or config.flatten(config.Run())]
    try:
        app.run(lambda _: _guarded(main, errors), flags_parser=functools.partial(_parse, known))
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def _parse(known: list[str], argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        # What a page raised comes with its traceback; its own words are at the end.
        _stop(str(error).rpartition("\nValueError: ")[2].strip(), 2)
    except (*USER_ERRORS, TypeError, AttributeError, KeyError) as error:
        _stop(_unknown_setting(argv, known) or _plain(error), 2)
    if rest[1:]:
        _stop(f"unexpected argument {rest[1]!r}; settings are given as --config.part.name=value", 2)
    return rest


def _guarded(main, errors) -> int:
    logging.set_verbosity(logging.ERROR)  # absl's app sets INFO, at which Orbax writes pages
    claim_gpu_memory()
    try:
        return main()
    except (*USER_ERRORS, *errors) as error:
        _stop(_plain(error), getattr(error, "exit_code", 1))


def _unknown_setting(argv: list[str], known: list[str]) -> str:
    """A message on the first --config.part.name that is not known; "" if there is none."""
    # Names of sources and choices are the page's own.
    sources = {place.partition(".sources.")[0] for place in known if ".sources." in place}
    for argument in argv[1:]:
        name = argument.partition("=")[0]
        is_open = name.partition(".sources.")[0] in sources or ".axes." in name
        if name.startswith("--config.") and not is_open and name not in known:
            return f"unknown setting {name}; nearest: {config.nearest(name, known)}"
    return ""


def _plain(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _stop(message: str, code: int):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
