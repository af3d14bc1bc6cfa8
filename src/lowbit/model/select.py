"""Which weights of a model are quantized, under which scheme, and why the others are not.

What can be quantized are the matrices that multiply activations inside the decoder blocks: the weights of nn.Linear,
and the experts of a mixture, 3-D parameters [E, N, K]. Rules name modules by globs ("*.down_proj"); a later rule
overrides an earlier one. The head and other linears outside the blocks are quantized only when a rule names them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lowbit.errors import InputError, SchemeError
from lowbit.numerics.scheme import QuantScheme, check_fits
from lowbit.report import Coverage, Skipped

MIN_FEATURES = 16  # a linear with fewer inputs or outputs (a router, a gate) costs nothing and decides much


@dataclass(frozen=True)
class Rule:
    """Modules whose name matches `glob` get `scheme`; None leaves them as they are."""

    glob: str
    scheme: QuantScheme | None

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """The rule that GLOB=SCHEME writes. Raises InputError."""
        glob, separator, scheme = text.rpartition("=")
        if not separator or not glob:
            raise InputError(f"the rule {text!r} is not GLOB=SCHEME, as in '*.down_proj=w8a16'")
        return cls(glob, QuantScheme.parse(scheme))


@dataclass(frozen=True)
class Selection:
    """schemes: module or expert parameter -> scheme, in the model's order. skipped: parameter -> reason.

    eligible: the parameters that multiply activations inside the blocks, quantized or not.
    """

    schemes: dict[str, QuantScheme]
    skipped: dict[str, str]
    eligible: frozenset[str]


def select(
    model: nn.Module,
    blocks: str,
    scheme: QuantScheme,
    rules: Sequence[Rule] = (),
    splittable: Collection[str] | None = None,
) -> Selection:
    """The scheme of each weight under `scheme` and `rules`, for a model whose blocks are the list called `blocks`.

    splittable names the 3-D parameters that the checkpoint keeps as one [N, K] matrix per expert (None: all of them).
    Raises InputError for a rule that matches nothing, SchemeError for a group that does not divide a layer.
    """
    tied = _tied_linears(model)
    schemes, skipped, eligible = {}, {}, set()
    candidates = dict(_candidates(model))
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    _check_rules(rules, candidates, owners)
    for name, shape in candidates.items():
        inside = name.startswith(f"{blocks}.")
        parameter = name if len(shape) == 3 else f"{name}.weight"
        if inside:
            eligible.add(parameter)
        rule = next((rule for rule in reversed(rules) if fnmatchcase(name, rule.glob)), None)
        chosen = rule.scheme if rule else scheme if inside else None
        reason = _refusal(name, shape, chosen, splittable)
        if rule is not None and rule.scheme is None:
            reason = f"is left as it is by the rule {rule.glob!r}"
        elif name in tied:
            reason = "shares its weight with the embedding"
        elif rule is None and not inside:
            reason = "stands outside the decoder blocks; name it in a rule to quantize it"
        if reason is None and chosen is not None:
            check_fits(chosen.weights, shape[-1], name)
            if not inside and chosen.activations is not None and not chosen.activations.dynamic:
                raise SchemeError(
                    f"{name} stands outside the decoder blocks, where inputs are not observed, so {chosen} can't find "
                    "its scale; give it a dynamic scheme such as w8a8"
                )
            schemes[name] = chosen
        else:
            skipped[parameter] = reason or "no scheme"
    quantized = {name if len(candidates[name]) == 3 else f"{name}.weight" for name in schemes}
    for name, reason in _others(model, quantized | set(skipped)):
        skipped[name] = reason
        if reason.startswith("Conv1D"):
            eligible.add(name)
    if not schemes:
        first = next((name for name in skipped if name in eligible), "the model has no linear layer in its blocks")
        raise InputError(f"nothing is left to quantize: {first} {skipped.get(first, '')}".rstrip())
    return Selection(schemes, skipped, frozenset(eligible))


def _candidates(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape of the weight) of every linear [N, K], and of every 3-D parameter."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, tuple(module.weight.shape)
        for parameter_name, parameter in module.named_parameters(prefix=name, recurse=False):
            if parameter.dim() == 3:
                yield parameter_name, tuple(parameter.shape)


def _tied_linears(model: nn.Module) -> set[str]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name for name, module in linears if id(module.weight) in embeddings}


def _check_rules(rules: Sequence[Rule], candidates: Collection[str], owners: Collection[str]) -> None:
    """Raise InputError for a rule that changes nothing; one that leaves layers as they are may also name a norm."""
    for rule in rules:
        names = candidates if rule.scheme else {*candidates, *owners}
        if not any(fnmatchcase(name, rule.glob) for name in names):
            ends = list(dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in candidates))[:12]
            raise InputError(
                f"{rule.glob!r} matches no layer of this model that can be quantized; names end in {', '.join(ends)}"
            )


def _refusal(
    name: str, shape: tuple[int, ...], scheme: QuantScheme | None, splittable: Collection[str] | None
) -> str | None:
    """Why this weight can't be quantized, or None."""
    if len(shape) == 2:
        return f"is only {shape[0]} x {shape[1]}" if min(shape) < MIN_FEATURES else None
    if splittable is not None and name not in splittable:
        return "its experts are one 3-D tensor on disk, for which compressed-tensors has no form"
    if scheme is None:
        return None
    if scheme.weights.format.kind == "codebook":
        return "bitsandbytes has no form for experts"
    if not scheme.weights.symmetric:
        return "readers of compressed-tensors know no zero-points for experts; choose a symmetric scheme"
    if scheme.activations is not None and not scheme.activations.dynamic:
        return "static activation scales of experts are not supported; choose a dynamic scheme"
    return None


def _others(model: nn.Module, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every other parameter, with what it is."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if name in known:
                continue
            kind = type(module).__name__
            if isinstance(module, nn.Embedding):
                yield name, "embedding"
            elif kind == "Conv1D" and parameter.dim() == 2:
                yield name, "Conv1D keeps its weight transposed, for which compressed-tensors has no form"
            elif parameter.dim() == 1:
                yield name, "bias" if name.endswith("bias") else "norm or vector"
            else:
                yield name, f"a parameter of {kind}, not of a linear layer"


def coverage(model: nn.Module, selection: Selection) -> Coverage:
    """How much of the model `selection` quantizes; called before the weights are replaced."""
    parameters = dict(model.named_parameters())
    skipped = tuple(
        Skipped(name, parameters[name].numel(), parameters[name].nbytes, reason)
        for name, reason in selection.skipped.items()
        if name in parameters
    )
    total = sum(parameter.numel() for parameter in parameters.values())
    quantized = total - sum(item.parameters for item in skipped)
    left = sum(item.parameters for item in skipped if item.name in selection.eligible)
    inside = sum(parameters[name].numel() for name in selection.eligible)
    return Coverage(total, quantized, (inside - left) / inside if inside else 0.0, skipped)
