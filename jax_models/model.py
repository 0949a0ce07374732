"""The immutable model: weights, the programs that take them, and a version. Every change returns a new one."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from jax_models import swap
from jax_models import weights as life
from jax_models.adapted import Adapted
from jax_models.adapter_room import Room, RowAdapters
from jax_models.ambient import in_own_settings, with_transfers
from jax_models.batch import Batch, batch_of
from jax_models.decoding import Decoding
from jax_models.kernels.heads import left_to_xla
from jax_models.processes import agreed, content_of, devices_of, handed_over, nth_change, placed, processes_of
from jax_models.programs import Programs, Weights
from jax_models.seeing import Seeing
from jax_models.sharding import row_sharding
from jax_models.stepwise import read_stepwise
from jax_models.taps import Level
from loaders.adapters.roster import AdapterOfRows, Roster
from loaders.checkpoint import Checkpoint
from loaders.events import Event, version_of
from loaders.host.agreement import Result
from loaders.host.inputs import ModelInputs, as_array, check_experts, check_values
from loaders.host.multimodal import check_hidden, check_inputs
from loaders.host.stepwise import stepwise
from loaders.reading.plan import LoadReport
from loaders.spec import ModelConfig, Specs
from loaders.stage import Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Model(Decoding, Adapted, Seeing):
    """One version of the weights of one pipeline stage, and how to run it.

    Attributes:
        config: of the checkpoint.
        weights: nested dict pytree; flattened paths are checkpoint names.
        version: 1 after load, + 1 with every published change.
        stage: which part of a pipeline this is.
        mesh: devices it is sharded over; None: one device.
        checkpoint: what it was last loaded from.
        specs: which of its tensors are in which parameters of this stage.
        report: what that load did.
        events: everything published so far.
        quantize: how weights are quantised when they are read, now and at every reload; None: they are not.
        roster: which adapters there are.
        room: their arrays.
        unmerged: while one is merged, the arrays from before, by name.
    """

    config: ModelConfig
    weights: Weights
    version: int
    programs: Programs
    stage: Stage
    mesh: Mesh | None
    checkpoint: Checkpoint
    specs: Specs
    report: LoadReport
    events: tuple[Event, ...]
    quantize: str | None = None
    roster: Roster = field(default_factory=Roster)
    room: Room = field(default_factory=Room)
    unmerged: dict[str, jax.Array] = field(default_factory=dict)
    weights_id: object = field(default_factory=object)  # two models of one version may differ in weights

    def __repr__(self) -> str:
        # not what dataclasses write, for which every weight would come to the host
        arrays = jax.tree.leaves(self.weights)
        size = f"{len(arrays)} weights of {sum(array.nbytes for array in arrays) / 1e9:.3g} GB"
        return f"Model({self.config.architecture}, version {self.version}, {size}, computes in {self.dtype})"

    @property
    def dtype(self) -> jnp.dtype:
        """What is computed in. Parameters keep the checkpoint's dtypes."""
        return self.programs.dtype

    @property
    def quantizes_inputs(self) -> bool:
        """Inputs of quantised layers are quantised too; False: weights only, or nothing is quantised."""
        return self.programs.activations.inputs

    @property
    def rounds_cache(self) -> bool:
        """Keys and values are rounded to FP8."""
        return self.programs.activations.cache

    @property
    def kernels(self) -> dict[str, str]:
        """Of every quantised module, by path: what computes its product, on the platform where the weights are."""
        platform = next(iter(jax.tree.leaves(self.weights)[0].devices())).platform
        nvfp4 = "pallas" if platform == "tpu" else "reference"
        schemes = self.specs.schemes
        return {path: nvfp4 if scheme.weights == "nvfp4" else "fp8" for path, scheme in schemes.items()}

    @cached_property
    def _arrays(self) -> list[jax.Array]:
        """Weights that have values, in any order: finding them takes as long as asking each whether it is there."""
        return [array for array in jax.tree.leaves(self.weights) if not isinstance(array, Tracer)]

    def check_runnable(self, *, is_step: bool = False) -> None:
        """Raises RuntimeError where weights were given up to an update (``donate=True``).

        ``is_step``: look at one of them, which a step has the time for. An update that ends well gives up all.
        """
        asked = self._arrays[:1] if is_step else self._arrays
        if not any(array.is_deleted() for array in asked):
            return
        given_up = sum(array.is_deleted() for array in self._arrays)
        raise RuntimeError(
            f"{given_up} of {len(self._arrays)} weights of version {self.version} were given up to an update"
            " (donate=True). Use the model that it returned, or update this one again."
        )

    @in_own_settings
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        hidden_states: Any = None,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> jax.Array:
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
        """
        prompt = (input_ids, attention_mask, position_ids, hidden_states, multimodal)
        entry, checked = self.checked(*prompt, adapter=adapter)
        return self.programs.forward(self.weights, self.batch(checked, entry), **self.of_rows(adapter, len(entry)))

    @in_own_settings
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
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
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
                (``model.layers.3.self_attn.q_norm``), on a mesh inside of experts excepted: each device has some.
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

        def said() -> str:
            values = check_values(inject)
            if len(processes_of(self.mesh)) == 1:
                return ""
            handed = [f"{path} {content_of(value)}" for path, value in values.items()]
            return f"level={level}, within={within}, decode={decode}, inject={sorted(handed)}"

        prompt = (input_ids, attention_mask, position_ids, hidden_states, multimodal)
        entry, checked = self.checked(*prompt, adapter=adapter, said=said)
        values = {path: self._handed(path, value) for path, value in check_values(inject).items()}
        if decode:
            self.check_whole()
            rows = stepwise(self.config, checked, input_ids, position_ids=position_ids, given=multimodal, steps=decode)
            return read_stepwise(self, rows, adapter=adapter, level=level, within=within, inject=values)
        given = (self.weights, self.batch(checked, entry))
        looked = {"level": level, "within": within, "inject": values or None}
        return self.programs.forward_with_taps(*given, **self.of_rows(adapter, len(entry)), **looked)

    def apply(
        self,
        weights: Weights,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        hidden_states: jax.Array | None = None,
        adapters: RowAdapters | None = None,
        **multimodal: Any,
    ) -> jax.Array:
        """The pure function behind ``__call__``, for jit, grad and shardings of your own, on axes of type Auto. Checks
        nothing, but that images match their placeholders: they and the tokens must be arrays with values.

        Long prompts attend by XLA here, on TPUs too: it partitions no kernel. Kernels of experts and of NVFP4 weights
        need one device there, or the mesh that the model was loaded for.

        Args:
            weights: of the structure, shapes and dtypes of ``model.weights``.
            input_ids: int32 [B, T], of the first stage.
            attention_mask: [B, T], padding on either side; None: all tokens are real.
            position_ids: int32 [B, T], or [3, B, T]; None: counted from the mask.
            hidden_states: [B, T, D], of later stages, instead of ``input_ids``.
            adapters: ``model.of_rows(adapter, rows).get("adapters")``, an argument as the weights are; None: the base.
            multimodal: images and videos, as for the model itself.
        Returns:
            Logits, float32 [B, T, V]; of a stage that is not the last, hidden states [B, T, D].
        """
        if any(value is not None for value in multimodal.values()):
            entry, checked = self._checked(input_ids, attention_mask, position_ids, hidden_states, multimodal)
            with left_to_xla():
                return self.programs.apply(weights, self.batch(checked, jnp.asarray(entry)), adapters)
        self.stage.check_entry(input_ids, hidden_states)
        entry = input_ids if input_ids is not None else hidden_states
        assert entry is not None
        mask_BT = (
            jnp.ones(entry.shape[:2], bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        )
        if position_ids is None:
            position_ids = jnp.where(mask_BT, jnp.cumsum(mask_BT, axis=1) - 1, 0)
        positions = jnp.asarray(position_ids, jnp.int32)
        positions = positions[-3:] if positions.ndim == 3 else positions  # of four axes the first is text's
        with left_to_xla():
            return self.programs.apply(weights, Batch(jnp.asarray(entry), mask_BT, positions), adapters)

    @with_transfers
    def replace(self, *, weights: Weights) -> Model:
        """A new version with these weights: same structure, shapes, dtypes and shardings.

        Raises:
            ValueError: listing every leaf that differs.
        """

        def check() -> None:
            self.roster.check_unmerged("other weights")
            life.check_same_structure(self.weights, weights)

        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((self.weights, weights))):
            check()
            return self.published(life.committed_like(self.weights, weights), "replace")
        self.agreed("what is replaced", check, lambda _: "the model")
        merged = life.committed_like(self.weights, weights)
        return self.published(merged, "replace", content=nth_change(self.mesh))

    def get_embed_and_head(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Embedding and head, [V, D]; codes of a quantised head; None for a half this stage lacks; tied: one."""
        return swap.get_embed_and_head(self)

    @with_transfers
    def set_embed_and_head(self, embed: Any = None, head: Any = None) -> Model:
        """A new version with another embedding and head; see ``jax_models.swap``."""
        return swap.set_embed_and_head(self, embed, head)

    @with_transfers
    def update_weights_from_disk(
        self, uri: str | os.PathLike[str], *, donate: bool = False, host_budget_bytes: int | None = None
    ) -> Model:
        """A new version with the weights of another checkpoint of the same config; see ``jax_models.weights``."""
        return life.update_weights_from_disk(self, uri, donate=donate, host_budget_bytes=host_budget_bytes)

    @with_transfers
    def export(self, directory: str | os.PathLike[str]) -> Path:
        """Write the checkpoint's tensors as they stand now, bit for bit; see ``loaders.writing.export``."""
        return life.export(self, directory)

    @with_transfers
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the weights as they are sharded, with version, digests and events; see ``jax_models.saving``."""
        from jax_models.saving import save  # which builds models

        save(self, directory)

    @with_transfers
    def digests(self) -> dict[str, str]:
        """Digest of every checkpoint tensor held, by name; see ``loaders.digest``."""
        return life.weight_digests(self)

    def published(
        self, weights: Weights, kind: str, detail: str = "", ignored: tuple[str, ...] = (), content: str = ""
    ) -> Model:
        """The next version, with its event. Weights must have been checked."""
        event = Event(kind, self.version + 1, detail, ignored, content)
        log.info("publish: version %d (%s)", event.version, event.kind)
        return dataclasses.replace(
            self, weights=weights, version=self.version + 1, events=(*self.events, event), weights_id=object()
        )

    def agreed(self, what: str, work: Callable[[], Result], say: Callable[[Result], str] = str) -> Result:
        """What all processes of its mesh make of ``work`` alike, with the same weights; see ``processes.agreed``."""
        return agreed(self.mesh, what, work, lambda found: f"{say(found)}, {version_of(self.events)}")

    def checked(
        self,
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        hidden_states: Any,
        multimodal: Mapping[str, Any] | None = None,
        *,
        adapter: AdapterOfRows = None,
        said: Callable[[], str] = str,
    ) -> tuple[Any, ModelInputs]:
        """Token ids or hidden states, whichever the stage takes, and all inputs as they will be used.

        ``adapter``: of the rows. ``said``: in few words, how else the model is called. Of several processes all have
        to say the same.
        """

        def checked() -> tuple[Any, ModelInputs, np.ndarray, str]:
            entry, inputs = self._checked(input_ids, attention_mask, position_ids, hidden_states, multimodal)
            slot_B = self.roster.rows(adapter, len(entry))
            return entry, inputs, slot_B, said()

        def summary(found: tuple[Any, ModelInputs, np.ndarray, str]) -> str:
            entry, inputs, slot_B, how = found
            return f"inputs {content_of(entry)} {inputs.digest}, adapters of rows {slot_B.tolist()} {how}"

        entry, inputs, _, _ = self.agreed("what the model is called with", checked, summary)
        return entry if self.stage.is_first else self._here(entry), inputs

    def _checked(
        self,
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        hidden_states: Any,
        multimodal: Mapping[str, Any] | None,
    ) -> tuple[Any, ModelInputs]:
        self.check_runnable()
        self.stage.check_entry(input_ids, hidden_states)
        rows, given = (attention_mask, position_ids), multimodal or {}
        if self.stage.is_first:
            checked = check_inputs(self.config, input_ids, *rows, given=given, has_tower=self.stage.has_tower)
            return checked.input_ids, checked
        x_BTD = jnp.asarray(hidden_states, self.dtype)
        return x_BTD, check_hidden(self.config, x_BTD.shape, *rows, given=given)

    def batch(self, checked: ModelInputs, entry: Any = None) -> Batch:
        """What the host checked, as programs take it; see ``jax_models.batch``."""
        return batch_of(self.config, checked, entry)

    @property
    def _devices(self) -> list[Any]:
        """Where its programs run, in their order."""
        return devices_of(jax.tree.leaves(self.weights)[0]) if self.mesh is None else list(self.mesh.devices.flat)

    def _handed(self, path: str, value: Any) -> Any:
        """A value to inject, which may be any library's, or lie where another model is."""
        if not isinstance(value, jax.Array) or value.is_fully_addressable:
            check_experts(self.config, path, as_array(path, value))
        if not isinstance(value, jax.Array):
            return as_array(path, value)
        is_ours = not value.committed or devices_of(value) == self._devices
        return value if is_ours else handed_over(value, self.mesh, path)

    def _here(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states from a stage on other devices, on those of this one."""
        if self.mesh is None:
            return jax.device_put(x_BTD, jax.tree.leaves(self.weights)[0].sharding)
        if not x_BTD.committed or devices_of(x_BTD) == self._devices:
            return x_BTD
        rows = row_sharding(self.mesh, len(x_BTD))
        assert rows is not None
        if x_BTD.is_fully_addressable and rows.is_fully_addressable:
            return jax.device_put(x_BTD, rows)
        return placed(handed_over(x_BTD, self.mesh, "hidden_states"), rows)
