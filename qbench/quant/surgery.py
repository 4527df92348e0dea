"""Turn a float net into a quantized one by rules; say what became of every tensor."""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from qbench.quant.float_inputs import Tracer, float_inputs, layers
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Factory, Rule
from qbench.quant.packing import Part
from qbench.quant.quantizer import Quantizer

FLOAT = 32  # a width of 32 means: left in floating point


def _is_kind(module: nn.Module, kind: str) -> bool:
    return any(fnmatchcase(type(module).__name__, k) for k in kind.split("|"))


def _weights(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, torch.Tensor) else 0


def pairs(model: nn.Module) -> dict[str, str]:
    """{producer: consumer} for modules whose output only one other module reads, from the traced graph."""
    graph = Tracer().trace(model)
    found = {}
    for node in graph.nodes:
        if node.op == "call_module" and len(node.users) == 1:
            user = next(iter(node.users))
            if user.op == "call_module":
                found[str(node.target)] = str(user.target)
    return found


def channels(model: nn.Module) -> dict[str, int]:
    """{module: channels of its output}, from the traced graph: those of the last layer up to it that has any."""
    found: dict[str, int] = {}
    for node in Tracer().trace(model).nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            own = [getattr(module, a) for a in ("out_channels", "out_features", "num_features") if hasattr(module, a)]
            before = [found[str(n.target)] for n in node.all_input_nodes if str(n.target) in found]
            if own or before:
                found[str(node.target)] = (own or before)[0]
    return found


def _hits(names: Sequence[str], match: str) -> list[str]:
    """Those of `names` that a pattern fits: a glob, or @first, @last or @ends among them."""
    ends = {"@first": names[:1], "@last": names[-1:], "@ends": [*names[:1], *names[-1:]]}
    return list(dict.fromkeys(ends[match])) if match in ends else [n for n in names if fnmatchcase(n, match)]


def matches(model: nn.Module, rules: Sequence[Rule], asked: Collection[str] = ()) -> dict[str, Rule]:
    """{module name: the first rule that matches it}; a rule that matches nothing at all is an error.

    asked: modules that no rule may keep as they are.
    Errors: ValueError that names the rule and lists the candidates of its kind.
    """
    modules = {name: m for name, m in model.named_modules() if name}
    consumers = pairs(model) if any(r.pair for r in rules) else {}
    chosen: dict[str, Rule] = {}
    for rule in rules:
        names = [n for n, m in modules.items() if _is_kind(m, rule.kind)]
        hits = _hits(names, rule.match)
        if rule.below is not None:
            hits = [n for n in hits if _weights(modules[n]) < rule.below]
        if rule.pair:
            hits = [n for n in hits if n in consumers and _is_kind(modules[consumers[n]], rule.pair)]
        if not hits and not rule.optional:
            shown = ", ".join(names[:30]) or "none"
            raise ValueError(f"rule '{rule.match}' (kind {rule.kind}) matches nothing; candidates: {shown}")
        for name in hits:
            if rule.keep is None or name not in asked:
                chosen.setdefault(name, rule)
    return chosen


def _asked(
    model: nn.Module, rules: Sequence[Rule], entries: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """{module: the first of `entries` that fits it}, of layers and of what else the rules give bits.

    Errors: ValueError that names the entry that fits nothing and lists what there is.
    """
    layers = [n for n, m in model.named_modules() if n and _is_kind(m, Rule.kind)]
    others = [r for r in rules if r.keep is None and _width(r.replace) is not None]
    kinds = "|".join(r.kind for r in others)
    names = [n for n, m in model.named_modules() if n and (n in layers or (kinds and _is_kind(m, kinds)))]
    found: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        match = entry["match"]
        if not (hits := _hits(layers if match.startswith("@") else names, match)):
            raise ValueError(f"layer_bits: '{match}' fits nothing; there are {', '.join(names)}")
        if all(name in found for name in hits):
            raise ValueError(f"layer_bits: '{match}' comes too late: patterns before it fit all that it fits")
        for name in hits:
            found.setdefault(name, entry)
    return found


def _width(factory: Factory | None) -> float | None:
    """The `bits` that a factory is given; None where it takes none."""
    return getattr(factory, "keywords", {}).get("bits")


def _at(rule: Rule, entry: Mapping[str, Any] | None) -> tuple[Rule, str]:
    """The rule with the widths of `entry` for its own, without slots of 32 bits; of which sides it has any ('wa')."""
    slots: dict[str, Any] = {}
    took = ""
    for site in ("weight", "input", "output", "replace", "error"):
        factory = getattr(rule, site)
        own = _width(factory)
        side = {"weight": "w", "error": ""}.get(site, "a")
        width = own if entry is None or not side else entry[side]
        if factory is None or (own is None and (site == "replace" or width != FLOAT)):
            continue  # nothing there, or of a width of its own
        slots[site] = None if width == FLOAT else factory if width == own else partial(factory, bits=width)
        took += side
    left = {s: slots.get(s, getattr(rule, s)) for s in ("weight", "input", "output", "error", "replace")}
    keep = None if any(left.values()) else rule.keep or "left in float (32 bits asked for)"
    return replace(rule, **left, keep=keep), took


def quantize(model: nn.Module, rules: Sequence[Rule], layer_bits: Sequence[Mapping[str, Any]] = ()) -> dict[str, str]:
    """Apply `rules` to `model` in place; return {module name: reason} for what stays as it is.

    layer_bits: widths of single layers, as `qbench.config.layer_bits` gives them; they go before those of the rules,
    and before the reasons of a rule that keeps a layer.
    Errors: ValueError where a rule or a width takes effect nowhere.
    """
    asked = _asked(model, rules, layer_bits)
    chosen = matches(model, rules, asked)
    consumers = pairs(model) if any(r.pair for r in rules) else {}
    counts = channels(model) if any(r.channels for r in rules) else {}
    kept, took = {}, {entry["match"]: "" for entry in layer_bits}
    for name, rule in chosen.items():
        entry = asked.get(name)
        rule, sides = _at(rule, entry)
        if entry is not None:
            took[entry["match"]] += sides
        if rule.keep is not None:
            kept[name] = rule.keep
            continue
        module = model.get_submodule(name)
        if rule.replace is not None and rule.pair:
            new = rule.replace(module, "replace", pair=model.get_submodule(consumers[name]))
            _put(model, consumers[name], nn.Identity())
        elif rule.replace is not None:
            new = rule.replace(module, "replace", **({"channels": counts[name]} if rule.channels else {}))
        else:
            new = QuantLayer(module)  # type: ignore[arg-type]
        if isinstance(new, QuantLayer):
            _fill(new, rule)
        _put(model, name, new)
    for entry in layer_bits:
        _check_took(entry, took[entry["match"]])
    return kept


def _check_took(entry: Mapping[str, Any], took: str) -> None:
    """Errors: ValueError where a width of `entry` took effect nowhere."""
    lost = [side for side in ("w", "a") if side not in took and entry[side] != FLOAT]
    if lost and not (entry["either"] and took):
        what = " and ".join({"w": "weights", "a": "activations"}[side] for side in lost)
        raise ValueError(
            f"layer_bits: '{entry['match']}' fits no quantizer of {what}. plan=true shows what there is; with "
            "protocol=uniform each layer but the first and the last has one of its weights and one of its input"
        )


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Set `new` in the place of the module `name`, under all names that it has: a net may use one ReLU in many."""
    old = model.get_submodule(name)
    for other in [n for n, m in model.named_modules(remove_duplicate=False) if m is old]:
        model.set_submodule(other, new)


def _fill(layer: QuantLayer, rule: Rule) -> None:
    """Attach the rule's quantizers; each factory is called with the layer and the site's name."""
    if rule.corrected != "none" and layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight_shape[0]))
    if rule.input is not None:
        layer.input_quantizer = rule.input(layer, "input")
    if rule.output is not None:
        layer.output_quantizer = rule.output(layer, "output")
    if rule.error is not None:
        layer.error_quantizer = rule.error(layer, "error")
    if rule.weight is not None:
        layer.set_weight_quantizer(rule.weight(layer, "weight"))


def activation_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """{name: quantizer} of all that see activations: input and output slots, and those in place of a ReLU."""
    other = {id(q) for _, m in quant_layers(model) for q in (m.weight_quantizer, m.error_quantizer) if q is not None}
    nested = {id(c) for m in model.modules() if isinstance(m, Quantizer) for c in m.modules() if c is not m}
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, Quantizer) and id(m) not in other and id(m) not in nested
    }


def _reason(owner: nn.Module, leaf: str, owner_name: str, kept: dict[str, str]) -> str:
    if owner_name in kept:
        return kept[owner_name]
    if isinstance(owner, nn.modules.batchnorm._BatchNorm):
        return "batch-norm"
    if leaf == "bias":
        return "bias"
    return "no rule matches"


def manifest(model: nn.Module, kept: dict[str, str]) -> dict[str, Any]:
    """Every tensor with its bits, granularity and signedness, or why it was left alone; every activation quantizer.

    `float_inputs`: which of the `layers` compute on float inputs, and why.
    """
    weights: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        entry: dict[str, Any] = {"shape": list(parameter.shape), "numel": parameter.numel()}
        if isinstance(owner, QuantLayer) and leaf == "weight" and owner.weight_quantizer is not None:
            codes, scales = owner.weight_quantizer.stored_bits(owner.source())
            entry |= owner.weight_quantizer.describe()
            entry |= {"shape": list(owner.weight_shape), "numel": int(torch.Size(owner.weight_shape).numel())}
            entry |= {"stored_bits": codes + scales, "scale_bits": scales}
        elif isinstance(owner, Quantizer):
            entry |= {"part_of": type(owner).__name__}
        else:
            entry |= {"bits": 32, "why": _reason(owner, leaf, owner_name, kept)}
        weights[name] = entry
    activations = {name: q.describe() for name, q in activation_quantizers(model).items()}
    errors = {
        name: q.describe()
        for name, m in model.named_modules()
        if isinstance(q := getattr(m, "error_quantizer", None), Quantizer)  # of a layer, or of what replaced a ReLU
    }
    found = {"weights": weights, "activations": activations, "errors": errors, "size": size(model)}
    return found | {"float_inputs": float_inputs(model, kept), "layers": len(layers(model))}


def packed(model: nn.Module) -> dict[Hashable, Part]:
    """All that a packed file of the net holds, by name: codes, scales, tables and whatever stays in float.

    Of a quantized weight what its quantizer stores, and its scales; of an activation's quantizer what a device needs to
    make codes; tables that layers share once, under their own key; the rest as 32-bit floats, batch-norm statistics
    included. A batch-norm that is folded into a layer is that layer's bias. Error quantizers, and modules that say they
    are `training_only`, are not there in inference.
    """
    found: dict[Hashable, Part] = {}
    done: set[int] = set()

    def leave_out(*modules: nn.Module | None) -> None:
        done.update(id(t) for m in modules if m is not None for t in (*m.parameters(), *m.buffers()))

    for name, layer in quant_layers(model):
        leave_out(layer.error_quantizer)
        q, source = layer.weight_quantizer, layer.source().detach()
        if q is not None:
            leave_out(q)
            done.add(id(layer.weight))
            parts = q.stored(source) | q.grid(source.float()).tables()
            found |= {f"{name}.weight.{part}": held for part, held in parts.items()} | q.shared()
        elif layer.folded_norm is not None:
            done.add(id(layer.weight))
            found[f"{name}.weight"] = Part(source)
        if (bias := layer.inference_bias()) is not None:
            leave_out(layer.folded_norm)
            done.add(id(layer.bias))
            found[f"{name}.bias"] = Part(bias.detach())
    for name, q in activation_quantizers(model).items():
        leave_out(q)
        found |= {f"{name}.{part}": held for part, held in q.grid().tables(encoder=True).items()}
    leave_out(*(m for m in model.modules() if getattr(m, "training_only", False)))
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if id(t) not in done and t.is_floating_point():
            found[name] = Part(t.detach())
    return found


def learned_bits(model: nn.Module, method: Mapping[str, Any]) -> dict[str, float]:
    """What the training made of the widths that `method`, the YAML's, calls learned: the mean of the quantizers' bits.

    `w_bits_learned` is the mean over all quantized weights, `a_bits_learned` that over the activations' quantizers.
    """
    quantized = [(m.weight_quantizer, math.prod(m.weight_shape)) for _, m in quant_layers(model)]
    seen = {
        "w": [(q.bits, numel) for q, numel in quantized if q is not None],
        "a": [(q.bits, 1) for q in activation_quantizers(model).values()],
    }
    return {
        f"{site}_bits_learned": sum(bits * n for bits, n in found) / sum(n for _, n in found)
        for site, found in seen.items()
        if found and (method.get(f"{site}_bits") or {}).get("learned")
    }


def size(model: nn.Module) -> dict[str, float]:
    """What a packed file needs: bits per quantized weight, and bytes of the whole net.

    The bits are those of codes, scales and tables (what layers share once), before a part is filled up to bytes; the
    bytes are the lengths of all that is `packed`.
    """
    parts = packed(model)
    layers = {name: layer for name, layer in quant_layers(model) if layer.weight_quantizer is not None}
    own = tuple(f"{name}.weight." for name in layers)
    bits = sum(part.bits for name, part in parts.items() if not isinstance(name, str) or name.startswith(own))
    weights = sum(torch.Size(layer.weight_shape).numel() for layer in layers.values())
    return {"bits_per_weight": bits / weights if weights else 32.0, "bytes": sum(p.size for p in parts.values())}
