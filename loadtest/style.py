"""How the page of a load test looks: readable on a desk and on a phone, in a light and in a dark scheme."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5a6370; --rule: #dde1e6; --paper: #fff;
  --card: #f6f7f9; --full: #4b5a75; --pruned: #c2531f; --kv: #b9c2d0; --rest: #8693a8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a7b0bd; --rule: #343a43;
  --paper: #15181c; --card: #1e2228; --full: #9db1d6; --pruned: #f08a55; --kv: #4a5362; --rest: #6d7a90;
  --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; overflow-wrap: break-word; }
h1 { font-size: 22px; margin: 0 0 10px; } h2 { font-size: 17px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 14px 0 4px; }
.verdict { font-size: 17px; background: var(--card); border-left: 4px solid var(--pruned);
  padding: 14px 18px; border-radius: 4px; }
.incomplete { border-color: var(--bad); } pre.incomplete { border-left: 4px solid var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0; }
.tiles div { background: var(--card); border-radius: 6px; padding: 12px 14px; }
.tiles dd { font-size: 21px; font-weight: 650; line-height: 1.25; margin: 0; }
.tiles dd small { font-weight: 400; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap;
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; }
small { display: block; font-size: 12px; color: var(--soft); }
th:first-child, td:first-child, .names td:nth-child(2), .names th:nth-child(2) { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
tr.strong td { font-weight: 600; background: var(--card); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(430px, 100%), 1fr)); gap: 18px;
  margin-top: 14px; }
figure { margin: 0; background: var(--card); border-radius: 6px; padding: 12px; min-width: 0; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: var(--soft); } .middle { text-anchor: middle; }
.end { text-anchor: end; } svg .name, svg .value { fill: var(--ink); font-weight: 600; }
.grid { stroke: var(--rule); } .line { fill: none; stroke-width: 2; } .whisker { stroke-width: 1.5; }
.full { stroke: var(--full); } .pruned { stroke: var(--pruned); } polyline.dashed { stroke-dasharray: 5 4; }
circle.full { fill: var(--full); } circle.pruned { fill: var(--pruned); }
.part { stroke: none; } .part.weights { fill: var(--pruned); } .part.kv { fill: var(--kv); }
.part.rest { fill: var(--rest); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 4px; font-size: 13px;
  color: var(--soft); }
.legend i { display: inline-block; width: 22px; margin-right: 6px; vertical-align: middle;
  border-top: 2px solid; }
.legend i.dashed { border-top-style: dashed; }
.legend i.full { border-color: var(--full); } .legend i.pruned { border-color: var(--pruned); }
.legend i.part { width: 14px; border: 0; height: 12px; } .legend i.weights { background: var(--pruned); }
.legend i.kv { background: var(--kv); } .legend i.rest { background: var(--rest); }
dt { color: var(--soft); } dd { margin: 0 0 6px; }
p.note { color: var(--soft); font-size: 13px; }
pre { background: var(--card); padding: 12px; overflow-x: auto; font-size: 12px; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 600px) { body { padding: 16px 12px 40px; } figure { padding: 10px 6px; }
  th, td { padding: 5px 7px; } th:first-child, td:first-child { white-space: normal; min-width: 96px; }
  .verdict { font-size: 15px; padding: 10px 12px; } }
"""
