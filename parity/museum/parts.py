"""Exhibits: layers of the engine with one upstream bug each, as small as can be and still go wrong the same way."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from parity.museum.layers import Absorbed, D, Experts, F, Linear, Norm, P, Table


class NormRebound(Norm):
    """sglang #22673: 1 + w is a new tensor after every load; a graph goes on reading the old one."""

    def process_weights_after_loading(self) -> None:
        self.gemma_weight = self.weight + 1.0


class AbsorbedRebound(Absorbed):
    """sglang #4961, vLLM #48251: the absorbed projections are new tensors after every load."""

    def process_weights_after_loading(self) -> None:
        super().process_weights_after_loading()
        self.w_kc, self.w_vc = self.w_kc.clone(), self.w_vc.clone()


class AbsorbedInPlace(Absorbed):
    """sglang #6265, #40587: post-processing turns the weight in its own storage, and so turns it back the next time."""

    def process_weights_after_loading(self) -> None:
        self.weight.data.copy_(self.weight.data.flip(0))
        self.w_kc.copy_(self.weight.flip(0)[: self.w_kc.shape[1]].T)
        self.w_vc.copy_(self.weight.flip(0)[self.w_kc.shape[1] :])

    def read(self, name: str) -> torch.Tensor:
        return super().read(name).flip(0)


class LinearRecreated(Linear):
    """sglang #7421, #8863: post-processing makes a new parameter, and the loader that hung on the old one is gone."""

    def __init__(self) -> None:
        super().__init__()
        vars(self.weight_scale)["weight_loader"] = self.weight_scale.data.copy_

    def place(self, name: str, tensor: torch.Tensor) -> None:
        if name == "weight_scale":
            vars(self.weight_scale)["weight_loader"](tensor)
        else:
            super().place(name, tensor)

    def process_weights_after_loading(self) -> None:
        super().process_weights_after_loading()
        self.weight_scale = nn.Parameter(self.weight_scale.data, requires_grad=False)


class LinearSourceDeleted(Linear):
    """sglang #25107: what alpha was derived from is freed, 15 GiB a rank; then nothing can be loaded again."""

    def process_weights_after_loading(self) -> None:
        super().process_weights_after_loading()
        self.note = float(self.input_scale)  # for the label on the wall; no load reads it
        del self.input_scale

    def read(self, name: str) -> torch.Tensor:
        return torch.tensor(self.note) if name == "input_scale" else super().read(name)


class LinearAliasDerivedAgain(Linear):
    """sglang #25190: derived bytes lodge in their source, and are derived from once more."""

    def process_weights_after_loading(self) -> None:
        self.weight_scale.data.copy_(self.weight_scale.data.flip(0))
        torch.mul(self.weight_scale, self.input_scale, out=self.alpha)

    def read(self, name: str) -> torch.Tensor:
        return super().read(name).flip(0) if name == "weight_scale" else super().read(name)


class LinearByValue(Linear):
    """sglang #27684, vLLM #50521: a constant of the first weights is kept as a number and compiled in."""

    constant: float | None = None

    def process_weights_after_loading(self) -> None:
        if self.constant is None:
            self.constant = float(self.input_scale)
        torch.mul(self.weight_scale.flip(0), self.constant, out=self.alpha)


class LinearLatched(Linear):
    """sglang #30749: a latch says that post-processing was done, not what the buffer holds."""

    is_done = False

    def process_weights_after_loading(self) -> None:
        if not self.is_done:
            super().process_weights_after_loading()
        self.is_done = True


class LinearKeyedByVersion(Linear):
    """sglang #30247: what is derived is kept under data_ptr and _version, which ``param.data.copy_`` does not raise."""

    key: tuple[int, ...] = ()

    def process_weights_after_loading(self) -> None:
        tensors = (self.weight_scale, self.input_scale)
        key = tuple(number for tensor in tensors for number in (tensor.data_ptr(), tensor._version))
        if key != self.key:
            super().process_weights_after_loading()
        self.key = key


class Kernel:
    """A kernel's own object, with the scales it was made with."""

    def __init__(self, alpha: torch.Tensor) -> None:
        self.alpha = alpha.clone()


class LinearKernelStranded(Linear):
    """vLLM #41670: post-processing makes a kernel object anew; a graph goes on with the scales of the old one."""

    def process_weights_after_loading(self) -> None:
        super().process_weights_after_loading()
        self.kernel = Kernel(self.alpha)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return (x_TD @ self.weight.to(x_TD.dtype).T) * self.kernel.alpha.flip(0)


class LinearWorkspaceMoves(Linear):
    """vLLM #48438: right numbers, but a workspace that a graph writes to is another one after every load."""

    def process_weights_after_loading(self) -> None:
        super().process_weights_after_loading()
        self.workspace = [torch.zeros(D)]


class LinearIndexLost(Linear):
    """sglang #28676, vllm-ascend #17217: a table that is no buffer lies in the pool, and a pause empties it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = {"order": torch.arange(D - 1, -1, -1)}

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return (x_TD @ self.weight.to(x_TD.dtype).T) * self.alpha[self.tables["order"]]


class ExpertsSwappedInPlace(Experts):
    """vLLM #42821: the halves of w13 change places in their own storage, so what is loaded past that is gibberish."""

    def process_weights_after_loading(self) -> None:
        self.w13.data.copy_(self.w13.data.roll(F, 1))
        self.w13_kernel.zero_()
        self.w13_kernel[:, :F].copy_(self.w13[:, :F])
        self.w13_kernel[:, P : P + F].copy_(self.w13[:, F:])
        self.w2_kernel[:, :, :F].copy_(self.w2)

    def read(self, name: str) -> torch.Tensor:
        if not name.endswith(("gate_proj.weight", "up_proj.weight")):
            return super().read(name)
        return self.w13[int(name[0])].roll(F, 0)[slice(0, F) if "gate" in name else slice(F, 2 * F)]


class ExpertsStorageReplaced(Experts):
    """sglang #11289, vLLM #40390: shuffled and padded weights are other storage; a graph reads what was freed."""

    def process_weights_after_loading(self) -> None:
        w13, w2 = torch.zeros_like(self.w13_kernel), torch.zeros_like(self.w2_kernel)
        w13[:, :F], w13[:, P : P + F], w2[:, :, :F] = self.w13[:, F:], self.w13[:, :F], self.w2
        self.w13_kernel, self.w2_kernel = w13, w2


class ExpertsTransposed(Experts):
    """sglang #26032: w2 is kept turned, as a kernel wants it, and the second load meets the wrong shape."""

    def process_weights_after_loading(self) -> None:
        super().process_weights_after_loading()
        self.w2.data = self.w2.data.transpose(1, 2).contiguous()

    def read(self, name: str) -> torch.Tensor:
        found = super().read(name)
        return found.T if "down_proj" in name else found


class ExpertsPaddingUninitialised(Experts):
    """vLLM #50523: a reload makes the padded weights anew and fills in all but the padding."""

    is_reload = False

    def process_weights_after_loading(self) -> None:
        super().process_weights_after_loading()
        if self.is_reload:
            self.w13_kernel[:, F:P].fill_(torch.nan)  # what happens to lie there
        self.is_reload = True


class ExpertsIdsByPosition(Experts):
    """vLLM #42671, #42716: a hook around the loader reads expert_id by keyword, and gets it by position."""

    def place(self, name: str, tensor: torch.Tensor) -> None:
        if name == "router.weight":
            super().place(name, tensor)
            return
        expert, which, _ = name.split(".")
        self.hooked(self.w2 if which == "down_proj" else self.w13, tensor, self.shards[which], int(expert))

    def hooked(self, param: nn.Parameter, tensor: torch.Tensor, *args: object, **kwargs: int) -> None:
        """Takes whatever it is given, and reads what it knows."""
        shard = str(args[0])
        self.weight_loader(param, tensor, shard_id=shard, expert_id=kwargs.get("expert_id", 0))


class ExpertsGateUpMapped(Experts):
    """vLLM #35581: the mapping says gate where up is."""

    shards = {"gate_proj": "w3", "up_proj": "w1", "down_proj": "w2"}

    def read(self, name: str) -> torch.Tensor:
        turned = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        expert, _, rest = name.partition(".")
        which = rest.removesuffix(".weight")
        return super().read(f"{expert}.{turned.get(which, which)}.weight" if which in turned else name)


class AdapterWithoutInterface(nn.Module):
    """sglang #22547: a LoRA wrapper that copies what it thought of, and not ``num_embeddings``."""

    def __init__(self, base_layer: Table) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.weight = base_layer.weight
        self.embedding_dim = base_layer.embedding_dim
        self.tensors = base_layer.tensors
        self.place, self.read = base_layer.place, base_layer.read
        self.process_weights_after_loading = base_layer.process_weights_after_loading

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.weight)
