"""The formats of weights, one record each, and how a checkpoint of any of them is opened."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax import config
from llama_jax.convert import extras, hf, llama2c, meta, meta_params, native, targets
from llama_jax.convert.extras import Extras
from llama_jax.convert.source import CheckpointSource, TokenizerFile, naming, tokenizer_of
from llama_jax.tokenizer import base, hf_added
from llama_jax.tokenizer.hf import hf_json_to_ranks
from llama_jax.tokenizer.llama2c import llama2c_to_sp


def open_checkpoint(path: Path, kind: str, tokenizer_file: str) -> CheckpointSource:
    """kind "" detects it; tokenizer_file "" looks beside the weights. ValueError if there is no model."""
    kind = kind or detect(path)
    format_ = config.choose(FORMATS, kind, "--from_format")
    place = path.parent if not format_.is_file and path.is_file() else path
    source = format_.open(place, tokenizer_file)
    if path.is_file() and path not in source.files:
        raise ValueError(
            f"{path} is not part of the checkpoint in {place}, which is "
            f"{', '.join(file.name for file in source.files[:8])}; give it a folder of its own"
        )
    if source.tokenizer is not None and (tokenizer_file or source.format == "hf"):
        source = _extended(source, tokenizer_file)
    if source.tokenizer is not None:
        check_ids(source.tokenizer.load(), source.model)
    if tokenizer_file:  # another one's files must not go along with it
        kept = {name: text for name, text in source.carried.items() if name not in hf.TOKENIZER}
        source = dataclasses.replace(source, carried=kept)
    return source


def _extended(source: CheckpointSource, tokenizer_file: str) -> CheckpointSource:
    """With the additions to its tokenizer that the small files beside the tokenizer's file tell."""
    assert source.tokenizer is not None
    files, place = source.carried, source.files[0].parent
    if tokenizer_file:
        place = Path(tokenizer_file).expanduser().parent
        beside = [place / name for name in hf_added.FILES]
        files = {file.name: file.read_bytes() for file in beside if file.is_file()}
    with naming(place):
        own = source.tokenizer.load()
        additions, notes = hf_added.read(files, own, source.model.vocab_size)
        if own.eos < 0 and additions.eos < 0:
            reason = (
                "tokenizer.json names no end token, and no tokenizer_config.json beside it does"
            )
            if tokenizer_file:
                raise ValueError(reason)
            notes = (*source.notes, f"a tokenizer that is not read here: {place}: {reason}")
            return dataclasses.replace(source, tokenizer=None, notes=notes)
        if own.bos < 0 and additions.bos < 0:  # as GPT-2: a text begins behind the end of another
            additions = dataclasses.replace(additions, bos=additions.eos)
    tokenizer = dataclasses.replace(source.tokenizer, additions=additions)
    return dataclasses.replace(source, tokenizer=tokenizer, notes=(*source.notes, *notes))


def detect(path: Path) -> str:
    """The format of a file or folder, by what is in it."""
    if path.is_file():
        if path.suffix == ".pth":
            return "meta"
        if path.suffix == ".safetensors" or path.with_name("config.json").is_file():
            return "hf"
        if path.suffix == ".bin":
            return "llama2c"
        raise ValueError(f"{path} is not known: weights are .pth, .safetensors or .bin")
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a folder of weights, or a file of them")
    if native.is_native(path):
        return "native"
    if any(path.glob("consolidated*.pth")):
        return "meta"
    if any((path / name).is_file() for name in hf.WEIGHTS):
        return "hf"
    if run := native.run_of(path):
        raise ValueError(f"{path} is a part of a training run; give the folder of the run: {run}")
    inside = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{path} holds no checkpoint that is known (consolidated.00.pth, model.safetensors, "
        f"pytorch_model.bin, {native.MODEL}); it holds {inside}"
    )


def check_native(folder: Path) -> None:
    """ValueError, with what to do, unless a folder is a converted one or the workdir of a run."""
    kind = detect(folder)
    if kind != "native":
        raise ValueError(
            f"{folder} holds weights of the {kind} format; convert them first: python -m experiments.convert "
            f"--from={folder} --to=NEW, and give NEW"
        )


def _meta(folder: Path, tokenizer_file: str) -> CheckpointSource:
    # LLaMA 1 keeps one tokenizer for all sizes, in the folder above.
    beside = [folder / "tokenizer.model", folder.parent / "tokenizer.model"]
    tokenizer = _tokenizer(tokenizer_file, beside)
    return meta.open_folder(folder, tokenizer, _pieces(tokenizer))


def _hf(folder: Path, tokenizer_file: str) -> CheckpointSource:
    beside = [folder / "tokenizer.model", folder / "original/tokenizer.model"]
    tokenizer, notes = _tokenizer(tokenizer_file, beside), ()
    if tokenizer is None and (folder / "tokenizer.json").is_file():
        try:
            tokenizer = read_tokenizer(folder / "tokenizer.json")
        except (
            ValueError
        ) as error:  # `tokenizers` is absent, or cannot read it; the file goes along as it is
            notes = (f"a tokenizer that is not read here: {error}",)
    source = hf.open_folder(folder, tokenizer)
    return dataclasses.replace(source, notes=(*source.notes, *notes))


def _llama2c(file: Path, tokenizer_file: str) -> CheckpointSource:
    pieces = llama2c.read_header(file)[1].vocab_size
    beside = [file.with_name(f"tok{pieces}.bin"), file.with_name("tokenizer.bin")]
    return llama2c.open_file(file, _tokenizer(tokenizer_file, beside))


def _native(folder: Path, tokenizer_file: str) -> CheckpointSource:
    return native.open_folder(folder, _tokenizer(tokenizer_file, []))


def _tokenizer(given: str, beside: list[Path]) -> TokenizerFile | None:
    found = Path(given).expanduser() if given else next((f for f in beside if f.is_file()), None)
    return read_tokenizer(found) if found else None


def read_tokenizer(file: Path) -> TokenizerFile:
    """A SentencePiece model, tiktoken ranks, a tokenizer.json (Llama 3's as ranks), llama2.c's tokenizer."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"--tokenizer={file} cannot be read: {error.strerror}") from error
    try:
        if content[:1] == b"{":
            with contextlib.suppress(ValueError):  # another tokenizer than Llama 3's
                return TokenizerFile("bpe", hf_json_to_ranks(content))
        if file.suffix == ".bin":
            return TokenizerFile("sp", llama2c_to_sp(content))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    found = tokenizer_of(content)
    base.load(config.TokenizerConfig(found.kind, str(file)))  # an error names the file
    return found


def check_ids(tokenizer: base.Tokenizer, model: config.Model) -> None:
    """ValueError if the tokenizer gives ids that have no embedding. Fewer are right: rows are padded."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than model.vocab_size="
            f"{model.vocab_size}; it is another model's: give the right one with --tokenizer=FILE"
        )


def _pieces(tokenizer: TokenizerFile | None) -> int:
    return tokenizer.load().vocab_size if tokenizer else 0


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of weights: all that is known of it outside its own files.

    open(folder, the tokenizer's file or "") gives the checkpoint. A format that is written has a target, of
    (folder, model, dtypes); `extras`, the small files beside the weights; and `check`, which raises
    ValueError on a model that it cannot hold.
    """

    open: Callable[[Path, str], CheckpointSource]
    target: Any = None  # a class of job.Target
    extras: Extras | None = None
    check: Callable[[config.Model], None] = lambda model: None
    keeps_context: bool = True  # has a word for the positions that a model was trained for
    is_file: bool = False  # and is given to `open` as one


FORMATS = {
    "native": Format(_native, targets.Native, extras.native),
    "hf": Format(_hf, targets.HuggingFace, extras.hf, hf.check_expressible),
    "meta": Format(
        _meta, targets.Meta, extras.meta, meta_params.check_expressible, keeps_context=False
    ),
    "llama2c": Format(_llama2c, is_file=True),
}
WRITTEN = {kind: format_ for kind, format_ in FORMATS.items() if format_.target}
