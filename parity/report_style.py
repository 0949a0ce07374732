"""The look of the report: one inline style sheet for screen, light and dark, and for print. Nothing is fetched."""

CSS = """
.tandem{--bg:#f6f6f4;--card:#fff;--ink:#1c1e22;--muted:#686d76;--line:#e3e3e0;--soft:#f1f1ee;--pass:#19794a;
  --pass-bg:#e4f3ea;--fail:#bf3125;--fail-bg:#fbe7e4;--warn:#8f5a00;--warn-bg:#fbf0d9;--skip:#6d727b;
  --skip-bg:#ececea;--a:#2360c5;--b:#c9650a;--ok:#dff0e5;--h0:#e9ece8;--h1:#cfe0d4;--h2:#a9cbb4;--h3:#e8cf8a;
  --h4:#f0a34a;--h5:#e0602f;--h6:#a51d1d;color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
  -webkit-print-color-adjust:exact;print-color-adjust:exact}
@media (prefers-color-scheme:dark){
  .tandem{--bg:#131417;--card:#1b1d21;--ink:#e7e8ea;--muted:#9aa0a9;--line:#2d3036;--soft:#23262b;--pass:#56c78d;
  --pass-bg:#173226;--fail:#ff7a6b;--fail-bg:#3d1d1a;--warn:#eab54e;--warn-bg:#372a10;--skip:#9aa0a9;
  --skip-bg:#292c31;--a:#74aaff;--b:#ffab5c;--ok:#1a3025;--h0:#2a2d31;--h1:#2a4336;--h2:#376b4f;--h3:#8c7433;
  --h4:#c07a26;--h5:#dd5a2e;--h6:#ff8a80}
}
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
.tandem .head{display:flex;gap:12px;align-items:baseline;flex-wrap:wrap;margin:0 0 6px}
.tandem .head h2{margin:0}
.tandem .sentence{margin:0 0 18px;max-width:92ch}
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
.tandem .pair th:first-child{width:24%}
.tandem .pair td{overflow-wrap:anywhere}
.tandem .flags{margin-top:22px}
.tandem details{margin-top:14px}
.tandem summary{cursor:pointer;color:var(--muted);font-size:13px;font-weight:600}
.tandem details[open] summary{margin-bottom:8px}
.tandem ul.notes{margin:16px 0 0;padding-left:18px;font-size:13px;color:var(--muted)}
.tandem svg{display:block;width:100%;height:auto}
.tandem svg text{font:11px system-ui,sans-serif;fill:var(--muted)}
.tandem svg .la{fill:var(--a);font-weight:650}
.tandem svg .lb{fill:var(--b);font-weight:650}
.tandem svg .ea,.tandem svg .eb,.tandem svg .limit,.tandem svg .lid{fill:none;stroke-width:2;stroke-linejoin:round}
.tandem svg .ea{stroke:var(--a)}
.tandem svg .eb{stroke:var(--b);stroke-width:5;stroke-opacity:.5}
.tandem svg .limit{stroke:var(--pass);stroke-width:1.2}
.tandem svg .lid{stroke:var(--fail);stroke-width:1.2;stroke-dasharray:5 4}
.tandem svg .limit-text{fill:var(--pass)}
.tandem svg .lid-text{fill:var(--fail)}
.tandem svg .area{fill:var(--ok)}
.tandem svg .grid{stroke:var(--line);stroke-width:1}
.tandem svg .pa{fill:var(--a)}
.tandem svg .pb{fill:var(--b)}
.tandem svg .ring{fill:none;stroke:var(--fail);stroke-width:2}
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
.tandem .heat{margin-top:20px}
.tandem .heat svg text{font-size:9.5px}
.tandem .legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:12px;color:var(--muted);margin-top:6px}
@media (max-width:760px){
  .tandem .split{grid-template-columns:1fr}
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
