"""A sound little model in the manner of the big engines: where the museum's bugs are planted, one at a time.

Loading is staged: nothing is written before everything was read and checked, so a failure changes nothing. Tokens do
not see each other: weights are the matter here. Layers: ``parity.museum.layers``. Letters: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from parity.foreign.live import Checkpoint, ForeignModel, Stream, vllm_style
from parity.museum.layers import Absorbed, D, E, Experts, Linear, Norm, Part, Table, V
from torch_models.census import tensors_of

LAYERS = 2
IDS = torch.arange(V).flip(0)


class Layer(nn.Module):
    def __init__(self, kinds: Mapping[str, type[Part]]) -> None:
        super().__init__()
        self.norm, self.proj = kinds["Norm"](), kinds["Linear"]()
        self.attn, self.experts = kinds["Absorbed"](), kinds["Experts"]()

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        normed_TD = self.norm(x_TD)
        return x_TD + self.proj(normed_TD) + self.attn(normed_TD) + self.experts(normed_TD)


class Engine(nn.Module):
    """The model. An exhibit puts a part with a bug in the place of a sound one, or is a subclass of this.

    Attributes:
        kinds: the class of every part by what it is.
        is_tied: the head is the embedding.
    """

    kinds: Mapping[str, type[Part]] = {
        "Table": Table,
        "Norm": Norm,
        "Linear": Linear,
        "Absorbed": Absorbed,
        "Experts": Experts,
    }
    is_tied = False
    state: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = self.kinds["Table"]()
        self.layers = nn.ModuleList(Layer(self.kinds) for _ in range(LAYERS))
        self.norm = self.kinds["Norm"]()
        self.lm_head = self.embed_tokens if self.is_tied else self.kinds["Table"]()
        self.register_buffer("state", torch.zeros(D), persistent=False)
        self.staged: dict[str, torch.Tensor] = {}

    def parts(self) -> dict[str, tuple[Part, str]]:
        """Checkpoint tensor name -> the part it belongs to, and its name there."""
        found = {path: part for path, part in self.named_modules() if isinstance(part, Part)}
        return {f"{path}.{name}": (part, name) for path, part in found.items() for name in part.tensors}

    def load_weights(self, weights: Stream) -> set[str]:
        """Read all, check all, then write all."""
        self.stage(weights)
        return self.commit(is_whole=True)

    def stage(self, weights: Stream) -> None:
        """Read and keep; buffers may be lent, so a copy of each."""
        staged: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            if name in staged or name in self.staged:
                raise ValueError(f"{name} came twice{self.lacking({*staged, *self.staged})}")
            staged[name] = tensor.clone()
        self.staged |= staged

    def commit(self, *, is_whole: bool) -> set[str]:
        """Check what was staged, all problems in one error, and write it."""
        staged, self.staged = self.staged, {}
        self.check(staged, is_whole=is_whole)
        parts = self.parts()
        for name, tensor in staged.items():
            part, local = parts[name]
            part.place(local, tensor)
        return set(staged)

    def check(self, staged: Checkpoint, *, is_whole: bool) -> None:
        """Raises ValueError."""
        kinds = {name: part.tensors[local] for name, (part, local) in self.parts().items()}
        problems = [f"{name} is unexpected" for name in staged.keys() - kinds.keys()]
        for name in staged.keys() & kinds.keys():
            found = (tuple(staged[name].shape), staged[name].dtype)
            if found != kinds[name]:
                problems.append(f"{name} is {found}, expected {kinds[name]}")
        missing = self.lacking(staged) if is_whole else ""
        if problems or missing:
            raise ValueError("; ".join(problems) + missing)

    def lacking(self, names: Iterable[str]) -> str:
        missing = sorted(self.parts().keys() - set(names))
        return f"; missing: {', '.join(missing)}" if missing else ""

    def sleep(self) -> None:
        """Give up the pool: nothing in it survives but a copy of parameters and buffers."""
        pool = [tensor for _, tensor in tensors_of(self)]  # whatever holds it: a pause frees all
        self.kept = [(tensor, tensor.clone()) for tensor in (*self.parameters(), *self.buffers())]
        for tensor in pool:
            tensor.data.zero_()

    def wake(self) -> None:
        """Take the pool back, at the same addresses."""
        for tensor, value in self.kept:
            tensor.data.copy_(value)
        del self.kept

    def set_embed_and_head(self, embed: torch.Tensor, head: torch.Tensor) -> None:
        self.embed_tokens.place("weight", embed)
        self.lm_head.place("weight", head)

    def wrapped(self) -> list[tuple[nn.Module, nn.Module]]:
        """What wraps a layer, and the layer."""
        return [(WithAdapter(self.embed_tokens), self.embed_tokens)]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x_TD = self.embed_tokens(ids) + self.state
        for layer in self.layers:
            x_TD = layer(x_TD)
        return self.norm(x_TD) @ self.lm_head.weight.T


class WithAdapter(nn.Module):
    """A low-rank update beside a layer; for all else it is the layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        own = vars(self)["_modules"]
        return own[name] if name in own else getattr(own["base_layer"], name)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.base_layer(ids)


def subject(engine: type[Engine] = Engine, **kinds: type[Part]) -> ForeignModel:
    """An engine, with parts exchanged, as the lifecycle wants it."""
    made = type(engine.__name__, (engine,), {"kinds": {**engine.kinds, **kinds}}) if kinds else engine

    def partial(model: Any, weights: Stream) -> None:
        model.stage(weights)
        model.commit(is_whole=False)
        process(model)

    def in_buckets(model: Any, parts: Iterable[Stream]) -> None:
        for part in parts:
            model.stage(part)
        model.commit(is_whole=True)
        process(model)

    def process(model: nn.Module) -> None:
        for part in model.modules():
            if isinstance(part, Part):
                part.process_weights_after_loading()

    def write(model: Any, name: str, tensor: torch.Tensor) -> None:
        part, local = model.parts()[name]
        part.place(local, tensor)
        part.process_weights_after_loading()

    def nap(model: Any) -> None:
        model.sleep()
        model.wake()

    return vllm_style(
        made,
        IDS,
        name="engine",
        partial=getattr(made, "partial", partial),
        buckets=getattr(made, "in_buckets", in_buckets),
        write=getattr(made, "write", write),
        weights=lambda model: {name: part.read(local) for name, (part, local) in model.parts().items()},
        nap=nap,
        halves=("embed_tokens.weight", "embed_tokens.weight" if made.is_tied else "lm_head.weight"),
        swap=made.set_embed_and_head,
        wrappers=made.wrapped,
        reference=reference,
    )


def checkpoint(seed: int, *, is_tied: bool = False) -> dict[str, torch.Tensor]:
    """Weights away from every init; another seed changes every tensor."""
    random = torch.Generator().manual_seed(seed)
    model = type("Engine", (Engine,), {"is_tied": is_tied})()
    found = {}
    for name, (part, local) in model.parts().items():
        shape, dtype = part.tensors[local]
        drawn = torch.randn(shape, generator=random)
        found[name] = (drawn * 40).to(dtype) if dtype == torch.int8 else drawn * (0.01 if "scale" in name else 0.5)
    return found


def reference(weights: Checkpoint) -> torch.Tensor:
    """Logits that a checkpoint must give, written down without any derived weight; float64 inside."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        return x_TD / (x_TD.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight_D)

    x_TD = w["embed_tokens.weight"][IDS]
    for at in (f"layers.{layer}." for layer in range(LAYERS)):
        n_TD = norm(x_TD, w[at + "norm.weight"])
        x_TD = x_TD + n_TD @ w[at + "proj.weight"].T * w[at + "proj.weight_scale"] * w[at + "proj.input_scale"]
        keys_HD, values_HD = w[at + "attn.weight"].chunk(2)
        x_TD = x_TD + n_TD @ keys_HD.T @ values_HD
        share_TE = (n_TD @ w[at + "experts.router.weight"].T).softmax(-1)
        for e in range(E):
            gate, up, down = (w[f"{at}experts.{e}.{which}.weight"] for which in Experts.shards)
            x_TD = x_TD + share_TE[:, e, None] * ((functional.silu(n_TD @ gate.T) * (n_TD @ up.T)) @ down.T)
    head_VD = w.get("lm_head.weight", w["embed_tokens.weight"])
    return (norm(x_TD, w["norm.weight"]) @ head_VD.T).float()
