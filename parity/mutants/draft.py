"""Mutants of the draft, of what it shares with its target, and of speculative decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from parity.mutants import Mutant, Patch
from parity.mutants.bench import Subject
from parity.mutants.detectors import mtp, speculative
from parity.mutants.life import life
from parity.mutants.moe import no_final_norm
from parity.mutants.plants import BOTH, DRAFTING, HYBRID, Instead, at_backend, each, exchanged, of, wrapped

_MTP = "qwen3_5:Qwen3_5MTP"


def _fc_halves(np_: Any, w: Any) -> Any:
    return np_.concatenate([w[:, w.shape[0] :], w[:, : w.shape[0]]], 1)


def _unnormed_state() -> list[Patch]:
    """The draft is given what the final norm is given."""
    last: list[Any] = []

    def tap(original: Any, path: str, name: str, value: Any, level: str = "operations") -> Any:
        if name.startswith("layers."):
            last[:] = [value]
        return original(path, name, value, level)

    def call(original: Any, self: Any, embedded: Any, hidden: Any, *rest: Any, **more: Any) -> Any:
        return original(self, embedded, last.pop()[:, : hidden.shape[1]], *rest, **more)

    return [*wrapped("layers.decoder:tap", tap)(), *wrapped(f"{_MTP}.CALL", call)()]


def _same_token(original: Any, np_: Any, self: Any, embedded: Any, hidden: Any, *rest: Any, **more: Any) -> Any:
    return original(self, np_.roll(embedded, 1, 1), hidden, *rest, **more)


def _earlier(steps: Any, config: Any, layers: Any, positions: Any, *rest: Any, **options: Any) -> Any:
    return steps(config, layers, positions - 1, *rest, **options)


def _sees_padding(
    steps: Any, np_: Any, config: Any, layers: Any, positions: Any, mask: Any, *rest: Any, **more: Any
) -> Any:
    return steps(config, layers, positions, np_.ones_like(mask), *rest, **more)


def _sharing(
    in_torch: Callable[[Any, list[Any]], dict[str, Any]], in_jax: Callable[[Any, Any], dict[str, Any]]
) -> Callable[[], list[Patch]]:
    """The draft reads another embedding or head than its target has.

    Args:
        in_torch: of the target and a list to remember things in; methods to stand for the target's.
        in_jax: of the first weights seen and of those now; weights to stand for the latter.
    """

    def plant() -> list[Patch]:
        kept: list[Any] = []

        def make(original: Any, backend: str) -> Any:
            def read(self: Any) -> Any:
                found = original.fget(self)
                if backend == "torch":
                    return Instead(found, **in_torch(found, kept))
                kept[:] = kept or [found]
                return found | in_jax(kept[0], found)

            return property(read)

        return [Patch("draft:Draft.weights", make, in_torch="draft:Draft.bound")]

    return plant


def _remembered(half: str) -> Callable[[Any, list[Any]], dict[str, Any]]:
    def methods(target: Any, kept: list[Any]) -> dict[str, Any]:
        from torch.nn import functional

        table = target.decoder.embed_tokens if half == "embed" else target.lm_head
        kept[:] = kept or [table.weight.detach().clone()]
        if half == "embed":
            return {"embed": lambda ids: functional.embedding(ids, kept[0])}
        return {"head": lambda x: functional.linear(x, kept[0])}

    return methods


def _embedding_as_head(target: Any, kept: list[Any]) -> dict[str, Any]:
    return {"head": lambda x: x @ target.decoder.embed_tokens.weight.T}


def _without_draft(commit: Any, model: Any, values: Iterable[tuple[str, Any]], names: list[str], *staging: Any) -> None:
    commit(model, ((name, value) for name, value in values if not name.startswith("mtp.")), names, *staging)


def _draft_stays(published: Any, self: Any, weights: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
    kept = {"mtp": self.weights["mtp"]} if kind == "reload" else {}
    return published(self, weights | kept, kind, *args, **kwargs)


def _accepting(change: Callable[[Any, Any], Any], following: Callable[[Any, Any], Any]) -> Callable[[], list[Patch]]:
    """``change(count, most)`` are accepted, and the token after ``following(count, most)`` comes next."""

    def speculation(original: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        right = made.accepted

        def accepted(logits_BTV: Any) -> Any:
            (count_B, _), best_BT, most = right(logits_BTV), made.best(logits_BTV), made.drafted.shape[1]
            return change(count_B, most), best_BT[np.arange(len(best_BT)), following(count_B, most)]

        made.accepted = accepted
        return made

    return wrapped("speculative:Speculation", speculation)


def _all_kept(original: Any, np_: Any, parts: Any, count: Any) -> Any:
    if "state_history" not in parts:
        return original(parts, count)
    return original(parts, np_.full_like(count, parts["state_history"].shape[1]))


def _conv_stays(original: Any, parts: Any, count: Any) -> None:
    window = parts["conv_history"].clone() if "conv_history" in parts else None
    original(parts, count)
    if window is not None:
        parts["conv"].copy_(window[:, -parts["conv"].shape[1] :])


def _keep(change: Callable[[Any, Any, Any, int], dict[str, Any]]) -> Callable[[], list[Patch]]:
    """``change(cache before, cache after, count, tokens)`` gives fields of the cache that come out wrong."""

    def make(original: Any, backend: str) -> Any:
        if backend == "torch":

            def keep(self: Any, count: Any, tokens: int) -> None:
                before = dataclasses.replace(self, key_mask=self.key_mask.clone(), position=self.position.clone())
                original(self, count, tokens)
                for name, value in change(before, self, count, tokens).items():
                    getattr(self, name).copy_(value)

            return keep

        def kept(self: Any, history: Any, count: Any, tokens: int) -> Any:
            after = original(self, history, count, tokens)
            return dataclasses.replace(after, **change(self, after, count, tokens))

        return kept

    return lambda: [Patch("cache:Cache.kept", make, in_torch="cache:Cache.keep")]


def _not_written(
    extend: Any, self: Any, next_ids: Any, hidden: Any, positions: Any, last: Any, cache: Any, *rest: Any, **more: Any
) -> Any:
    given = (next_ids, hidden, positions, last, cache, *rest)
    if next_ids.shape[1] > 8:  # the prompt
        return extend(self, *given, **more)
    before = {name: part.clone() for name, part in cache.layers["mtp"].items()}
    found = extend(self, *given, **more)
    for name, part in before.items():
        cache.layers["mtp"][name].copy_(part)
    return found


def _last_but_one(
    extend: Any, self: Any, ids: Any, hidden: Any, positions: Any, last: Any, *rest: Any, **more: Any
) -> Any:
    return extend(self, ids, hidden, positions, (last - 1).clamp(min=0), *rest, **more)


def _values_stay(compact: Any, self: Any) -> None:
    before = [(parts["value"], parts["value"].clone()) for parts in self.layers.values() if "value" in parts]
    compact(self)
    for live, old in before:
        live.copy_(old)


def _of(name: str, plant: Callable[[], Any], says: str, subject: Subject = HYBRID, **more: Any) -> Mutant:
    more = {"detector": mtp, "source": "issue draft"} | more
    return of("draft", name, more.pop("source"), plant, says, subject, **more)


def _speculation(name: str, plant: Callable[[], Any], says: str, **more: Any) -> Mutant:
    return _of(name, plant, says, DRAFTING, detector=speculative, **more)


DRAFT_MUTANTS: list[Mutant] = [
    _of("draft_halves_exchanged", each("mtp.fc", _fc_halves), "hidden state before embedding in fc", backends=BOTH),
    _of("draft_of_unnormed_state", _unnormed_state, "the hidden state of before the final norm"),
    _of(
        "draft_of_same_token",
        at_backend(f"{_MTP}.CALL", _same_token),
        "the embedding of token t, not t + 1",
        backends=BOTH,
    ),
    _of(
        "draft_positions_earlier",
        wrapped("draft:steps", _earlier),
        "positions of token t, not t + 1",
        equivalent="rotary embedding is relative, and all of the draft's tokens are shifted alike",
    ),
    _of("draft_sees_padding", at_backend("draft:steps", _sees_padding), "the draft sees padding"),
    _of(
        "draft_norms_exchanged",
        exchanged("pre_fc_norm_embedding", "pre_fc_norm_hidden"),
        "norms of embedding and hidden state exchanged",
        backends=BOTH,
    ),
    _of(
        "draft_without_norm",
        lambda: [Patch(f"{_MTP}.__init__", no_final_norm)],
        "the draft without its last norm",
    ),
    _of(
        "draft_head_is_embedding",
        _sharing(_embedding_as_head, lambda old, new: {"lm_head": new["model"]["embed_tokens"]}),
        "the draft's head is the embedding, although the model is not tied",
        backends=BOTH,
    ),
    _of(
        "draft_keeps_old_embedding",
        _sharing(
            _remembered("embed"),
            lambda old, new: {"model": new["model"] | {"embed_tokens": old["model"]["embed_tokens"]}},
        ),
        "the draft goes on with the embedding of before",
        source="sglang 39634",
        detector=life,
        backends=BOTH,
    ),
    _of(
        "draft_keeps_old_head",
        _sharing(_remembered("head"), lambda old, new: {"lm_head": old["lm_head"]}),
        "the draft goes on with the head of before",
        source="sglang 26798",
        detector=life,
        backends=BOTH,
    ),
    _of(
        "draft_not_reloaded",
        wrapped("weights:_commit", _without_draft),
        "a reload leaves mtp.* as it was",
        source="law 2",
        detector=life,
    ),
    _of(
        "draft_leaf_kept",
        wrapped("model:Model.published", _draft_stays),
        "a reload keeps the old mtp.*",
        source="law 2",
        detector=life,
        backends=("jax",),
    ),
    _speculation(
        "wrong_token_accepted",
        _accepting(lambda n, most: np.maximum(n, 1), lambda n, most: np.maximum(n, 1)),
        "the first guess is taken, right or wrong",
        backends=BOTH,
    ),
    _speculation(
        "accepts_one_less",
        _accepting(lambda n, most: np.maximum(n - 1, 0), lambda n, most: np.maximum(n - 1, 0)),
        "one right guess too few is taken: right, but slow",
    ),
    _speculation(
        "next_token_one_early",
        _accepting(lambda n, most: n, lambda n, most: np.maximum(n - 1, 0)),
        "after the guesses comes the token of one place before",
        backends=BOTH,
    ),
    _speculation(
        "state_not_rolled_back",
        at_backend("cache:keep_first", _all_kept),
        "the state keeps what refused guesses wrote",
        backends=BOTH,
    ),
    _speculation(
        "conv_not_rolled_back", wrapped("cache:keep_first", _conv_stays), "the convolution remembers refused guesses"
    ),
    _speculation(
        "position_not_rolled_back",
        _keep(lambda before, after, count, tokens: {"position": before.position}),
        "positions count refused guesses",
    ),
    _speculation(
        "refused_keys_visible",
        _keep(lambda before, after, count, tokens: {"key_mask": before.key_mask}),
        "keys of refused guesses stay visible",
        refusal=RuntimeError,  # of torch: the cache never gets empty slots back
        backends=BOTH,
    ),
    _speculation(
        "draft_cache_not_overwritten", wrapped("draft:Draft.extend", _not_written), "the draft goes on from its guesses"
    ),
    _speculation(
        "draft_goes_on_one_early",
        wrapped("draft:Draft.extend", _last_but_one),
        "the draft goes on from one token before",
    ),
    _speculation(
        "compaction_leaves_values",
        wrapped("cache:Cache.compact", _values_stay),
        "dropping empty slots moves keys but not values",
    ),
]
