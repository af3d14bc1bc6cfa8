"""Write a quantized checkpoint in another format: the same codes in other words, module by module, then checked.

A module is read by its reader, refused or written by the target's writer, and freed; every other tensor is copied byte
for byte. So a model is never in memory as a whole. When a shard stands, each module in it is decoded a second time,
from the old files and from the new ones, by decoders that share nothing with readers and writers (decoders.py): what is
not the same number is an error, and the folder never appears.

"float" dequantizes to a plain checkpoint. What a format can't hold is refused; `lossy="requantize"` rounds those
weights again, to the nearest codes of the target's fallback scheme, and says which.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, InputError
from lowbit.io.checkpoint import copy_files
from lowbit.io.conversion import Conversion, Options
from lowbit.io.folder import atomic_folder, check_destination
from lowbit.io.gguf_blocks import BY_NAME
from lowbit.io.gguf_write import GgufWriter
from lowbit.io.reading import reader_of
from lowbit.io.source import INDEX, Source, open_source
from lowbit.io.stored import Reader, Stored
from lowbit.io.targets import FLOAT, TARGETS, TOOL, Target
from lowbit.io.tensorfile import Files, TensorFile, forget
from lowbit.io.tensorwriter import TensorWriter, header_bound
from lowbit.io.verify import Written, verify_config, verify_shard
from lowbit.numerics.scheme import QuantScheme, check_fits
from lowbit.tensors import PackedWeight

GGUF = {f"gguf-{name.lower()}": BY_NAME[name] for name in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")}
FORMATS = (*TARGETS, FLOAT, "gguf", *GGUF)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert(model: str | Path, out: str | Path, target: str, options: Options = Options()) -> Conversion:
    """Write `model` as `target` into the folder `out`, which appears whole and checked or not at all.

    Raises InputError for a target that is unknown or can't hold these codes, CheckpointError for a damaged source or a
    result that does not decode to the same numbers.
    """
    out = Path(out)
    if target not in FORMATS:
        raise InputError(f"there is no format {target!r}; choose one of {', '.join(FORMATS)}")
    if options.lossy not in (None, "requantize"):
        raise InputError(f"there is no lossy way {options.lossy!r}; the one there is is called requantize")
    if Path(model).suffix == ".gguf":
        raise InputError(
            f"lowbit converts checkpoint folders, to GGUF but not from it; load {model} with lowbit.load, or round it "
            "anew with lowbit quantize"
        )
    with open_source(model) as source:
        if target.startswith("gguf"):
            return _to_gguf(source, out, target, options)
        if source.quantization is None:
            raise InputError(f"{source.name} is not quantized, so there are no codes to convert; use lowbit quantize")
        check_destination(out, options.overwrite, _needed_bytes(source, target), source.folder)
        files = Files.open(source.folder / shard for shard in source.shards)
        reader = reader_of(source.quantization, files)
        _check_not_rotated(source, reader, target)
        if not reader.modules and not reader.experts:
            raise CheckpointError(f"{source.name} says it is quantized, but none of its tensors is; get a clean copy")
        with atomic_folder(out, options.overwrite) as folder:
            job = _Job(source, files, reader, target, options, Conversion(source.name, target))
            job.write(folder)
            if options.verify:
                verify_config(folder, source, Written(target, job.result.schemes, job.dtype))
    return job.result


def _check_not_rotated(source: Source, reader: Reader, target: str) -> None:
    """Raise InputError for a model whose layers turn their inputs at run time."""
    if module := reader.rotated():
        raise InputError(
            f"{module} of {source.name} turns its input at run time, for which {target} has no form; load the "
            "model with lowbit.load, or quantize the original without rotations at run time"
        )


def _to_gguf(source: Source, out: Path, target: str, options: Options) -> Conversion:
    """One .gguf file; exact for "gguf", rounded for the rest, which a quantized source must ask for as lossy."""
    if out.suffix != ".gguf":
        raise InputError(f"GGUF is one file: name it with -o {out.with_suffix('.gguf')}")
    if out.exists() and not (options.overwrite and out.is_file()):
        raise InputError(f"{out} exists already; choose another name, or replace it with --overwrite")
    files = Files.open(source.folder / shard for shard in source.shards)
    reader = reader_of(source.quantization, files) if source.quantization is not None else None
    if reader is not None:
        _check_not_rotated(source, reader, target)
    if reader is None and target == "gguf":
        raise InputError(f"{source.name} is not quantized; choose how to round it: {', '.join(GGUF)}")
    if reader is not None and target != "gguf" and options.lossy is None:
        raise InputError(
            f"{source.name} is quantized, and {target} rounds it again; ask for that with --lossy requantize"
        )
    writer = GgufWriter(source, files, reader, GGUF.get(target))
    out.parent.mkdir(parents=True, exist_ok=True)
    count = writer.write(out, TOOL)
    result = Conversion(source.name, target, warnings=[*(reader.warnings if reader else ()), *sorted(writer.fallbacks)])
    if reader is not None:
        result.schemes = {module: reader.read(module).weight.scheme for module in reader.modules}
    if options.verify and target == "gguf":
        result.verified = writer.verify(out)
    assert count
    return result


def _needed_bytes(source: Source, target: str) -> int:
    return source.bytes * (4 if target == FLOAT else 1)


@dataclass
class _Job:
    """One conversion: the source, how it is read, what is written, and what was done so far."""

    source: Source
    files: Files
    reader: Reader
    name: str
    options: Options
    result: Conversion
    done: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's 16-bit weights, or the one that was asked for."""
        config = self.source.config
        stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        return self.options.dtype or _DTYPES.get(stored, torch.bfloat16)

    def write(self, folder: Path) -> None:
        """All shards, config.json, the index and the other files."""
        owners = {name: module for module in self.reader.modules for name in self.reader.names(module)}
        owners |= {name: group for group in self.reader.experts for name in self.reader.names(group)}
        if self.name != FLOAT and self.reader.experts:
            raise InputError(f"experts in 3-D can only be written as {FLOAT}; no other format here has a form for them")
        weight_map: dict[str, str] = {}
        total = 0
        with ThreadPoolExecutor(1, "checker") as checker:  # checks a shard, still in the page cache, beside the next
            checks: list[Future[int]] = []
            for shard in self.source.shards:
                modules = self._shard(shard, folder / shard, owners)
                weight_map |= dict.fromkeys(TensorFile.open(folder / shard).entries, shard)
                total += (folder / shard).stat().st_size
                self._collect(checks[-1:])
                checks.append(checker.submit(self._checked, folder / shard, modules))
            self._collect(checks[-1:])
        if (self.source.folder / INDEX).is_file():
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_files(self.source, folder)
        self._write_config(folder, owners)
        self.result.warnings = list(self.reader.warnings)

    def _shard(self, shard: str, out: Path, owners: dict[str, str]) -> list[str]:
        """Write one shard; the modules whose codes it holds."""
        file, modules = TensorFile.open(self.source.folder / shard), []
        with TensorWriter(out, header_bound(list(file.entries))) as writer:
            for name in sorted(file.entries, key=lambda name: file.entries[name].start):
                owner = owners.get(name)
                if name in self.options.drop:
                    continue
                if owner is None:
                    writer.copy(name, file)
                elif name == self.reader.names(owner)[0]:
                    for key, tensor in self._module(owner).items():
                        writer.add(key, tensor)
                    modules.append(owner)
                    self._step("converting", len(self.reader.modules) + len(self.reader.experts))
        return modules

    def _checked(self, shard: Path, modules: Sequence[str]) -> int:
        """How many modules of a new shard were found equal; the old one is not needed after that."""
        again = {*self.result.requantized, *self.reader.experts}
        same_codes = [module for module in modules if module not in again]
        before, written = self.source.quantization or {}, Written(self.name, self.result.schemes, self.dtype)
        count = verify_shard(shard, same_codes, self.files, before, written) if self.options.verify else 0
        with (self.source.folder / shard.name).open("rb", buffering=0) as file:
            forget(file)
        return count

    def _collect(self, checks: Sequence["Future[int]"]) -> None:
        """Wait for checks and count what they found equal; raises what they raised."""
        self.result.verified += sum(check.result() for check in checks)

    def _step(self, stage: str, total: int) -> None:
        self.done += 1
        self.options.progress(stage, self.done, total)

    def _module(self, module: str) -> dict[str, Tensor]:
        """The target's tensors for one quantized module."""
        if module in self.reader.experts:
            matrices = [part.weight.dequantize(self.dtype).T for part in self.reader.read_experts(module)]
            return {module: torch.stack(matrices)}  # [E, K, N], as gpt-oss keeps them
        stored = self.reader.read(module)
        if self.name == FLOAT:
            self.result.schemes[module] = stored.weight.scheme
            return {f"{module}.weight": stored.weight.dequantize(self.dtype)}
        target = TARGETS[self.name]
        if why := target.refusal(stored):
            stored = self._requantized(module, stored, target, why)
        self.result.schemes[module] = stored.weight.scheme
        return target.tensors(module, stored, self.dtype)

    def _requantized(self, module: str, stored: Stored, target: Target, why: str) -> Stored:
        """The module's weight rounded again, where that was asked for; its activations go to 16 bits."""
        if self.options.lossy is None:
            raise InputError(
                f"{self.name} can't hold the codes of {module}: {why}. To round its weights again, which loses "
                "something, add --lossy requantize"
            )
        scheme = self.options.scheme or QuantScheme.parse(target.fallback)
        check_fits(scheme.weights, stored.weight.shape[1], module)
        weight = PackedWeight.from_float(stored.weight.dequantize(), scheme, self.dtype)
        if again := target.refusal(Stored(weight)):
            raise InputError(f"{self.name} can't hold {module} under {scheme} either: {again}")
        self.result.requantized.append(module)
        return Stored(weight)

    def _write_config(self, folder: Path, owners: dict[str, str]) -> None:
        config = {key: value for key, value in self.source.config.items() if key != "compression_config"}
        config.pop("quantization_config", None)
        if self.name == FLOAT:
            config["dtype"] = str(self.dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)
        else:
            target = TARGETS[self.name]
            config["quantization_config"] = target.config(self.result.schemes, self._skipped(owners), self.dtype)
            if target.beside:
                text = json.dumps(config["quantization_config"], indent=2)
                (folder / target.beside).write_text(text + "\n")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _skipped(self, owners: dict[str, str]) -> list[str]:
        """Modules with a 2-D float weight that is no embedding, and the head: what is not quantized."""
        entries = {name: self.files.entry(name) for name in self.files.places if name not in owners}
        names = {
            name.removesuffix(".weight")
            for name, entry in entries.items()
            if name.endswith(".weight") and len(entry.shape) == 2 and "embed" not in name and ".wte" not in name
        }
        return sorted(names | ({"lm_head"} - set(self.result.schemes)))
