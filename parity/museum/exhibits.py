"""What the museum holds, as data: bugs by number, and the exhibits that show them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exhibit:
    """A little engine with one bug.

    Attributes:
        name: of its class. module: where it is, in ``parity``.
        caught_by: events of ``parity.foreign.lifecycle`` that must fail; all others need not.
        evidence: what the first of them must say, a regular expression: caught, and for the right reason.
        is_wrong_from_the_start: a cold load shows it already; most look sound until the weights change.
    """

    name: str
    module: str
    caught_by: tuple[str, ...]
    evidence: str
    is_wrong_from_the_start: bool = False


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A bug that somebody had.

    Attributes:
        where: the project. numbers: of its issues and pull requests.
        laws: of design, by number. shape: a letter of ``parity.museum.SHAPES``, or two.
        says: what happened.
        exhibits: names in ``EXHIBITS``. mutants: names of ``tandem mutate --list``.
        is_seed: one of the five that this project began with.
        absent: why it cannot be shown here.
    """

    where: str
    numbers: str
    shape: str
    laws: tuple[int, ...]
    says: str
    exhibits: tuple[str, ...] = ()
    mutants: tuple[str, ...] = ()
    is_seed: bool = False
    absent: str = ""


def _part(name: str, *caught_by: str, evidence: str, **more: bool) -> Exhibit:
    return Exhibit(name, "parts", caught_by, evidence, **more)


def _loading(name: str, *caught_by: str, evidence: str, **more: bool) -> Exhibit:
    return Exhibit(name, "loading", caught_by, evidence, **more)


_STALE = "logits differ from a cold load's"
_LIST = (
    _part("NormRebound", "reload B", "nap", evidence=r"replay .* differs; moved: layers\.0\.norm\.gemma_weight"),
    _part("AbsorbedRebound", "reload B", evidence=r"moved: layers\.0\.attn\.w_kc"),
    _part("AbsorbedInPlace", "finish twice", "partial reload", evidence=r"layers\.0\.attn\.weight"),
    _part("LinearRecreated", "reload B", evidence="KeyError: 'weight_loader'"),
    _part("LinearSourceDeleted", "reload B", evidence="no attribute `input_scale`"),
    _part("LinearAliasDerivedAgain", "finish twice", "partial reload", evidence=r"layers\.0\.proj\.weight_scale"),
    _part("LinearByValue", "reload B", evidence=_STALE),
    _part("LinearLatched", "reload B", evidence=_STALE),
    _part("LinearKeyedByVersion", "reload B", evidence=_STALE),
    _part("LinearKernelStranded", "reload B", evidence=r"replay .* differs; moved: layers\.0\.proj\.kernel\.alpha"),
    _part("LinearWorkspaceMoves", "reload B", evidence=r"^LawBroken: moved: layers\.0\.proj\.workspace\[0\]"),
    _part("LinearIndexLost", "nap", evidence=_STALE),
    _part("ExpertsSwappedInPlace", "finish twice", "partial reload", evidence="experts"),
    _part("ExpertsStorageReplaced", "reload B", evidence=r"moved: layers\.0\.experts\.w13_kernel"),
    _part("ExpertsTransposed", "reload B", evidence="size of tensor"),
    _part("ExpertsPaddingUninitialised", "reload B", evidence=_STALE),
    _part("ExpertsIdsByPosition", "load", evidence="is not the checkpoint's: .*experts", is_wrong_from_the_start=True),
    _part("ExpertsGateUpMapped", "load", evidence="from the reference", is_wrong_from_the_start=True),
    _loading("ChecksNothing", "misfit tensor", "missing tensor", evidence="does not name|accepted"),
    _loading("WritesAsItReads", "reload that breaks off", "misfit tensor", evidence=_STALE),
    _loading("RollsBackToTheNew", "reload that breaks off", evidence=_STALE),
    _loading("KeepsWhatWasLent", "lent buffers", evidence=_STALE),
    _loading("CountsInsteadOfNaming", "repeated tensor", evidence="was accepted"),
    _loading("PairsWithinOneCall", "buckets", evidence=r"is not the checkpoint's: layers\.0\.experts\.0\.gate_proj"),
    _loading("FinishesEveryBucket", "buckets", evidence=r"layers\.0\.proj\.weight_scale"),
    _loading("ServesWhatItCached", "reload B", evidence=_STALE),
    _loading("TiesByContent", "equal tensors", evidence="is not the checkpoint's: embed_tokens.weight"),
    _loading("SwapsOnce", "swap embed and head", evidence="no attribute 'weight'"),
    _loading("SwapRebinds", "swap embed and head", evidence=r"moved: embed_tokens\.weight, lm_head\.weight"),
    _loading("WritesPastTheHook", "write by name", evidence=_STALE),
    _loading("StateMovesInAPause", "nap", evidence="moved: state"),
    _loading("WrapsWithoutInterface", "wrappers", evidence=r"AdapterWithoutInterface\.num_embeddings"),
)
EXHIBITS = {exhibit.name: exhibit for exhibit in _LIST}


def _sglang(numbers: str, shape: str, laws: tuple[int, ...], says: str, *exhibits: str, **more: object) -> Bug:
    return _bug("sglang", numbers, shape, laws, says, exhibits, more)


def _vllm(numbers: str, shape: str, laws: tuple[int, ...], says: str, *exhibits: str, **more: object) -> Bug:
    return _bug("vLLM", numbers, shape, laws, says, exhibits, more)


def _bug(
    where: str, numbers: str, shape: str, laws: tuple[int, ...], says: str, exhibits: tuple[str, ...], more: dict
) -> Bug:
    return Bug(where=where, numbers=numbers, shape=shape, laws=laws, says=says, exhibits=exhibits, **more)


_RFC = "A proposal, not a bug."

BUGS: tuple[Bug, ...] = (
    _sglang("#2322", "f", (2, 6), "an update with a model of another size corrupts the live one", "ChecksNothing"),
    _sglang("#4961", "a", (5,), "absorbed MLA weights move after every load", "AbsorbedRebound"),
    _sglang("#6265", "d", (8,), "a second post-load corrupts MLA weights", "AbsorbedInPlace"),
    _sglang("#7421, #8863", "e", (4,), "a parameter is made anew without its loader", "LinearRecreated"),
    _sglang(
        "#11289, #11780, #11980, #12060",
        "a",
        (5,),
        "a reload of gpt-oss reads freed memory: experts are other storage",
        "ExpertsStorageReplaced",
        mutants=("reload_rebinds", "replay_unchecked"),
    ),
    _sglang("#14178", "d", (2,), "small update buckets give garbled output", "PairsWithinOneCall"),
    _sglang("#17107, #17114", "bd", (4,), "every bucket of an FP8 update is post-processed", "FinishesEveryBucket"),
    _sglang(
        "#18085",
        "ae",
        (4, 5),
        "NVFP4 could not be reloaded: derived scales were bound anew",
        "LinearRecreated",
        mutants=("nvfp4_derived_storage_rebound",),
    ),
    _sglang(
        "#18189, #19995",
        "f",
        (2,),
        "an ignore list names unfused modules, the model fused ones",
        mutants=("nvfp4_document_fused_not_expanded",),
    ),
    _sglang(
        "#18370, #18440",
        "f",
        (2,),
        "prefixes of an exclude list do not match, and the cache stays in bfloat16",
        mutants=("nvfp4_document_names_not_prefixes", "nvfp4_cache_scales_ignored"),
    ),
    _sglang(
        "#22547",
        "f",
        (9,),
        "the LoRA wrapper of an embedding lacks num_embeddings",
        "WrapsWithoutInterface",
        mutants=("lora_base_layer_named",),
        is_seed=True,
    ),
    _sglang(
        "#22673, #26430",
        "a",
        (4, 5),
        "gemma_weight is bound anew by the loader; a graph reads the old one",
        "NormRebound",
        mutants=("gemma_weight_rebound", "gemma_weight_stale"),
        is_seed=True,
    ),
    _sglang(
        "#22715, #32913, #37370, #37371, #38908",
        "g",
        (6,),
        "loaders keep buffers that a streamer lent",
        "KeepsWhatWasLent",
        mutants=("borrowed_piece_kept",),
    ),
    _sglang(
        "#25107, #25190",
        "c",
        (4,),
        "scales are freed once others were derived from them, and a reload needs them",
        "LinearSourceDeleted",
        "LinearAliasDerivedAgain",
        mutants=("nvfp4_source_deleted", "nvfp4_interleaved_copied", "nvfp4_derived_again", "nvfp4_part_derived"),
        is_seed=True,
    ),
    _sglang("#26032", "d", (4,), "transposed experts break the second load", "ExpertsTransposed"),
    _sglang(
        "#26798",
        "d",
        (8, 10),
        "a swap of embedding and head cannot be done twice",
        "SwapsOnce",
        "SwapRebinds",
        mutants=("draft_keeps_old_head", "tied_head_copied"),
        is_seed=True,
    ),
    _sglang(
        "#27140",
        "a",
        (5,),
        "state buffers of hybrids move in a pause",
        "StateMovesInAPause",
        mutants=("graphs_kept_asleep",),
    ),
    _sglang("#27684", "be", (4,), "loaders and cached scales of a kernel's layout are lost", "LinearByValue"),
    _sglang("#28676", "b", (7,), "a table of indices outside of the module is stale after a pause", "LinearIndexLost"),
    _sglang(
        "#30247", "b", (4, 7), "a cache under data_ptr and _version misses a copy in place", "LinearKeyedByVersion"
    ),
    _sglang(
        "#30749, #30761",
        "df",
        (4, 6),
        "FP8 latches, and a rollback that reads the new path",
        "LinearLatched",
        "RollsBackToTheNew",
        mutants=("nvfp4_layer_derived_once", "reload_publishes_first"),
    ),
    _sglang("#38298", "d", (2,), "halves of a pair are lost between calls of load_weights", "PairsWithinOneCall"),
    _sglang(
        "#39634, #39643",
        "f",
        (10,),
        "the draft of a pipeline has an embedding of its own, which no update reaches",
        mutants=("draft_keeps_old_embedding",),
    ),
    _sglang("#40587", "d", (8,), "finalising FP8 twice corrupts it", "AbsorbedInPlace"),
    _vllm(
        "#11596",
        "a",
        (5,),
        "a graph's input is assigned, not copied into",
        mutants=("static_input_not_copied",),
    ),
    _vllm(
        "#32718",
        "b",
        (6,),
        "a reload returns cached weights",
        "ServesWhatItCached",
        mutants=("reload_reads_old_files", "nvfp4_on_load_codes_latched"),
    ),
    _vllm(
        "#35581",
        "f",
        (2,),
        "the draft's mapping of gate and up is wrong",
        "ExpertsGateUpMapped",
        mutants=("gate_up_shards_swapped",),
    ),
    _vllm(
        "#36652, #36825",
        "f",
        (9,),
        "LoRA knows two slices of a projection that has four",
        mutants=("lora_misses_a_target", "lora_up_before_gate"),
    ),
    _vllm(
        "#39934",
        "f",
        (1, 9),
        "a reload under LoRA does not find base_layer names",
        mutants=("lora_base_layer_named", "lora_old_base"),
    ),
    _vllm(
        "#40390, #46009", "a", (5,), "shuffling and padding experts replaces their storage", "ExpertsStorageReplaced"
    ),
    _vllm("#41670", "b", (4, 5), "a kernel object made anew strands strides and scales", "LinearKernelStranded"),
    _vllm(
        "#41749, #42244, #43163, #43464, #44430",
        "g",
        (6,),
        "tensors of RunAI's streamer are read after they were taken back",
        "KeepsWhatWasLent",
        mutants=("borrowed_piece_kept",),
    ),
    _vllm(
        "#42671, #42716",
        "f",
        (3,),
        "expert_id and shard_id given by position are dropped",
        "ExpertsIdsByPosition",
        mutants=("positional_ids_lost", "expert_ids_lost"),
        is_seed=True,
    ),
    _vllm("#42821, #42823", "d", (4,), "load_weights past the swap of w13 gives gibberish", "ExpertsSwappedInPlace"),
    _vllm("#48251", "a", (5,), "MLA's W_UV is bound anew", "AbsorbedRebound"),
    _vllm("#48284", "d", (8,), "a reload of Mamba layers is not idempotent", "LinearAliasDerivedAgain"),
    _vllm(
        "#48312",
        "f",
        (2, 6),
        "a shard that comes twice counts as progress, a failure leaves a mixture",
        "CountsInsteadOfNaming",
        "WritesAsItReads",
        mutants=("repeated_expert_unnoticed", "reload_writes_as_it_reads", "mixture_serves"),
    ),
    _vllm("#48438", "a", (5,), "workspace and sort indices of Marlin move", "LinearWorkspaceMoves"),
    _vllm(
        "#48941",
        "a",
        (5,),
        "tensors in plain attributes are seen by no census of modules",
        "LinearWorkspaceMoves",
        mutants=("census_of_modules_alone", "census_without_closures"),
    ),
    _vllm("#50521", "b", (4,), "constants of SwiGLU are those of the first weights", "LinearByValue"),
    _vllm("#50523", "b", (4,), "padded rows are left uninitialised by a reload", "ExpertsPaddingUninitialised"),
    _vllm(
        "#51665",
        "f",
        (10,),
        "whether a model is tied is read off the checkpoint's values",
        "TiesByContent",
        mutants=("embedding_for_head", "head_for_tied"),
    ),
    _vllm("#54477", "b", (4,), "most post-load hooks are pure copies", absent=_RFC),
    _vllm("#57805", "e", (4,), "a copy into a parameter passes the reload's hook", "WritesPastTheHook"),
    Bug(
        where="vllm-ascend",
        numbers="#17217",
        shape="b",
        laws=(7,),
        says="rotary tables outside of the module are lost in a deep sleep",
        exhibits=("LinearIndexLost",),
    ),
    Bug(
        where="parallax",
        numbers="#444",
        shape="f",
        laws=(10,),
        says="the flag of tied weights is forced off, and the head is zero",
        mutants=("head_for_tied",),
    ),
    Bug(
        where="Model-Optimizer",
        numbers="#1323",
        shape="f",
        laws=(2,),
        says="an export of mixtures of experts is silently not quantised",
        mutants=("nvfp4_silent_bfloat16", "nvfp4_document_patterns_ignored"),
    ),
    Bug(
        where="Model-Optimizer",
        numbers="#2091",
        shape="f",
        laws=(),
        says="NVFP4 on the gate half of a fused q_proj degrades hybrids",
        absent="A recipe that costs quality, with the right bits: nothing that a comparison of two backends could see.",
    ),
    Bug(
        where="Model-Optimizer",
        numbers="#2302, #2363",
        shape="f",
        laws=(2,),
        says="documents disagree with themselves about what is quantised",
        mutants=("nvfp4_document_unknown_algorithm_taken", "nvfp4_document_no_inputs_not_read"),
    ),
)
