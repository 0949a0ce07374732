import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic_traces import add_error, make_backend, make_oracle, trio

from parity import Comparison, EventResult, compare
from parity.comparison.findings import Probe
from parity.events import render_text, timeline
from parity.report.chart import colours, error_chart
from parity.report.heat import decode_starts, heat_map
from parity.report.page import about, render_html
from parity.report.results import overall, to_json, to_junit, to_markdown
from parity.report.sparkline import bars
from parity.report.style import ROOT_COLOURS
from parity.report.timeline import timeline_table
from parity.wording import times

ROOT_A, ROOT_B = "3fa2c1d4" * 8, "9be01177" * 8
EVENTS = [
    EventResult("load A", "jax", "pass", "21 tensors", 1, ROOT_A, 0.12),
    EventResult("load A", "torch", "pass", "", 1, ROOT_A, 0.34),
    EventResult("reload B", "jax", "fail", "derived scale is stale", 2, ROOT_B, 0.5),
    EventResult("reload B", "torch", "pass", "", 2, ROOT_B, 0.25),
    EventResult("graph replay", "torch", "skip", "no CUDA device"),
]
VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="module")
def failing() -> Comparison:
    a, b, oracle = trio()
    add_error(a, oracle, from_layer=3, times=10)
    return compare(a, b, oracle)


@pytest.fixture(scope="module")
def passing() -> Comparison:
    return compare(*trio())


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the text and the attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(comparisons, events=()) -> str:
    return render_html("A title", comparisons=comparisons, events=list(events), facts={"machine": "here"})


def test_the_report_is_one_well_formed_file_that_fetches_nothing_and_runs_nothing(failing, passing):
    page = page_of([("one", failing), ("two", passing)], EVENTS)
    parsed = Page(page)
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _, _ in parsed.attributes)
    assert not any(name == "src" or name.startswith("on") for _, name, _ in parsed.attributes)
    ids = {value for _, name, value in parsed.attributes if name == "id"}
    links = [value for _, name, value in parsed.attributes if name == "href"]
    assert links  # to the sections of this page
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_everything_a_reader_needs_is_in_sight(failing):
    text = " ".join(Page(page_of([("reload", failing)], EVENTS)).text)
    for part in (
        "A title", "machine", "here", "Something differs", failing.headline, failing.detail, "Where it begins",
        "model.layers.2", "reload B", "derived scale is stale", "v2", ROOT_B[:8], "no CUDA device", "absolute limit",
        "precision.matmul",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("FAIL (bug)") == 1


def test_a_pass_says_so_and_shows_what_came_nearest(passing):
    text = " ".join(Page(page_of([("load", passing)])).text)
    assert "jax and torch agree to within rounding" in text
    assert "Nearest to its limit" in text
    assert "Where it begins" not in text


def test_the_finding_is_said_once_and_before_anything_else_with_what_to_run_next():
    a, b, oracle = trio()
    for trace in (a, b, oracle):
        trace.meta["checkpoint"] = "some/checkpoint"
    add_error(b, oracle, from_layer=3, times=10)
    found = compare(a, b, oracle)
    page = page_of([("x", found)])
    banner, _, rest = page.partition("<section")
    assert '<div class="word">torch is wrong in model.layers.2</div>' in banner
    assert "tandem bisect some/checkpoint" in banner
    assert page.count("so it begins here") == page.count("tandem bisect") == 1
    assert "outlier" not in page
    two = page_of([("x", found), ("y", found)])
    assert two.count("tandem bisect") == 1  # both sections would say the same again
    other = replace(found, headline="jax is wrong in lm_head", commands=("another command",))
    section = page_of([("x", found), ("y", other)]).partition("<section")[2]
    assert section.index("torch is wrong in") < section.index("tandem bisect") < section.index("so it begins here")


def test_a_tab_of_the_browser_says_what_was_found_and_of_which_checkpoint(failing, passing):
    def title(comparisons, events=()):
        page = render_html("run", comparisons=comparisons, events=list(events), facts={"checkpoint": "some/where/"})
        return re.search("<title>(.*?)</title>", page)[1]

    assert title([("x", failing)]) == "jax is wrong in model.layers.2 \u2013 where \u2013 run"
    assert title([("x", passing), ("y", failing)]) == title([("x", failing)])
    assert title([("x", failing)], EVENTS).startswith("Something differs")


def test_checkpoints_of_two_sides_and_of_several_comparisons_are_not_mixed_up():
    def named(*names, root=None):
        traces = trio()
        for trace, name in zip(traces, names, strict=False):
            trace.meta["checkpoint"] = name
        if root:
            traces[1].meta["weights"] = {"digests": {}, "root": root}
        return compare(*traces)

    one, two, three = named("c", "c"), named("d/1", "d/2"), named("d/1", "d/2", root="0" * 64)
    told = "jax of d/1, torch of d/2"
    assert (about(one)["checkpoint"], about(two)["checkpoint"]) == ("c", f"{told} (equal weights, root cafecafe)")
    assert about(three)["checkpoint"] == told
    page = page_of([("x", one), ("y", two)])
    chips, _, rest = page.partition("<section")
    assert "<dd>2 different ones, named with each comparison</dd>" in chips
    assert "d/1" not in chips
    assert "Checkpoint: c<" in rest
    assert f"Checkpoint: {told} (equal weights" in rest
    assert "Checkpoint: " not in page_of([("x", one), ("y", one)])


def test_shares_of_a_modules_limit_and_of_a_tokens_are_told_apart():
    a, b, oracle = trio()
    add_error(a, oracle, from_layer=3, times=10)
    row = compare(a, b, oracle).rows[3]
    assert not row.by_token
    whole, token = times(1 - row.margin), times(1 - row.token_margin)
    assert whole != token
    found = compare(a, b, oracle)
    place = f"row {row.worst_token.row}, position {row.worst_token.position}"
    assert f"its error over all tokens is {whole} times its limit" in found.summary
    assert f"the worst single token is {place}, at {token} times a token's limit" in found.summary
    card = page_of([("x", found)]).partition("Where it begins")[2]
    assert f"<dt>of its limit, over all tokens</dt><dd>{whole}x</dd>" in card
    assert f"<dt>of a token&#x27;s limit</dt><dd>{token}x</dd>" in card
    assert "<dt>error before, over all tokens</dt>" in card
    assert f"which uses {token} times a token's limit" in card

    a = trio()[0]
    tensors = [name for name in a.tensors if name in ("hidden_states.3", "hidden_states.4", "logits")]
    for name in tensors:
        a.tensors[name][1, 7] *= 1.5
    found = compare(a, b, oracle)
    assert found.worst_row.by_token
    assert "its error at row 1, position 7 is" in found.summary
    assert "times a token's limit, the most of any single token (over all tokens: " in found.summary
    assert "<dt>error after, of this token</dt>" in page_of([("x", found)])


def test_a_tile_that_is_a_failure_is_tinted_and_reads_one_way_only(passing):
    count = passing.top1[1]
    pages = [page_of([("x", replace(passing, top1=(one,)))]) for one in (count, replace(count, agree=3))]
    good = f"<b>{count.agree} of {count.decidable}</b><p>tokens: torch picks the oracle&#x27;s top-1"
    assert f'<div class="tile">{good}' in pages[0]
    assert f'<div class="tile fail"><b>3 of {count.decidable}</b>' in pages[1]


def test_the_map_marks_where_decoding_begins_in_every_row():
    a, b, oracle = trio()
    for trace in (a, b, oracle):
        trace.meta.pop("input_hash")
        trace.tensors["attention_mask"] = trace.tensors["attention_mask"].copy()
        trace.tensors["attention_mask"][1, :3] = trace.tensors["attention_mask"][2, 15:] = 0
    plain = compare(a, b, oracle)
    assert decode_starts(plain) == [None] * 3
    assert 'class="since"' not in heat_map(plain)
    a.meta["decode"] = b.meta["decode"] = 4
    found = compare(a, b, oracle)
    assert decode_starts(found) == [16, 16, 11]
    drawn = heat_map(found)
    marks = re.search(r'class="since" d="([^"]*)"', drawn)[1].split("M")[1:]
    assert len(marks) == 3 + len(found.rows)
    assert len({mark.split()[0] for mark in marks[:2]}) == 1  # the same position
    assert "decoded one at a time" in drawn
    assert "decoded one at a time" in found.heat("layers.2")._repr_html_()


def test_of_two_comparisons_the_one_that_fails_comes_first_and_is_told_above_all(failing, passing):
    page = render_html("run", comparisons=[("whole", passing), ("decoded", failing)], events=[], facts={})
    assert f'<div class="word">{failing.headline}</div><p>Comparisons: 1 of 2 pass.</p>' in page
    assert page.index("<h2>decoded") < page.index("<h2>whole")
    several = [("whole", failing), ("decoded", replace(failing, headline="something else"))]
    assert '<div class="word">Something differs</div>' in render_html("run", comparisons=several, events=[], facts={})


def test_what_people_read_has_one_name_for_a_place_and_no_powers_of_ten_as_computers_write_them():
    a, b, oracle = trio(dtype="float32")
    add_error(a, oracle, from_layer=3, times=1e6)
    found = compare(a, b, oracle)
    texts = [page_of([("x", found)]), found.to_text(), to_markdown([("x", found)])]
    texts += [one._repr_html_() for one in (found, found.token(3), found.heat(), found.table(), found.plot_layers())]
    for text in texts:
        assert "model.layers.2" in text or ">layers.2<" in text
        assert "hidden_state" not in text
        assert not re.search(r"\de[+-]\d", text)
    assert "×10⁻" in texts[0]


def test_a_place_is_called_as_the_checkpoint_calls_it_also_inside_a_multimodal_wrapper():
    a, b, oracle = trio()
    names = ("model.visual.blocks.0.w", "model.language_model.layers.0.mlp.up_proj.weight", "mtp.layers.0.w")
    for trace in (a, b, oracle):
        trace.meta["weights"] = {"digests": dict.fromkeys(names, "aa"), "root": "cafe" * 16}
    add_error(a, oracle, from_layer=3, times=10)
    found = compare(a, b, oracle)
    assert found.headline == "jax is wrong in model.language_model.layers.2"
    assert found.heat("layers.2").name == "hidden_states.3"


def test_beside_a_failure_nothing_is_said_of_other_faults_that_would_have_been_seen(passing):
    probe = Probe("model.layers.0.mlp", "noise", 0.01, "hidden_states.1", 0.0, 0.0, 0.001, 0.0, 0.001)
    a, b, oracle = trio()
    add_error(a, oracle, from_layer=3, times=10)
    failing = replace(compare(a, b, oracle), probes=(probe,))
    assert '<div class="tile"><b>1 of 1</b>' in page_of([("x", replace(passing, probes=(probe,)))])
    assert '<div class="tile"><b>1 of 1</b>' not in page_of([("x", failing)])
    assert not any("tried" in note for note in failing.notes)


def test_the_arithmetic_is_said_to_be_tinted_only_where_something_is(passing):
    assert "tinted" not in page_of([("x", passing)])
    a, b, oracle = trio()
    b.meta["precision"] = {"matmul": "tf32"}
    assert "tinted" in page_of([("x", compare(a, b, oracle))])


def test_text_from_outside_is_escaped_everywhere():
    evil = '<script>alert("x")</script>&"\''
    a, b, oracle = trio()
    a.meta |= {"backend": evil, "device": evil, "checkpoint": evil, "precision": {evil: evil}, "versions": {evil: evil}}
    add_error(a, oracle, from_layer=2, times=20)
    events = [EventResult(evil, evil, "fail", evil, 1, evil, 0.1)]
    for comparison in (compare(a, b, oracle), Comparison.skipped(evil), Comparison(verdict="PASS", summary=evil)):
        page = render_html(evil, comparisons=[(evil, comparison)], events=events, facts={evil: evil})
        Page(page)
        assert "<script" not in page
        assert "<script" not in comparison._repr_html_()


def test_differing_precision_flags_are_tinted_and_flags_of_one_side_are_not():
    a, b, oracle = trio()
    b.meta["precision"] = {"matmul": "tf32", "only_here": "1"}
    page = page_of([("x", compare(a, b, oracle))])
    assert re.findall(r'<tr class="differs"><td>([^<]*)', page) == ["precision.matmul"]
    assert "only_here" in page


def test_the_chart_draws_both_errors_the_limit_the_lid_and_a_ring_where_it_fails(failing):
    page = page_of([("x", failing)])
    for css in ("ea", "eb", "limit", "lid", "mark"):
        assert page.count(f'class="{css}"') == 1
    assert ">jax&#x27;s limit</text>" in page  # which is made of what torch is off
    assert page.count('class="ring"') == sum(row.verdict == "FAIL" for row in failing.rows)
    assert page.count('class="pa"') == len(failing.rows)


def heights(chart: str, css: str) -> list[float]:
    points = re.search(rf'<polyline class="{css}" points="([^"]*)"', chart)[1].split()
    return [float(point.split(",")[1]) for point in points]


def test_the_limit_and_the_lid_are_drawn_as_they_are_told_tensor_by_tensor(passing):
    lids = [row.lid * (3 if row.layer == 2 else 1) for row in passing.rows]
    rows = tuple(replace(row, lid=lid) for row, lid in zip(passing.rows, lids, strict=True))
    chart = error_chart(replace(passing, rows=rows))
    drawn = heights(chart, "lid")
    assert len(drawn) == len(rows)
    assert drawn[2] < min(drawn[:2] + drawn[3:])  # higher up
    swapped = [replace(row, e_a=row.e_b, e_b=row.e_a) for row in passing.rows]
    assert heights(chart, "limit") != heights(error_chart(replace(passing, whose="a")), "lid")
    of_a = heights(error_chart(replace(passing, whose="a")), "limit")
    of_b = heights(error_chart(replace(passing, whose="b", rows=tuple(swapped))), "limit")
    assert of_a == of_b


def test_a_backend_keeps_its_colour_whichever_side_it_is():
    a, b, oracle = trio()
    one, other = error_chart(compare(a, b, oracle)), error_chart(compare(b, a, oracle))
    for chart in (one, other):
        assert re.search(r'class="la"[^>]*>jax<', chart)
        assert re.search(r'class="lb"[^>]*>torch<', chart)
    assert (colours(("torch (a)", "torch (b)")), colours(("x", "y"))) == (("a", "b"), ("a", "b"))
    assert heights(one, "ea") == heights(other, "ea")


def test_the_heat_map_has_positions_along_its_edge_and_room_for_the_worst_at_the_end(passing):
    used = {name: np.full((1, 96), 0.1, np.float32) for name in passing.token_used}
    used["logits"][0, 95] = 0.2
    worst = replace(passing.worst_token, tensor="logits", row=0, position=95, margin=0.8)
    drawn = heat_map(replace(passing, token_used=used, worst_token=worst))
    width = float(re.search(r'viewBox="0 0 (\d+)', drawn)[1])
    x, side, told = re.search(r'class="calm" x="([\d.]+)"[^>]*text-anchor="(\w+)">([^<]*)<', drawn).groups()
    assert (side, told.split()[0]) == ("end", "95")
    assert float(x) < width
    assert all(f">{position}</text>" in drawn for position in (0, 48, 92))


def test_the_first_name_under_the_bars_begins_inside_the_picture_and_covers_no_other():
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(40))]
    drawn = bars(names, [0.5] * 41, "caption")
    first, second = re.findall(r'<text x="([\d.]+)" y="116" text-anchor="(\w+)">', drawn)[:2]
    assert first == ("0.0", "start")
    assert float(second[0]) > 106
    assert 'text-anchor="middle">layers.0</text>' in bars(names[:3], [0.5] * 3, "caption")


def test_bars_above_the_limit_have_a_scale_and_say_which():
    drawn = bars(["model.embed_tokens", "model.layers.0"], [0.5, 5000.0], "caption")
    assert re.findall(r'x="[\d.]+" y="[\d.]+">(\d[\d,]*x?)</text>', drawn) == ["0", "100x"]  # those there is room for
    assert "logarithmic" in drawn
    calm = bars(["model.embed_tokens"], [0.5], "caption")
    assert "logarithmic" not in calm
    assert "10x" not in calm


def test_every_kind_of_comparison_can_be_drawn():
    a, b, oracle = trio(shape=(1, 1))
    cases = [compare(a, b, oracle), compare(a, b), Comparison.skipped("no device"), compare(*trio(sparse=(2,)))]
    a.tensors["logits"][0, 0, 0] = np.nan
    cases.append(compare(a, b, oracle))
    cases.append(compare(b, a))
    a.meta["dtype"] = "float32"
    cases.append(compare(a, b, oracle))
    for comparison in cases:
        Page(page_of([("x", comparison)]))
        Page(comparison._repr_html_())
        assert not re.search(r'="[^"]*\b(nan|inf)\b[^"]*"', comparison._repr_html_())
    Page(page_of([], EVENTS))


@pytest.mark.slow
def test_a_report_of_deep_models_and_long_noisy_sequences_stays_under_two_megabytes():
    oracle = make_oracle(shape=(8, 700), layers=64)
    a, b = make_backend(oracle, "jax", 1), make_backend(oracle, "torch", 2)
    comparison = compare(a, b, oracle)
    rng = np.random.default_rng(0)
    for name, used in comparison.token_used.items():  # every cell another colour than its neighbours
        comparison.token_used[name] = rng.uniform(0, 10, used.shape).astype(np.float32)
    page = page_of([(f"case {i}", comparison) for i in range(8)], EVENTS * 20)
    assert len(page.encode()) < 2_000_000


def test_the_worst_token_of_a_long_sequence_is_still_drawn(failing):
    from parity.report.heat import LEVELS, _levels

    used = np.zeros(1000)
    used[777] = 9.0
    levels = _levels(used, 7)
    assert levels.max() == len(LEVELS)
    assert int(levels.argmax()) == 777 // 7
    assert (_levels(np.full(5, np.nan), 2) == -1).all()


# Events


def test_sets_of_weights_have_colours_that_no_two_share():
    roots = [f"{number:064x}" for number in range(len(ROOT_COLOURS) + 1)]
    events = [EventResult(f"reload {root}", "jax", "pass", root=root) for root in [*roots, roots[0]]]
    drawn = re.findall(r'<i class="dot" style="([^"]*)"', timeline_table(events))
    assert drawn[-1] == drawn[0]
    assert len(set(drawn)) == len(roots)
    assert drawn[-2].startswith("border")  # there is no colour left, so none is used twice
    assert "an empty square is told by its digits" in timeline_table(events)
    assert "empty square" not in timeline_table(events[:3])
    colours = [np.array([int(one[i : i + 2], 16) for i in (1, 3, 5)]) for one in ROOT_COLOURS]
    apart = [np.linalg.norm(one - other) for i, one in enumerate(colours) for other in colours[:i]]
    assert min(apart) > 60
    assert 'style="border' not in timeline_table(events[-2:])


def test_events_become_one_row_each_and_repeated_ones_keep_their_order():
    events = [EventResult("load A", "jax", "pass"), EventResult("load A", "jax", "fail"), *EVENTS[1:2]]
    backends, rows = timeline(events)
    assert backends == ["jax", "torch"]
    assert [row.event for row in rows] == ["load A", "load A"]
    assert [row.cells["jax"].verdict for row in rows] == ["pass", "fail"]
    assert rows[0].cells["torch"] is events[2]
    assert rows[1].cells["torch"] is None


def test_the_text_table_is_aligned_and_tells_what_failed():
    lines = render_text(EVENTS, colour=False).splitlines()
    assert lines[0].split() == ["event", "jax", "torch"]
    assert lines[1] == "load A        pass v1 3fa2c1d4 0.12 s  pass v1 3fa2c1d4 0.34 s"
    assert lines[3] == "graph replay  -                        skip"
    assert "fail  reload B on jax: derived scale is stale" in lines
    assert render_text([]) == "no events"


def test_colours_are_used_on_a_terminal_only(capsys):
    assert "\033[" not in render_text(EVENTS)  # pytest captures, so there is no terminal
    coloured = render_text(EVENTS, colour=True)
    assert "\033[31mfail" in coloured
    assert re.sub(r"\033\[\d+m", "", coloured) == render_text(EVENTS, colour=False)


# Exports


def test_the_overall_verdict_is_the_worst_and_skip_only_when_nothing_ran(failing, passing):
    skipped = Comparison.skipped("x")
    assert overall([("a", passing), ("b", failing)], []) == "FAIL"
    assert overall([("a", passing)], EVENTS) == "FAIL"
    assert overall([("a", passing), ("b", skipped)], EVENTS[:2]) == "PASS"
    assert overall([("b", skipped)], EVENTS[4:]) == "SKIP"
    assert overall([], []) == "SKIP"


def test_junit_has_a_case_per_tensor_with_its_margin_and_fails_where_it_fails(failing):
    root = ElementTree.fromstring(to_junit([("reload", failing)], EVENTS))
    suites = {suite.get("name"): suite for suite in root}
    assert set(suites) == {"reload", "lifecycle jax", "lifecycle torch"}
    cases = {case.get("name"): case for case in suites["reload"]}
    assert set(cases) == {row.name for row in failing.rows} | {"verdict"}
    for row in failing.rows:
        properties = {item.get("name"): item.get("value") for item in cases[row.name].iter("property")}
        assert float(properties["margin"]) == pytest.approx(row.margin, rel=1e-5)
        assert {"token_margin", "limit", "e_a", "e_b"} <= set(properties)
        assert (cases[row.name].find("failure") is not None) == (row.verdict == "FAIL")
    assert cases["verdict"].find("failure").get("message") == failing.summary
    assert suites["reload"].get("failures") == str(sum(row.verdict == "FAIL" for row in failing.rows) + 1)
    assert suites["lifecycle torch"].get("skipped") == "1"


def test_junit_survives_characters_that_xml_cannot_carry():
    events = [EventResult("load \x00\x1b", "jax", "fail", "bytes \x00 <&> \ud800")]
    root = ElementTree.fromstring(to_junit([("x\x01", Comparison.skipped("y\x02"))], events))
    assert root.find(".//failure").get("message") == "bytes \ufffd <&> \ufffd"


@pytest.mark.parametrize("verdict", ["INVALID", "INCONCLUSIVE"])
def test_junit_counts_what_could_not_be_decided_as_an_error(verdict):
    root = ElementTree.fromstring(to_junit([("x", Comparison(verdict=verdict, summary="why"))]))
    assert root[0].get("errors") == "1"
    assert root.find(".//error").get("message") == "why"


def test_json_has_the_overall_verdict_at_its_top_and_is_strict(failing):
    def refuse(name):
        raise AssertionError(name)

    document = json.loads(to_json([("reload", failing)], EVENTS), parse_constant=refuse)
    assert (document["schema"], document["verdict"], document["exit_code"]) == (1, "FAIL", 1)
    assert document["comparisons"][0]["title"] == "reload"
    assert document["comparisons"][0]["divergence"]["layer"] == 3
    assert document["events"][2]["detail"] == "derived scale is stale"


def test_markdown_has_the_sentence_and_tables_that_no_pipe_breaks(failing):
    events = [EventResult("load | A", "jax", "fail", "a\nb | c", 1)]
    lines = to_markdown([("reload | B", failing)], events).splitlines()
    assert failing.summary in lines
    rows = [re.sub(r"\\\|", "", line) for line in lines if line.startswith("|")]
    assert {row.count("|") for row in rows} == {8, 3}


def test_markdown_shows_names_as_text():
    oracle = make_oracle()
    sides = make_backend(oracle, "<b>|jax", 1), make_backend(oracle, "torch", 2, scale=100)
    found = compare(*sides, oracle)
    text = to_markdown([("<i>x", found)])
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;\\|jax" in text
