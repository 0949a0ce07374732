"""The look of the report: one inline style sheet for screen, light and dark, and for print. Nothing is fetched.

Colours carry nothing alone: what they say is written beside them. Shares of a limit are blue below it and orange to red
above, which those who cannot tell red from green can tell apart.
"""

_LIGHT = (
    "--bg:#f6f6f4;--card:#fff;--ink:#1c1e22;--muted:#686d76;--line:#e3e3e0;--soft:#f1f1ee;--pass:#19794a;"
    "--pass-bg:#e4f3ea;--fail:#bf3125;--fail-bg:#fbe7e4;--warn:#8f5a00;--warn-bg:#fbf0d9;--skip:#6d727b;"
    "--skip-bg:#ececea;--a:#2360c5;--b:#c9650a;--ok:#dff0e5;--h0:#eceff2;--h1:#d3e1ee;--h2:#a8c6e0;"
    "--h3:#6f9fc9;--h4:#f2b04c;--h5:#d9601c;--h6:#8e1b1b"
)
_DARK = (
    "--bg:#131417;--card:#1b1d21;--ink:#e7e8ea;--muted:#9aa0a9;--line:#2d3036;--soft:#23262b;--pass:#56c78d;"
    "--pass-bg:#173226;--fail:#ff7a6b;--fail-bg:#3d1d1a;--warn:#eab54e;--warn-bg:#372a10;--skip:#9aa0a9;"
    "--skip-bg:#292c31;--a:#74aaff;--b:#ffab5c;--ok:#1a3025;--h0:#262a30;--h1:#27394b;--h2:#2d5273;"
    "--h3:#3d78ab;--h4:#c98a2c;--h5:#ec6a2c;--h6:#ffb3a1"
)
# Of sets of weights in a lifecycle, first to last: no two are alike, and all can be seen on light and on dark.
ROOT_COLOURS = (
    "#2f6fdb", "#e8830c", "#1f9a55", "#c23aa5", "#12b5cb", "#8b5a2b", "#7d4fe0", "#eccb14", "#d63a3a", "#7c838d",
    "#9ad13c", "#f49ac1",
)  # fmt: skip
# Jupyter has themes of its own, which need not be the browser's
_COLOURS = f"""
.tandem{{{_LIGHT}}}
@media (prefers-color-scheme:dark){{.tandem{{{_DARK}}}}}
[data-jp-theme-light=true] .tandem{{{_LIGHT}}}
[data-jp-theme-light=false] .tandem{{{_DARK}}}
@media print{{.tandem{{{_LIGHT}}}}}
"""

_DRAWN = """
.tandem svg{display:block;width:100%;height:auto}
.tandem svg text{font:11px system-ui,sans-serif;fill:var(--muted)}
.tandem svg .la{fill:var(--a);font-weight:650}
.tandem svg .lb{fill:var(--b);font-weight:650}
.tandem svg .ea,.tandem svg .eb,.tandem svg .limit,.tandem svg .lid{fill:none;stroke-width:2;stroke-linejoin:round}
.tandem svg .ea{stroke:var(--a)}
.tandem svg .eb{stroke:var(--b);stroke-width:5;stroke-opacity:.5}
.tandem svg .limit{stroke:var(--pass);stroke-width:1.2}
.tandem svg .lid{stroke:var(--fail);stroke-width:1.2;stroke-dasharray:5 4}
.tandem svg .edge{stroke:var(--ink);stroke-width:1.2}
.tandem svg .since{stroke:var(--ink);stroke-width:1.6}
.tandem svg .edge-text{fill:var(--ink)}
.tandem svg .limit-text{fill:var(--pass)}
.tandem svg .lid-text{fill:var(--fail)}
.tandem svg .area{fill:var(--ok)}
.tandem svg .grid{stroke:var(--line);stroke-width:1}
.tandem svg .pa{fill:var(--a)}
.tandem svg .pb{fill:var(--b)}
.tandem svg .ring{fill:none;stroke:var(--fail);stroke-width:2}
.tandem svg .halo{fill:none;stroke:var(--card);stroke-width:5}
.tandem svg .frame{fill:none;stroke:var(--ink);stroke-width:2.2}
.tandem svg .mark{stroke:var(--fail);stroke-width:1;stroke-dasharray:2 3}
.tandem svg .calm{fill:var(--ink);font-weight:650}
.tandem svg .mark-text{fill:var(--fail);font-weight:650}
.tandem .h0{fill:var(--h0);background:var(--h0)}
.tandem .h1{fill:var(--h1);background:var(--h1)}
.tandem .h2{fill:var(--h2);background:var(--h2)}
.tandem .h3{fill:var(--h3);background:var(--h3)}
.tandem .h4{fill:var(--h4);background:var(--h4)}
.tandem .h5{fill:var(--h5);background:var(--h5)}
.tandem .h6{fill:var(--h6);background:var(--h6)}
"""

_RULES = """
.tandem{color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
  -webkit-print-color-adjust:exact;print-color-adjust:exact}
body.tandem{margin:0;background:var(--bg)}
.tandem main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
.tandem .brand{font-size:12px;letter-spacing:.14em;text-transform:uppercase;color:var(--muted);margin:0 0 4px}
.tandem h1{font-size:26px;line-height:1.2;margin:0 0 18px;font-weight:650;letter-spacing:-.01em}
.tandem h2{font-size:18px;margin:36px 0 12px;font-weight:650}
.tandem h3{font-size:12px;letter-spacing:.06em;text-transform:uppercase;color:var(--muted);margin:0 0 8px;
  font-weight:600}
.tandem .card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;
  margin:0 0 16px}
.tandem .banner{border-left:6px solid var(--tone);background:var(--tone-bg);border-radius:12px;padding:18px 22px;
  margin:0 0 16px}
.tandem .banner .word{font-size:22px;font-weight:700;color:var(--tone);letter-spacing:-.01em}
.tandem .banner p{margin:6px 0 0;max-width:88ch}
.tandem .pass{--tone:var(--pass);--tone-bg:var(--pass-bg)}
.tandem .fail{--tone:var(--fail);--tone-bg:var(--fail-bg)}
.tandem .invalid,.tandem .inconclusive{--tone:var(--warn);--tone-bg:var(--warn-bg)}
.tandem .skip,.tandem .none{--tone:var(--skip);--tone-bg:var(--skip-bg)}
.tandem .pill{display:inline-block;font-size:12px;font-weight:650;border-radius:99px;padding:2px 10px;
  color:var(--tone);background:var(--tone-bg);white-space:nowrap}
.tandem .facts{display:flex;flex-wrap:wrap;gap:6px 26px;margin:0 0 20px;font-size:13px}
.tandem .facts dt{color:var(--muted);display:inline}
.tandem .facts dd{display:inline;margin:0 0 0 6px;overflow-wrap:anywhere}
.tandem .split{display:grid;grid-template-columns:minmax(0,2fr) minmax(250px,1fr);gap:22px;align-items:start}
.tandem .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(220px,1fr));gap:12px;margin-top:18px}
.tandem .tile{background:var(--soft);border-radius:10px;padding:12px 14px}
.tandem .tile.fail{background:var(--tone-bg)}
.tandem .tile.fail b{color:var(--tone)}
.tandem .tile b{font-size:20px;font-weight:650}
.tandem .tile p{margin:2px 0 0;font-size:13px;color:var(--muted)}
.tandem .found{border:1px solid var(--line);border-top:4px solid var(--tone);border-radius:10px;padding:14px 16px}
.tandem .found .big{font-size:18px;font-weight:650;overflow-wrap:anywhere}
.tandem .found p{margin:4px 0 10px;font-size:13px}
.tandem .found dl{display:grid;grid-template-columns:auto 1fr;gap:3px 14px;margin:0;font-size:13px}
.tandem .found dt{color:var(--muted)}
.tandem .found dd{margin:0;text-align:right;font-variant-numeric:tabular-nums}
.tandem .bar{display:flex;height:10px;border-radius:5px;overflow:hidden;margin:12px 0 4px;background:var(--soft)}
.tandem .bar i{display:block;height:100%}
.tandem .key{font-size:12px;color:var(--muted)}
.tandem .dot{display:inline-block;width:9px;height:9px;border-radius:2px;margin:0 5px 0 0}
.tandem .head{display:flex;gap:12px;align-items:baseline;flex-wrap:wrap;margin:0 0 10px}
.tandem .head h2{margin:0}
.tandem .headline{font-size:17px;font-weight:650;margin:0 0 8px}
.tandem .experiment{border:1.5px dashed var(--warn);background:var(--warn-bg);border-radius:8px;padding:6px 12px;
  margin:0 0 12px;max-width:92ch}
.tandem .next{display:flex;gap:12px;align-items:baseline;margin:10px 0 12px}
.tandem .next span{font-size:12px;letter-spacing:.06em;text-transform:uppercase;font-weight:600;color:var(--muted)}
.tandem .next code{display:block;padding:4px 10px;margin:0 0 4px;border-radius:6px;background:var(--soft);
  overflow-wrap:anywhere}
.tandem .banner .next code{background:var(--card)}
.tandem a{color:var(--a);text-decoration:none;overflow-wrap:anywhere}
.tandem a:hover{text-decoration:underline}
.tandem .sentence{margin:0 0 18px;max-width:92ch}
.tandem .card>h2:first-child,.tandem .card>.heat:first-child{margin-top:0}
.tandem .scroll+h3{margin-top:16px}
.tandem .scroll{overflow-x:auto}
.tandem table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
.tandem th{text-align:left;font-weight:600;color:var(--muted);font-size:12px;padding:6px 10px;
  border-bottom:1px solid var(--line)}
.tandem td{padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top}
.tandem tr:last-child td{border-bottom:0}
.tandem .num{text-align:right;white-space:nowrap}
.tandem code,.tandem .mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px}
.tandem .timeline td{padding:5px 6px;vertical-align:middle}
.tandem .timeline th{padding-left:16px}
.tandem .timeline th:first-child{padding-left:6px}
.tandem .timeline{table-layout:fixed}
.tandem .timeline th:first-child{width:17%}
.tandem .timeline td:first-child{font-weight:600;padding-right:18px}
.tandem .cell{display:flex;gap:8px 10px;align-items:center;flex-wrap:wrap;background:var(--tone-bg);
  border-radius:8px;padding:5px 10px}
.tandem .cell b{color:var(--tone)}
.tandem .cell .why{flex-basis:100%;font-size:12px}
.tandem .cell .key{margin-left:auto}
.tandem tr.bad td{background:var(--fail-bg)}
.tandem tr.differs td{background:var(--warn-bg)}
.tandem .pair{table-layout:fixed}
.tandem .pair th:first-child{width:37%}
.tandem .pair td{overflow-wrap:anywhere}
.tandem .flags{margin-top:22px}
.tandem details{margin-top:14px}
.tandem summary{cursor:pointer;color:var(--muted);font-size:13px;font-weight:600}
.tandem details[open] summary{margin-bottom:8px}
.tandem ul.notes{margin:16px 0;padding-left:18px;font-size:13px;color:var(--muted)}
.tandem .heat{margin-top:20px}
.tandem .heat svg text{font-size:9.5px}
.tandem .legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:12px;color:var(--muted);margin-top:6px}
.tandem .spark{margin:4px 0 0}
.tandem .spark .key{margin:2px 0 0}
.tandem.tandem.tandem table{table-layout:auto;margin:0;color:inherit}
.tandem.tandem.tandem tr:not(.bad):not(.differs){background:none}
.tandem.tandem.tandem :is(td,th):not(.num){text-align:left}
@media (max-width:760px){
  .tandem .split{grid-template-columns:minmax(0,1fr)}
  .tandem .scroll>svg{min-width:600px}
  .tandem main{padding:18px 12px}
}
@media print{
  .tandem main{max-width:none;padding:0}
  .tandem .banner,.tandem .split,.tandem .heat,.tandem .tile,.tandem tr{break-inside:avoid}
  .tandem h2,.tandem h3,.tandem .head,.tandem summary{break-after:avoid}
  .tandem{font-size:12.5px}
  .tandem table,.tandem code,.tandem .mono{font-size:10.5px}
  .tandem td,.tandem th{padding:3px 5px}
  .tandem th.num{white-space:normal}
  .tandem .scroll{overflow:visible}
  .tandem .split{grid-template-columns:minmax(0,2fr) minmax(200px,1fr)}
  body.tandem{background:#fff}
  .tandem details::details-content{content-visibility:visible;display:block}
}
"""

CSS = f"{_COLOURS}{_RULES}{_DRAWN}"


def framed(content: str) -> str:
    """A card for a notebook cell, which brings its own styles and touches no others."""
    return f'<div class="tandem"><style>{CSS}</style><div class="card">{content}</div></div>'


def standalone_svg(svg: str) -> str:
    """A chart of this package as a file of its own: styles and background included."""
    box = svg.partition('viewBox="')[2].partition('"')[0]
    size = dict(zip(("width", "height"), box.split()[2:], strict=True))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tandem" viewBox="{box}" width="{size["width"]}"'
        f' height="{size["height"]}"><style>{_COLOURS}{_DRAWN}</style>'
        f'<rect width="100%" height="100%" fill="var(--card)"/>{svg}</svg>'
    )
