"""What a comparison shows in a notebook: every object as HTML, as text, and as numbers that are recomputed here."""

import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic_traces import add_error, make_backend, make_oracle, trio
from test_report import Page

import parity
from parity.report.notebook import Table, Timeline
from parity.report.page import render_html
from parity.report.results import to_junit, to_markdown
from parity.report.sparkline import bars
from parity.wording import number
from parity.zoo import make_checkpoint


@pytest.fixture(scope="module")
def failing():
    a, b, oracle = trio()
    a.tensors["attention_mask"] = b.tensors["attention_mask"] = oracle.tensors["attention_mask"].copy()
    for trace in (a, b, oracle):
        trace.tensors["attention_mask"] = trace.tensors["attention_mask"].copy()
        trace.tensors["attention_mask"][2, 15:] = 0
        trace.meta.pop("input_hash")
    add_error(a, oracle, from_layer=3, times=10)
    return parity.compare(a, b, oracle)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two torch models: what is compared here needs no compiling."""
    checkpoint = make_checkpoint("qwen3", tmp_path_factory.mktemp("pair") / "c", num_hidden_layers=2, vocab_size=97)
    return parity.live_pair(checkpoint, "torch", "torch")


@pytest.fixture
def broken(pair):
    """The second is 1 % off in layer 0."""
    hook = pair.b.model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda m, x, out: out * 1.01)
    yield pair.compare()
    hook.remove()


# A comparison and what it is made of


def test_traces_are_compared_from_their_files_too(tmp_path):
    traces = trio()
    paths = [trace.save(tmp_path / str(i)) for i, trace in enumerate(traces)]
    assert parity.compare(*paths) == parity.compare(*traces)
    assert parity.compare(str(paths[0]), traces[1]).summary == parity.compare(*traces[:2]).summary
    (tmp_path / "bad").write_bytes(b"no trace")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        parity.compare(tmp_path / "bad", paths[1])


def test_a_comparison_shows_its_sentence_and_a_bar_for_each_tensor_and_folds_the_rest(failing):
    page = failing._repr_html_()
    Page(page)
    seen, _, folded = page.partition("<details>")
    assert "jax is wrong in model.layers.2" in seen
    assert seen.count("<title>") == len(failing.rows)
    assert "Error by module" in folded
    assert repr(failing) == failing.to_text()
    assert "to_dict" not in failing.to_json()


def test_bars_cross_the_line_exactly_where_a_tensor_is_over_its_limit():
    drawn = bars(["embed", "one", "two", "three"], [0.0, 1.0, 1.001, np.nan], "caption")
    line = float(drawn.partition('class="edge" d="M0 ')[2].partition("H")[0])
    tops = [float(part.partition("h")[0]) for part in drawn.split("V")[1::2]]
    assert [top < line for top in tops] == [False, False, True, True]
    assert "not finite" in drawn
    assert bars([], [], "caption") == ""


def test_every_object_is_escaped_and_none_runs_or_fetches_anything(failing):
    evil = '<script>alert("x")</script>&"\''
    a, b, oracle = trio()
    a.meta["backend"] = evil
    found = parity.compare(a, b, oracle)
    for one in (found, found.table(), found.plot_layers(), found.token(3), found.heat(), found.heat("logits")):
        page = one._repr_html_()
        parsed = Page(page)
        assert not any(tag in ("script", "img", "link") for tag, _, _ in parsed.attributes)
        assert "http" not in page
        assert "data-jp-theme-light" in page  # Jupyter's own themes
        assert len(repr(one)) > 20


@pytest.mark.parametrize("skipped", [parity.Comparison.skipped("no device"), None])
def test_what_was_not_compared_is_shown_and_cannot_be_looked_into(skipped):
    a, b, _ = trio()
    b.meta["input_hash"] = "0" * 64
    found = skipped or parity.compare(a, b)
    for one in (found, found.table(), found.plot_layers(), found.heat()):
        Page(one._repr_html_())
        assert repr(one)
    assert found.plot_layers()._repr_svg_() is None
    for ask in (found.token, lambda: found.heat("logits"), lambda: found.inject("layers.0")):
        with pytest.raises(ValueError, match=r"no two tokens|was not judged, and nothing else|live models"):
            ask()


# The table and the chart


def test_a_table_has_a_column_for_everything_and_a_line_for_every_tensor(failing):
    columns = failing.table().to_dict()
    assert {len(column) for column in columns.values()} == {len(failing.rows)}
    assert columns["name"] == [row.name for row in failing.rows]
    assert columns["e_a"][3] == failing.rows[3].e_a
    assert columns["worst_row"][3] == failing.rows[3].worst_token.row
    deep = make_oracle(shape=(1, 30), layers=40)
    table = parity.compare(make_backend(deep, "jax", 1), make_backend(deep, "torch", 2), deep).table()
    assert len(repr(table).splitlines()) == 44
    assert table._repr_html_().count("<tr") == 44


def test_a_table_becomes_a_dataframe_where_there_is_pandas_and_says_so_where_not(failing, monkeypatch):
    class Pandas:
        DataFrame = dict

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    assert Table(failing).to_pandas() == failing.table().to_dict()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="pip install pandas"):
        failing.table().to_pandas()


def test_the_chart_by_itself_is_one_svg_with_its_styles(failing):
    root = ElementTree.fromstring(failing.plot_layers()._repr_svg_())
    name = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{name}svg"
    assert "--fail" in root.find(f"{name}style").text
    assert len(root.findall(f".//{name}circle[@class='pa']")) == len(failing.rows)


def test_a_timeline_shows_which_weights_were_held_after_each_step():
    events = [
        parity.EventResult(f"reload {name}", "jax", "pass", version=i, root=name * 64) for i, name in enumerate("aba")
    ]
    timeline = Timeline(events)
    colours = re.findall(r"background:(#\w{6})", timeline._repr_html_())
    assert colours[0] == colours[2] != colours[1]
    assert [line.split()[1] for line in repr(timeline).splitlines()[1:]] == ["a", "b", "a"]


# A token


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def test_a_token_says_what_each_side_would_say_next(failing):
    view = failing.token(1, 7, top=3)
    assert (view.row, view.position, view.judged) == (1, 7, True)
    a, b, oracle = (trace.tensors["logits"][1, 7] for trace in (failing.case.a, failing.case.b, failing.case.oracle_a))
    assert [one.label for one in view.speakers] == ["jax", "torch", "oracle"]
    for speaker, logits in zip(view.speakers, (a, b, oracle), strict=True):
        order = np.argsort(-logits)
        assert [pick.token_id for pick in speaker.picks] == order[:3].tolist()
        assert speaker.picks[0].probability == pytest.approx(softmax(logits)[order[0]])
        assert speaker.margin == pytest.approx(logits[order[0]] - logits[order[1]], rel=1e-6)
    q = softmax(oracle)
    for speaker, logits in zip(view.speakers[:2], (a, b), strict=True):
        assert speaker.kl == pytest.approx(np.sum(q * np.log(q / softmax(logits))), rel=1e-6)
    assert view.speakers[2].kl is None
    assert view.token_id == failing.case.a.tensors["input_ids"][1, 7]


def test_a_token_has_its_errors_tensor_by_tensor(failing):
    view = failing.token(1, 7)
    assert [stage.tensor for stage in view.stages] == [row.name for row in failing.rows]
    for stage in view.stages:
        a, b, r = (
            trace.tensors[stage.tensor][1, 7].astype(np.float64)
            for trace in (failing.case.a, failing.case.b, failing.case.oracle_a)
        )
        assert stage.e_a == pytest.approx(np.linalg.norm(a - r) / np.linalg.norm(r))
        assert stage.direct == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))
        assert stage.used == failing.token_used[stage.tensor][1, 7]
    assert "Its error, module by module" in view._repr_html_()
    before, after = view.stages[2], view.stages[3]
    begins = (
        f"Most of its error begins in model.layers.2: {number(before.e_a)} before it, {number(after.e_a)} behind it"
    )
    assert begins in view._repr_html_()
    assert begins in repr(view)
    calm = [replace(stage, used=0.5) for stage in view.stages]
    assert replace(view, stages=tuple(calm)).begins == ""
    even = [replace(stage, e_a=0.004 * (1 + i), used=9.0) for i, stage in enumerate(view.stages)]
    assert replace(view, stages=tuple(even)).begins.startswith("No module stands out")
    assert view.to_dict()["stages"][0]["tensor"] == "hidden_states.0"


def test_places_are_those_of_python_and_one_that_is_not_there_is_refused(failing):
    worst = failing.worst_token
    assert (failing.token().row, failing.token().position) == (worst.row, worst.position)
    assert (failing.token(4).row, failing.token(4).position) == (worst.row, 4)
    assert (failing.token(-1, -2).row, failing.token(-1, -2).position) == (2, 18)
    assert not failing.token(2, 18).judged  # padding
    for place in ((3, 0), (0, 20), (-4, 0), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"no token|3 numbers"):
            failing.token(*place)
    with pytest.raises(ValueError, match="at least 1"):
        failing.token(0, 0, top=0)
    for place in ((1.5,), ("a",), (0, "b")):
        with pytest.raises(ValueError, match="expected whole numbers, a position, or a row and a position"):
            failing.token(*place)


def test_without_an_oracle_a_token_compares_the_two_with_each_other():
    a, b, _ = trio()
    view = parity.compare(a, b).token(0, 3)
    assert [one.label for one in view.speakers] == ["jax", "torch"]
    assert all(one.kl > 0 for one in view.speakers)
    assert {stage.e_a for stage in view.stages} == {None}


def test_a_token_that_is_not_finite_is_shown_as_such():
    a, b, oracle = trio()
    a.tensors["logits"][0, 3, 5] = np.nan
    view = parity.compare(a, b, oracle).token(0, 3)
    assert view.speakers[0].kl == np.inf
    assert view.stages[-1].e_a == np.inf
    assert "not finite" in repr(view)
    Page(view._repr_html_())


# Heat


def test_heat_is_what_each_token_uses_of_its_limit(failing):
    heat = failing.heat("layers.2")
    assert heat.name == "hidden_states.3"
    np.testing.assert_array_equal(heat.used, failing.token_used["hidden_states.3"])
    assert np.isnan(heat.used[2, 15:]).all()
    rows = repr(heat).splitlines()[1:4]
    over = [[char in "xX#" for char in row.removeprefix(f"row {i}").strip(" ")] for i, row in enumerate(rows)]
    assert [sum(row) for row in over] == (np.nan_to_num(heat.used) > 1).sum(axis=1).tolist()
    assert heat._repr_html_().count(">row ") == 3
    assert heat._repr_html_().count('class="frame over"') == 1  # the worst token
    assert np.nanmax(failing.heat().used) >= np.nanmax(heat.used)
    with pytest.raises(
        ValueError, match=r"expected one of model.embed_tokens, model.layers.0 to model.layers.3, model.norm, lm_head\."
    ):
        failing.heat("layers.9")


# What if


def test_a_healed_value_says_on_which_side_of_it_the_bug_is(pair, broken):
    assert broken.verdict == "FAIL"
    healed, still = broken.inject("layers.0"), broken.inject("embed_tokens")
    assert healed.verdict == "PASS"
    assert healed.rows[0].name == "hidden_states.2"
    assert "so what was wrong came from model.layers.0 or from before it" in healed.experiment
    assert still.verdict == "FAIL"
    assert still.rows[0].name == "hidden_states.1"
    assert "still wrong, so something after model.embed_tokens is wrong by itself" in still.experiment
    assert broken.inject("hidden_states.1").rows == healed.rows
    assert broken.inject("model.layers.0.mlp").verdict == "PASS"  # the very module, healed
    assert broken.inject("norm").rows[0].name == "logits"
    assert healed.inject("layers.0").verdict == "PASS"


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_a_part_of_a_layer_is_not_cleared_by_what_passes_it_by(broken, part):
    """The bug is in layers.0.mlp, before all of them: its error goes on in the residual stream."""
    still = broken.inject(path := f"model.layers.1.{part}")
    assert still.verdict == "FAIL"
    told = f"still wrong, so something after {path} or beside it, where the residual stream passes it by, is wrong"
    assert told in still.experiment


def test_pictures_join_the_stream_behind_the_table_and_behind_layers(pair):
    seeing = replace(pair, inputs={**pair.inputs, "pixel_values": np.zeros((4, 4))})
    told = {path: "beside it" in seeing._rest(path) for path in ("model.embed_tokens", "model.layers.0", "model.norm")}
    assert told == {"model.embed_tokens": True, "model.layers.0": True, "model.norm": False}
    assert "beside it" in pair._rest("visual.merger")
    assert "beside it" not in pair._rest("lm_head")


def test_an_experiment_claims_nothing_of_what_it_replaced(pair, broken):
    healed = broken.inject("layers.0")
    assert healed.headline.startswith("torch (a) and torch (b) agree after model.layers.0 to within rounding")
    assert {probe.module for probe in healed.probes} == {
        probe.module
        for probe in broken.probes
        if "layers.1." in probe.module or probe.module in ("model.norm", "lm_head")
    }
    assert f"A weight 1 % off after model.layers.0 would have been seen in {len(healed.probes)} of" in healed.summary
    inside = broken.inject("layers.0.mlp")  # the rest of its layer is judged, but was not asked about
    assert {probe.module for probe in inside.probes} == {probe.module for probe in healed.probes}


def test_what_to_run_next_of_live_models_is_run_on_them(pair, broken):
    assert broken.commands == ("parity.bisect(pair.a, pair.b, pair.inputs, checkpoint=pair.checkpoint, layer=0)",)
    found = eval(broken.commands[0], {"parity": parity, "pair": pair})
    assert found.culprit.path == "model.layers.0.mlp"
    assert pair.compare().commands == broken.commands
    assert broken.inject("layers.0").commands == ()


def test_a_bisection_tells_a_modules_own_line_from_the_one_above_and_its_sentence_has_the_numbers_of_a_line(
    pair, broken
):
    found = parity.bisect(pair.a, pair.b, pair.inputs, checkpoint=pair.checkpoint, crossed=False)
    lines = found.to_text().splitlines()
    (line,) = (line for line in lines if line.lstrip().startswith("(the rest of it)") and "<-" in line)
    cells = re.split(r"\s{2,}", line.strip())
    _, _, _, error, limit, used, _ = cells
    said = f"local error {error} against 0 of torch (a) ({used.removesuffix('x')} times its limit of {limit})"
    assert said in found.summary
    assert "Each operation inside it is right on its own; the error appears in what it hands on." in found.summary
    assert "<td>(the rest of it)</td>" in found._repr_html_()


def test_an_experiment_is_told_from_a_plain_pass_wherever_it_is_shown(broken):
    healed = broken.inject("layers.0")
    assert (healed.verdict, healed.kind, broken.experiment) == ("PASS", "EXPERIMENT, PASS", None)
    assert repr(healed).startswith("Experiment: torch (b) went on from torch (a)'s output of model.layers.0")
    junit = to_junit([("x", healed)])
    for text in (repr(healed), healed._repr_html_(), healed.to_json(), junit, to_markdown([("x", healed)])):
        assert "output of model.layers.0" in text
    page = render_html("x", comparisons=[("x", healed)], events=[], facts={})
    assert page.index("Experiment: torch (b)") < page.index("<section")
    assert "EXPERIMENT" not in broken.to_text() + broken._repr_html_()


def test_a_bisection_shows_its_sentence_and_its_tables_and_wraps_between_words(pair, broken):
    found = parity.bisect(pair.a, pair.b, pair.inputs, checkpoint=pair.checkpoint, crossed=False)
    page = found._repr_html_()
    Page(page)
    assert found.culprit.path in page
    assert page.count('<tr class="bad">') == sum(step.blame is not None for _, steps in found.tables for step in steps)
    assert repr(found) == found.to_text()
    told = found.to_text().splitlines()[-4:]
    assert " ".join(told).endswith(found.summary)
    assert max(map(len, told)) <= 110
    assert not re.search(r"\de[+-]\d", page + repr(found))


def test_a_bug_spreads_to_the_side_that_takes_its_value(pair, broken):
    spread = broken.inject("layers.0", into="a")
    assert spread.verdict == "FAIL"
    assert spread.cause == "both wrong"
    assert "both now, so what is wrong in torch (b) came from model.layers.0 or from before it" in spread.experiment
    assert "Both go on from one value of model.layers.0: suspect that one first." in spread.summary
    assert "checkpoint" not in spread.summary
    early = broken.inject("embed_tokens", into="a")
    assert (early.verdict, early.whose) == ("FAIL", "b")
    assert "so its value was right and something after model.embed_tokens is wrong by itself" in early.experiment


def test_the_side_at_fault_is_run_again_whichever_it_is(tmp_path):
    turned = parity.live_pair(make_checkpoint("qwen3", tmp_path / "it", num_hidden_layers=2), "torch", "torch")
    hook = turned.a.model.model.layers["0"].mlp.register_forward_hook(lambda _, given, found: found * 1.05)
    found = turned.compare()
    healed, still = found.inject("layers.0"), found.inject("embed_tokens")
    hook.remove()
    assert (found.whose, healed.verdict, still.verdict, still.whose) == ("a", "PASS", "FAIL", "a")
    assert healed.experiment.startswith("torch (a) went on from torch (b)'s output")
    assert "something after model.embed_tokens is wrong by itself" in still.experiment


def test_a_pair_rounds_less_only_where_anything_is_rounded(tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "it", num_hidden_layers=1)
    with pytest.raises(ValueError, match="is not quantised, so there is nothing to switch off"):
        parity.live_pair(path, weight_only=True)


def test_a_pair_says_what_it_is_and_refuses_what_it_has_not(pair, broken):
    assert "torch (a) against torch (b)" in repr(pair)
    with pytest.raises(ValueError, match="expected 'a' or 'b'"):
        broken.inject("layers.0", into="both")
    for path in ("layers.7", "model.layers.0.mlp.nothing"):
        with pytest.raises(ValueError, match="within=.* names nothing that this run has"):
            broken.inject(path)


def test_a_pair_is_compared_as_it_stands_now(pair, tmp_path):
    assert pair.compare().verdict == "PASS"
    head = -pair.b.model.get_embed_and_head()[1].detach().clone()
    other = pair.replace(b=parity.live_pair(pair.checkpoint.source.path, "torch", "torch").b.model)
    other.b.model.set_embed_and_head(None, head)
    found = other.compare()
    assert found.verdict == "INVALID"
    assert "lm_head.weight" in found.summary
    assert pair.compare().verdict == "PASS"
    with pytest.raises(ValueError, match="could not be compared"):
        found.inject("layers.0")


def test_a_sparse_pair_is_judged_by_its_own_experts(tmp_path):
    checkpoint = make_checkpoint("qwen3-moe", tmp_path / "c", num_hidden_layers=2, vocab_size=97)
    sparse = parity.live_pair(checkpoint, "torch", "torch").compare()
    assert sparse.verdict == "PASS"
    assert sparse.case.oracle_a is not sparse.case.oracle_b
    assert sparse.inject("layers.0").verdict == "PASS"


def test_looking_closer_needs_no_framework():
    blocked = "sys.modules.update(dict.fromkeys(['jax', 'torch', 'ml_dtypes', 'loaders', 'pandas']))"
    code = f"import sys; {blocked}; import parity.report.notebook, parity.report.token_view, parity.report.sparkline"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
