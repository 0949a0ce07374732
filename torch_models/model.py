"""What every model is besides its layers: a version, a checkpoint, and changes made in place or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from loaders.adapters.roster import AdapterOfRows
from loaders.checkpoint import Checkpoint
from loaders.digest import short_digest, tensor_digest
from loaders.events import Event, version_of
from loaders.host.inputs import ModelInputs, as_array, check_experts, check_values
from loaders.host.multimodal import check_hidden, check_inputs
from loaders.host.stepwise import stepwise
from loaders.reading.plan import LoadReport
from loaders.spec import ModelConfig, Specs
from loaders.stage import Stage
from torch_models import sleep, swap
from torch_models import weights as life
from torch_models.adapted import Adapted
from torch_models.cache import Cache, empty_cache
from torch_models.coordination import in_step
from torch_models.decoding import Decoding
from torch_models.graphs import DecodeGraphs, KeptGraphs
from torch_models.host import as_tensor, on_host
from torch_models.layers.decoder import Decoder
from torch_models.layers.step import Entry
from torch_models.one_version import of_one_version
from torch_models.parallel import Parallel
from torch_models.precision import in_own_precision
from torch_models.processes import Result, agreed
from torch_models.seeing import Seeing
from torch_models.stepwise import read_stepwise
from torch_models.storage import host_view, parameters_of
from torch_models.taps import Level, collect

log = logging.getLogger(__name__)


class Model(nn.Module, Decoding, Adapted, Seeing):
    """One pipeline stage whose weights change while it lives; every change is made in place.

    A family's class adds ``decoder`` (embedding, layers, norm), ``embed``, ``head`` and ``cache_entries``, and
    ``visual`` where it sees.

    Attributes:
        config: of the checkpoint.
        version: 1 after load, + 1 with every published change.
        stage: which part of a pipeline this is.
        dtype: what is computed in. Parameters keep the checkpoint's dtypes.
        checkpoint: what it was last loaded from.
        specs: which of its tensors are in which parameters of this stage.
        report: what that load did.
        events: everything published so far.
        refusal: why the model must not run (an update broke half-way); None while it may.
        kernels: of every quantised module, by path: what computes its product.
        quantizes_inputs: inputs of quantised layers are quantised too; False: weights only, or nothing is quantised.
        rounds_cache: keys and values are rounded to FP8.
        quantize: how weights are quantised when they are read, now and at every reload; None: they are not.
        asleep: the bytes of its storages while it sleeps, else None; see ``torch_models.sleep``.
        parallel: on a mesh, what this rank holds; None: everything is here.
    """

    model: Any
    mtp: Any  # of families that have a draft, where it was asked for
    visual: Any  # of families that have a vision tower, where it is
    checkpoint: Checkpoint
    specs: Specs
    report: LoadReport

    quantize: str | None
    config: Any  # loaders.spec.ModelConfig; the family's class narrows it

    def __init__(self, config: ModelConfig, stage: Stage, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.stage = stage
        self.dtype = dtype
        self.version = 0
        self.events: tuple[Event, ...] = ()
        self.refusal: str | None = None
        self.kernels: dict[str, str] = {}
        self.quantizes_inputs, self.rounds_cache, self.quantize = False, False, None
        Adapted.__init__(self)
        self._kept_graphs = KeptGraphs()
        self.asleep: sleep.HostCopy | None = None
        self.parallel: Parallel | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device

    @property
    def graphs(self) -> DecodeGraphs:
        """Captured decode steps; see ``torch_models.graphs``."""
        return DecodeGraphs(self, self._kept_graphs)

    def embed(self, input_ids_BT: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hidden states the first decoder layer takes, [B, T, D] in the compute dtype."""
        raise NotImplementedError

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B, T, V]."""
        raise NotImplementedError

    @staticmethod
    def cache_entries(config: Any, stage: Stage, rows: int, capacity: int) -> dict[str, dict[str, Entry]]:
        """What the layers of a stage keep, by layer number."""
        raise NotImplementedError

    @property
    def decoder(self) -> Decoder:
        """Embedding, this stage's layers, final norm."""
        raise NotImplementedError

    @torch.inference_mode(False)  # a cache outlives the caller's inference mode
    def empty_cache(self, rows: int, capacity: int, entries: dict[str, dict[str, Entry]] | None = None) -> Cache:
        """A cache with no token in it; ``entries``: of more than this model's layers, where a draft needs them."""
        if entries is None:
            entries = self.cache_entries(self.config, self.stage, rows, capacity)
        if self.parallel is not None:
            entries = self.parallel.held_entries(entries)
        place = {"dtype": self.dtype, "device": self.device, "version": self.version, "stamp": self.weights_stamp()}
        return empty_cache(entries, rows=rows, capacity=capacity, **place)

    @in_step
    @of_one_version
    @in_own_precision
    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        hidden_states: Any = None,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> torch.Tensor:
        """Run the stage.

        Args:
            input_ids: integers [B, T], on the first stage.
            attention_mask: [B, T], 1 = real, padding on either side; None: all real.
            position_ids: integers [B, T], or [3, B, T] where the rotary embedding has several axes (or [4, B, T], text
                first, as transformers has them); None: counted over each row's real tokens.
            hidden_states: [B, T, D] from the stage before, on later stages.
            adapter: a name for all rows, or a name or None (the base alone) for each; None: what came last, if any.
            multimodal: images and videos under their Hugging Face processor's names: ``pixel_values`` and
                ``pixel_values_videos``, floats [patches, numbers of a patch]; ``image_grid_thw`` and
                ``video_grid_thw``, integers [images, 3]; ``mm_token_type_ids`` [B, T], 1 and 2 where they stand, or
                None: by their tokens.
        Returns:
            Logits, float32 [B, T, V]; before the last stage hidden states [B, T, D]. Padded positions carry no meaning.
        Raises:
            ValueError: inputs of the wrong shape, dtype or range, or images that do not fit their placeholders.
            RuntimeError: an update failed half-way: load good weights first; or came meanwhile: call again.
        """
        prompt = (input_ids, attention_mask, position_ids, hidden_states, multimodal)
        entry, checked = self.checked(*prompt, adapter=adapter)
        with self.running(adapter, entry):
            return self._run(entry, checked)

    @in_step
    @of_one_version
    @in_own_precision
    def with_taps(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        hidden_states: Any = None,
        adapter: AdapterOfRows = None,
        level: Level = "layers",
        within: str | None = None,
        inject: Mapping[str, Any] | None = None,
        decode: int = 0,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As calling the model, and intermediate values by checkpoint module path, in order of execution.

        Args:
            input_ids: as for the model itself, as are all before ``level``.
            attention_mask: [B, T].
            position_ids: [B, T] or more axes.
            hidden_states: [B, T, D].
            adapter: of the rows.
            multimodal: images and videos.
            level: how deep to look. ``layers``: the residual stream after every decoder layer, the embeddings and the
                final norm around them, and the experts a router chose (``model.layers.3``, ``model.norm``,
                ``model.layers.3.mlp.gate``). ``modules``: also what every module of a layer says
                (``model.layers.3.self_attn``). ``operations``: also what happens inside of those
                (``model.layers.3.self_attn.q_norm``); not on a mesh, whose ranks have parts of that.
            within: only the values at this path and below; None: all.
            inject: values, by path, that take the place of what is computed there: what follows goes on from them, so
                that with a peer's value after every layer each layer is run alone. What is returned under that path is
                still what was computed. Of any level; cast to the dtype of what they replace.
            decode: how many of the last tokens of every row are read one at a time, from a cache, as ``decode`` does,
                and those before them as ``prefill`` does; 0: all tokens at once.
        Returns:
            What the model returns, and the values: floats [B, T, ...] as computed, chosen experts as integers.
        Raises:
            ValueError: as the model does; or values to inject that have no such place or another shape, all at once;
                or rows that cannot be decoded so.
        """

        def looked() -> dict[str, Any]:
            if level == "operations":  # what is inside of modules is there in parts
                self.check_alone(f"taps of {level}")
            values = check_values(inject)
            for path, value in values.items():
                check_experts(self.config, path, as_array(path, on_host(value)))
            return values

        def said(values: dict[str, Any]) -> str:
            handed = [f"{path} {short_digest(np.asarray(on_host(value)))}" for path, value in values.items()]
            return f"level={level}, within={within}, decode={decode}, inject={sorted(handed)}"

        values = self.agreed("what is looked at", looked, said)
        if decode:
            self.check_whole()
            given = {name: on_host(value) for name, value in multimodal.items()}
            entry, position_ids = on_host(input_ids), on_host(position_ids)
            _, checked = self.checked(entry, attention_mask, position_ids, hidden_states, given)
            rows = stepwise(self.config, checked, entry, position_ids=position_ids, given=given, steps=decode)
            return read_stepwise(self, rows, adapter=adapter, level=level, within=within, inject=values)
        given = {"hidden_states": hidden_states, "adapter": adapter, **multimodal}
        with collect(level, within, values) as taps:
            out = self(input_ids, attention_mask, position_ids, **given)
        return out, taps

    def get_embed_and_head(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Embedding and head, [V, D]; codes of a quantised head; None for a half this stage lacks; tied: one.

        On a mesh each is a DTensor of the parameters' own memory.
        """
        return swap.get_embed_and_head(self)

    @in_step
    def set_embed_and_head(self, embed: Any = None, head: Any = None) -> Model:
        """Write another embedding and head in place; see ``torch_models.swap``."""
        return swap.set_embed_and_head(self, embed, head)

    @in_step
    def update_weights_from_disk(
        self, uri: str | os.PathLike[str], *, donate: bool = True, host_budget_bytes: int | None = None
    ) -> Model:
        """Write the weights of another checkpoint of the same config in place; see ``torch_models.weights``."""
        return life.update_weights_from_disk(self, uri, donate=donate, host_budget_bytes=host_budget_bytes)

    @in_step
    def sleep(self) -> Model:
        """Free the weights' storage, with a copy on the host, and drop all graphs; see ``torch_models.sleep``."""
        return sleep.sleep(self)

    @in_step
    def wake(self) -> Model:
        """Bring the weights back, bit for bit, into the same parameters; see ``torch_models.sleep``."""
        return sleep.wake(self)

    @in_step
    def export(self, directory: str | os.PathLike[str]) -> Path:
        """Write the checkpoint's tensors as they stand now, bit for bit; see ``loaders.writing.export``."""
        return life.export(self, directory)

    @in_step
    def digests(self) -> dict[str, str]:
        """Digest of every checkpoint tensor held, by name; see ``loaders.digest``."""
        return life.weight_digests(self)

    def publish(self, event: Event) -> None:
        """Make a finished change the serving version. The last step of every change."""
        is_new = event.version != self.version
        self.version = event.version
        self.events = (*self.events, event)
        if is_new:
            log.info("publish: version %d (%s)", event.version, event.kind)
        self.refusal = None

    # torch's own ways to a module's weights, which end the process, or copy nothing, where their storage is freed

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles. Raises RuntimeError while the model sleeps, as the three below do."""
        sleep.check_awake(self)
        return super().__reduce_ex__(protocol)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See ``torch.nn.Module``."""
        sleep.check_awake(self)
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See ``torch.nn.Module``."""
        sleep.check_awake(self)
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # of ``to``, ``half`` and the like
        sleep.check_awake(self)
        return super()._apply(fn, recurse)

    def weights_stamp(self) -> tuple[tuple[int, ...], ...]:
        """Which tensors the parameters are and how often each was written: changes with every write, by whomever.

        So a parameter that two models share makes the caches of both stale when either is updated. Adapters count too;
        and whether there is storage, of which a model that sleeps has none.
        """
        written = tuple((id(param), param._version, not param.data_ptr()) for param in parameters_of(self))
        return (*written, (id(self), self.adapter_changes))

    @property
    def mesh(self) -> DeviceMesh | None:
        """Ranks that hold a part of it each; None: everything is here."""
        return None if self.parallel is None else self.parallel.mesh

    def agreed(self, what: str, work: Callable[[], Result], say: Callable[[Result], str] = str) -> Result:
        """What all ranks of a mesh make of ``work`` alike, with the same weights; see ``processes.agreed``."""
        return agreed(self.mesh, what, work, lambda found: f"{say(found)}, {version_of(self.events)}")

    def check_alone(self, what: str) -> None:
        """Raises ValueError on a mesh, for what only whole weights have."""
        if self.parallel is not None:
            raise ValueError(f"this model is cut over a mesh, which {what} cannot be. Load it without mesh.")

    def check_runnable(self) -> None:
        """Raises RuntimeError while the model sleeps, or its weights are a mixture of two versions."""
        sleep.check_awake(self)
        self.check_refusal()

    def check_refusal(self) -> None:
        """Raises RuntimeError while the weights are a mixture of two versions."""
        if self.refusal is not None:
            again = "unmerge_lora again, or " if self.roster.merged is not None else ""
            raise RuntimeError(
                f"the model refuses to run: {self.refusal}. Call {again}update_weights_from_disk with good weights."
            )

    def _run(self, entry: torch.Tensor, checked: ModelInputs) -> torch.Tensor:
        mask_BT = torch.from_numpy(checked.attention_mask).to(self.device)
        seen = self.seen(checked)
        x_BTD = self.entered(entry, seen) if self.stage.is_first else entry.to(self.dtype)
        x_BTD = self.decoder(x_BTD, self.long(checked.position_ids), mask_BT, seen=seen)
        return self.head(x_BTD) if self.stage.is_last else x_BTD

    def long(self, array: np.ndarray) -> torch.Tensor:
        """Integers where the model is, int64."""
        return torch.from_numpy(array.astype(np.int64)).to(self.device)

    def checked(
        self,
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        hidden_states: Any,
        multimodal: Mapping[str, Any] | None = None,
        *,
        adapter: AdapterOfRows = None,
    ) -> tuple[torch.Tensor, ModelInputs]:
        """Token ids or hidden states, whichever the stage takes, and all inputs as they will be used.

        ``adapter``: of the rows. On a mesh all ranks have to give the same.
        """

        def checked() -> tuple[torch.Tensor, ModelInputs, np.ndarray]:
            self.check_runnable()
            entry, inputs = self._checked(input_ids, attention_mask, position_ids, hidden_states, multimodal)
            return entry, inputs, self.roster.rows(adapter, len(entry))

        def said(found: tuple[torch.Tensor, ModelInputs, np.ndarray]) -> str:
            entry, inputs, slot_B = found
            hidden = "" if self.stage.is_first else tensor_digest(host_view(entry.cpu().contiguous()))[:16]
            return f"inputs {inputs.digest} {hidden}, adapters of rows {slot_B.tolist()}"

        entry, inputs, _ = self.agreed("what the model is called with", checked, said)
        return entry, inputs

    def _checked(
        self,
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        hidden_states: Any,
        multimodal: Mapping[str, Any] | None,
    ) -> tuple[torch.Tensor, ModelInputs]:
        self.stage.check_entry(input_ids, hidden_states)
        rows = on_host(attention_mask), on_host(position_ids)
        given = {name: on_host(value) for name, value in (multimodal or {}).items()}
        if self.stage.is_first:
            ids_BT = on_host(input_ids)
            checked = check_inputs(self.config, ids_BT, *rows, given=given, has_tower=self.stage.has_tower)
            return self.long(checked.input_ids), checked
        x_BTD = as_tensor(hidden_states, "hidden_states").to(self.device, self.dtype)
        return x_BTD, check_hidden(self.config, x_BTD.shape, *rows, given=given)
