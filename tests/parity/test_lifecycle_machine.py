"""Random lives of a model: whatever happened to it, it equals a cold load of what it must hold now."""

from __future__ import annotations

import dataclasses
import json
import os
import pkgutil
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from lives import BACKENDS, Benches
from safetensors.numpy import load_file, save_file

import jax_models.model
import torch_models.model
import torch_models.weights
from loaders import CheckpointError, open_checkpoint
from parity.backends import open_backend
from parity.cli import main
from parity.events import render_text
from parity.lifecycle.faults import MATCHING, OPENING, READING, other_architecture
from parity.lifecycle.live_bench import HALVES, NEW_TOKENS, Bench
from parity.lifecycle.live_jax import live
from parity.lifecycle.live_model import LawBroken, LiveModel
from parity.lifecycle.run import run_lifecycle, stages
from parity.zoo import make_checkpoint

ZOO = ("qwen3", "qwen3-tied", "qwen3-moe", "qwen3_5", "gemma3")
NO_DRAFT = {"draft", "speculation", "draft under adapter"}
IS_THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
# first calls compile; nothing here is slow by accident
STEADY = settings(suppress_health_check=list(HealthCheck), max_examples=200 if IS_THOROUGH else 8)

letters = st.sampled_from("AB")
some_faults = st.one_of(
    st.lists(st.sampled_from(OPENING), min_size=1, max_size=2, unique=True),
    st.lists(st.sampled_from([f for f in MATCHING if f is not other_architecture]), min_size=1, unique=True),
    st.sampled_from((*READING, other_architecture)).map(lambda fault: [fault]),
)


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    return Benches(tmp_path_factory.mktemp("lives"))


class LifeOfAModel(RuleBasedStateMachine):
    """Every rule is a change; each checks itself against a cold load, the version, addresses and compilations."""

    def __init__(self, benches, backend):
        super().__init__()
        self.benches, self.backend = benches, backend
        self.cache = None  # and the version it was computed at

    @initialize(zoo=st.sampled_from(ZOO), letter=letters)
    def start(self, zoo, letter):
        self.bench = self.benches.bench(self.backend, zoo)
        self.load(letter)

    @rule(letter=letters)
    def load(self, letter):
        self.life = LiveModel(self.bench, letter)
        self.cache = None

    @rule(letter=letters)
    def reload(self, letter):
        self.life.reload(letter)

    @rule(letter=letters, faults=some_faults)
    def broken_reload(self, letter, faults):
        self.life.broken_reload(letter, *faults)

    @rule(letter=letters, halves=st.sampled_from([("embed",), ("head",), HALVES]), is_numpy=st.booleans())
    def swap(self, letter, halves, is_numpy):
        values = None
        if not is_numpy:
            values = dict(zip(HALVES, self.bench.load(self.bench.path(letter)).get_embed_and_head(), strict=True))
            values = {half: x for half, x in values.items() if self.bench.half(half, letter) is not None}
        self.life.swap(letter, halves, values)

    @rule()
    def set_what_is_there(self):
        model = self.life.model.set_embed_and_head(*self.life.model.get_embed_and_head())
        assert model.version == self.life.version
        self.life.model = model
        self.life.check()

    @rule()
    def poison(self):
        self.life.poison()
        self.cache = None  # poison is no event to torch; whether a cache outlives it is nobody's promise

    @rule()
    def export(self):
        self.life.export()

    @rule()
    def generate(self):
        self.life.generate()

    @rule()
    def replay(self):
        """Whatever was captured first, it goes on."""
        if not self.life.is_poisoned:
            self.life.replay()

    @rule()
    def speculate(self):
        if self.bench.has_draft and not self.life.is_poisoned:
            self.life.speculate()

    @rule()
    def nap(self):
        if self.bench.live.captures:
            self.life.nap()
            self.cache = None  # refused, although its version is still there

    @rule()
    def decode(self):
        """One step on from a good cache, which JAX then has used up."""
        (cache, version), self.cache = self.cache, None
        assert version == self.life.version
        self.life.model.decode(np.zeros(self.bench.rows, np.int64), cache)
        self.life.check()

    @invariant()
    def a_cache_is_refused_once_its_version_is_gone(self):
        """Holds after every step, not when chance has it: there is always a cache from before it."""
        if not hasattr(self, "life"):
            return
        if self.cache is not None and self.cache[1] != self.life.version:
            with pytest.raises(ValueError, match="version .*prefill"):
                self.life.model.decode(np.zeros(self.bench.rows, np.int64), self.cache[0])
            self.cache = None
        if self.cache is None:
            _, cache = self.life.model.prefill(**self.bench.prompt, max_new_tokens=NEW_TOKENS)
            self.cache = cache, self.life.version

    def teardown(self):
        if hasattr(self, "life"):
            self.life.check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow_unless("torch")
def test_any_life_of_a_model_ends_as_a_cold_load_of_what_it_holds(backend, benches):
    run_state_machine_as_test(
        partial(LifeOfAModel, benches, backend), settings=settings(STEADY, stateful_step_count=12)
    )


@STEADY
@given(
    steps=st.lists(st.tuples(st.sampled_from(["target", "draft"]), st.sampled_from(["A", "B", "swap"])), max_size=8),
    halves=st.sampled_from([("embed",), HALVES]),
)
def test_a_draft_that_shares_its_target_s_embedding_and_head_still_does_after_any_update(steps, halves, benches):
    """Whoever of the two is reloaded or swapped, both see it, and everything else of the other stays."""
    bench = benches.bench("torch", "qwen3")
    lives = {"target": LiveModel(bench, "A"), "draft": LiveModel(bench, "A")}
    target, draft = (life.model for life in lives.values())
    draft.model.embed_tokens.weight = target.model.embed_tokens.weight
    if "head" in halves:
        draft.lm_head.weight = target.lm_head.weight
    shared = [tensor for half in halves for tensor in bench.tensors_of_half(half, "A")]
    lives["draft"].rebase()
    for who, what in steps:
        other = lives["draft" if who == "target" else "target"]
        if what == "swap":
            lives[who].swap("B", halves)
        else:
            lives[who].reload(what)
        other.holds.update({tensor: lives[who].holds[tensor] for tensor in shared})
        other.check()
        assert draft.model.embed_tokens.weight is target.model.embed_tokens.weight
        assert (draft.lm_head.weight is target.lm_head.weight) == ("head" in halves)


@pytest.mark.parametrize("zoo", [*ZOO, "qwen3_vl"])
@pytest.mark.slow_unless("qwen3-tied")
def test_every_event_passes_on_both_backends(zoo, benches, tmp_path):
    results = run_lifecycle(benches.pair(zoo)["A"], benches.pair(zoo)["B"], scratch=tmp_path)
    skipped = {result.event for result in results if result.verdict == "skip" and result.backend == "torch"}
    assert [result for result in results if result.verdict == "fail"] == [], render_text(results)
    is_tied = zoo in ("qwen3-tied", "gemma3")
    no_draft = set() if zoo == "qwen3_5" else NO_DRAFT
    too_short = {"2 stages", "3 stages"} if zoo == "qwen3_vl" else {"3 stages"}  # for deepstack levels
    of_the_other = "exchange embed and head" if is_tied else "tied embed and head"
    assert skipped == too_short | no_draft | {of_the_other}
    assert {r.event for r in results if r.verdict == "skip" and r.backend == "jax"} == skipped | {"sleep and wake"}
    assert {result.backend for result in results} == set(BACKENDS)
    roots = {name: {r.event: r.root for r in results if r.backend == name and r.root} for name in BACKENDS}
    assert {event: root for event, root in roots["torch"].items() if event in roots["jax"]} == roots["jax"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("zoo", ["qwen3_5-wrapped", "qwen3_5-moe"])
def test_every_event_passes_on_wrapped_and_sparse_hybrids(zoo, benches, tmp_path):
    """In torch alone, which compiles nothing; prompts of the wrapped show images and videos."""
    results = run_lifecycle(benches.pair(zoo)["A"], benches.pair(zoo)["B"], backends=["torch"], scratch=tmp_path)
    assert [result for result in results if result.verdict == "fail"] == [], render_text(results)
    assert {r.event for r in results if r.verdict == "skip"} == {"3 stages", "tied embed and head"}


def skips_a_parameter(commit):
    def changed(model, values, names, staging):
        commit(model, ((n, x) for n, x in values if n != "model.norm.weight"), names, staging)

    return changed


def moves_a_parameter(commit):
    def changed(model, values, names, staging):
        commit(model, values, names, staging)
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.clone(), requires_grad=False)

    return changed


def writes_before_it_checks(update):
    def changed(model, uri, **options):
        model.model.norm.weight.mul_(1.5)
        return update(model, uri, **options)

    return changed


def counts_failures(update):
    def changed(model, uri, **options):
        try:
            return update(model, uri, **options)
        except ValueError:
            model.version += 1
            raise

    return changed


def forgets_the_version(publish):
    def changed(self, event):
        publish(self, event)
        self.version = 1

    return changed


def stops_at_the_first_problem(plan):
    def changed(*args):
        try:
            return plan(*args)
        except CheckpointError as error:
            raise CheckpointError(error.where, error.problems[:1]) from None

    return changed


def keeps_the_old_head(swap):
    return lambda model, embed=None, head=None: swap(model, embed, None if embed is not None else head)


def moves_to_another_device(update):
    def changed(model, uri, **options):
        found = update(model, uri, **options)
        weights = jax.tree.map(lambda x: jax.device_put(x, jax.devices("cpu")[1]), found.weights)
        return dataclasses.replace(found, weights=weights)

    return changed


def keeps_a_leaf(replace):
    return lambda self, *, weights: replace(self, weights=weights | {"lm_head": self.weights["lm_head"]})


def exports_the_files_it_came_from(export):
    def changed(model, directory):
        return shutil.copytree(model.checkpoint.source.path, directory)

    return changed


def forgets_the_draft(commit):
    def changed(model, values, names, staging):
        commit(model, ((n, x) for n, x in values if not n.startswith("mtp.")), names, staging)

    return changed


def exports_without_the_tower(export):
    def changed(directory, checkpoint, specs, read, left_out=(), **options):
        text = tuple(spec for spec in specs if not specs.rules[spec.placements[0].tensor].is_visual)
        return export(directory, checkpoint, dataclasses.replace(specs, params=text), read, left_out, **options)

    return changed


def forgets_to_restore(wake):
    def changed(model):
        found = wake(model)
        model.decoder.norm.weight.mul_(2)
        return found

    return changed


def accepts_everything(accept):
    return lambda drafted, best: (np.full(len(drafted), drafted.shape[1]), best[:, -1])


def replays_nothing(replay):
    return lambda self: None


HYBRID_SABOTAGE = [
    ("qwen3_5", "torch_models.weights._commit", forgets_the_draft, lambda life: life.reload("B")),
    ("qwen3_5", "torch_models.sleep.wake", forgets_to_restore, lambda life: life.nap()),
    ("qwen3_5", "loaders.host.speculation.accept_greedy", accepts_everything, lambda life: life.speculate()),
    ("qwen3_5", "torch_models.recording.Recording.replay", replays_nothing, lambda life: life.replay()),
    (
        "qwen3_5-wrapped",
        "torch_models.weights.export_checkpoint",
        exports_without_the_tower,
        lambda life: life.export(),
    ),
]
SABOTAGE = [
    ("torch", "torch_models.weights._commit", skips_a_parameter),
    ("torch", "torch_models.weights._commit", moves_a_parameter),
    ("torch", "torch_models.weights.update_weights_from_disk", writes_before_it_checks),
    ("torch", "torch_models.weights.update_weights_from_disk", counts_failures),
    ("torch", "torch_models.model.Model.publish", forgets_the_version),
    ("torch", "torch_models.weights.plan_reload", stops_at_the_first_problem),
    ("torch", "torch_models.weights.export", exports_the_files_it_came_from),
    ("jax", "jax_models.swap.set_embed_and_head", keeps_the_old_head),
    ("jax", "jax_models.weights.update_weights_from_disk", moves_to_another_device),
    ("jax", "jax_models.model.Model.replace", keeps_a_leaf),
    ("jax", "jax_models.weights.export", exports_the_files_it_came_from),
]


def short_life(bench):
    life = LiveModel(bench, "A")
    life.broken_reload("B", MATCHING[0], MATCHING[1])
    life.swap("B")
    life.export()
    life.poison()
    life.reload("B")
    life.reload("A")
    life.generate()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_life_breaks_no_law(backend, benches):
    short_life(benches.bench(backend, "qwen3"))


@pytest.mark.parametrize(("backend", "where", "broken"), SABOTAGE, ids=lambda x: getattr(x, "__name__", None))
def test_a_backend_that_breaks_a_law_is_caught(backend, where, broken, benches, monkeypatch):
    module, _, name = where.rpartition(".")
    owner = pkgutil.resolve_name(module)
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    with pytest.raises(LawBroken):
        short_life(benches.bench(backend, "qwen3"))


@pytest.mark.parametrize(("zoo", "where", "broken", "act"), HYBRID_SABOTAGE, ids=lambda x: getattr(x, "__name__", None))
def test_a_draft_a_graph_or_a_tower_that_is_left_behind_is_caught(zoo, where, broken, act, benches, monkeypatch):
    life = LiveModel(benches.bench("torch", zoo), "A")
    module, _, name = where.rpartition(".")
    owner = pkgutil.resolve_name(module)
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    with pytest.raises(LawBroken):
        act(life)


def test_an_event_that_fails_is_one_line_the_next_gets_a_fresh_model_and_the_verb_returns_one(
    benches, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch_models.weights, "export", exports_the_files_it_came_from(None))
    pair, report = benches.pair("qwen3"), tmp_path / "report.json"
    command = ["lifecycle", str(pair["A"]), str(pair["B"]), "--backend", "torch", "--json", str(report)]
    assert main(command) == 1
    assert "exported tensors differ from the model's" in capsys.readouterr().out
    results = json.loads(report.read_text())["events"]
    failed = {result["event"]: result["detail"] for result in results if result["verdict"] == "fail"}
    assert list(failed) == ["swap back"]  # the first to export what is in no file
    assert "exported tensors differ from the model's" in failed["swap back"]
    (after,) = (result for result in results if result["event"] == "exchange embed and head")
    assert after["version"] == 3  # a fresh model, and two swaps


def test_the_verb_prints_the_table_writes_reports_and_returns_zero(benches, tmp_path, capsys):
    pair = benches.pair("qwen3")
    files = [tmp_path / "report.html", tmp_path / "report.json"]
    command = ["lifecycle", str(pair["A"]), str(pair["B"]), "--backend", "torch", "--scratch", str(tmp_path)]
    assert main([*command, "--html", str(files[0]), "--json", str(files[1])]) == 0
    assert capsys.readouterr().out.startswith("event ")
    assert sorted(tmp_path.iterdir()) == files
    assert '"verdict": "PASS"' in files[1].read_text()


def test_checkpoints_that_show_nothing_or_do_not_fit_return_two(benches, capsys):
    a, other = str(benches.pair("qwen3")["A"]), str(benches.pair("qwen3-moe")["B"])
    assert main(["lifecycle", a, a]) == 2
    assert "hold the same weights" in capsys.readouterr().err
    assert main(["lifecycle", a, other]) == 2
    assert "architecture" in capsys.readouterr().err


@pytest.mark.parametrize("embedding", ["F16", "F32"])
def test_weights_that_are_stored_in_less_than_is_computed_in_break_no_law(embedding, tmp_path, capsys):
    """A merge rounds to what they are stored in; and halves of different dtypes cannot be exchanged."""
    pair = [
        make_checkpoint("qwen3", tmp_path / str(seed), seed=seed, dtype="F16", num_hidden_layers=1) for seed in (0, 1)
    ]
    for path in pair:
        tensors = load_file(path / "model.safetensors")
        table = tensors["model.embed_tokens.weight"].astype({"F16": np.float16, "F32": np.float32}[embedding])
        save_file(tensors | {"model.embed_tokens.weight": table}, path / "model.safetensors", metadata={"format": "pt"})
    report = tmp_path / "report.json"
    assert main(["lifecycle", *map(str, pair), "--backend", "torch", "--json", str(report)]) == 0, capsys.readouterr()
    verdicts = {one["event"]: one["verdict"] for one in json.loads(report.read_text())["events"]}
    assert verdicts["exchange embed and head"] == ("pass" if embedding == "F16" else "skip")
    assert verdicts["merge adapter"] == "pass"


@pytest.fixture(scope="module")
def experts_in_bfloat16(tmp_path_factory):
    """Two checkpoints of a mixture that rounding sends tokens to other experts of, on a bench of JAX."""
    root = tmp_path_factory.mktemp("experts")
    odd = {"dtype": "BF16", "num_hidden_layers": 2, "mlp_only_layers": []}
    paths = {letter: make_checkpoint("qwen3-moe", root / letter, seed=at, **odd) for at, letter in enumerate("AB")}
    (root / "scratch").mkdir()
    opened = {letter: open_checkpoint(path) for letter, path in paths.items()}
    return Bench(live(open_backend("jax", "cpu")), opened, root / "scratch")


def test_stages_of_experts_in_bfloat16_are_the_whole_model(experts_in_bfloat16):
    """In bfloat16 another order of sums sends tokens to other experts: right stages were 0.019 off, and failed."""
    assert "equal the whole" in stages(2)(LiveModel(experts_in_bfloat16, "A"))


@pytest.mark.parametrize(
    ("dtype", "changed"), [("float32", lambda x: x.at[:, 0].multiply(1.001)), ("bfloat16", lambda x: x[..., ::-1])]
)
def test_stages_that_hand_on_something_else_are_found(dtype, changed, experts_in_bfloat16, monkeypatch):
    """A little where rounding decides nothing, and as they are served what is of another size."""
    real = jax_models.model.Model.__call__

    def handed_on(self, *args, hidden_states=None, **given):
        if hidden_states is not None and self.dtype == dtype:
            hidden_states = changed(hidden_states)
        return real(self, *args, hidden_states=hidden_states, **given)

    monkeypatch.setattr(jax_models.model.Model, "__call__", handed_on)
    with pytest.raises(LawBroken, match="chained stages differ from the whole model by"):
        stages(2)(LiveModel(experts_in_bfloat16, "A"))
