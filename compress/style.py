"""How the page of a compression looks: readable on a desk and on a phone, in a light and in a dark scheme."""

COLOURS = 6
"""Later series take the same colours, dashed."""

STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--soft:#59636d;--line:#d8dde3;--back:#fff;--card:#f6f8fa;
--muted:#aab3bd;
--s0:#2563a8;--s1:#c2571a;--s2:#2f7d4f;--s3:#8a4fa3;--s4:#a83248;--s5:#6b6f1d}
@media(prefers-color-scheme:dark){:root{--text:#e6e9ec;--soft:#a3adb7;--line:#363d45;--back:#15181c;
--card:#1d2126;
--muted:#5b646e;--s0:#6aa7e8;--s1:#ef9a5f;--s2:#6fc191;--s3:#c394da;--s4:#e88093;--s5:#c5c96a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:72rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1{font-size:1.6rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2.5rem 0 .75rem}
h3{font-size:.95rem;margin:0 0 .5rem}p{margin:.4rem 0}.lead{font-size:1.1rem}
.note{color:var(--soft);font-size:.9rem}
.tiles{display:grid;gap:.75rem;margin:1rem 0 0;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr))}
.tiles div{padding:.75rem 1rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem}
.tiles dt{color:var(--soft);font-size:.9rem}.tiles dd{font-size:1.35rem;font-weight:650;margin:0}
.tiles small{font-weight:400}
.grid2{display:grid;gap:1.25rem;margin-top:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(27rem,100%),1fr))}
figure{margin:0;padding:1rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem;
min-width:0}
.scroll{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:15px;line-height:22px;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;
vertical-align:top}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--back)}
th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal}
small{display:block;font-size:12px;line-height:18px;color:var(--soft)}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--text);font:13px system-ui,sans-serif;text-anchor:middle}
svg .tick,svg .label{fill:var(--soft)}svg .end{text-anchor:end}svg .start{text-anchor:start}
svg .value{font-weight:600}
.grid{stroke:var(--line);fill:none}.interval{stroke:var(--text);stroke-width:1.5;fill:none}
.cell{fill:var(--s0)}.cross{stroke:var(--s4);stroke-width:1;fill:none;opacity:.7}
.bar{fill:var(--s0)}.muted{fill:var(--muted)}.line{fill:none;stroke-width:2}
polyline.dashed{stroke-dasharray:6 4}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;font-size:.85rem;color:var(--soft)}
.legend i{display:inline-block;width:1.4rem;margin-right:.4rem;vertical-align:middle;border-top:3px solid}
.legend i.dashed{border-top-style:dashed}
@media(max-width:600px){body{padding:1rem .75rem 2.5rem}figure{padding:.6rem .4rem}h1{font-size:1.35rem}
.lead{font-size:1rem}td:first-child,th:first-child{white-space:normal;min-width:7.5rem}}
""" + "".join(
    f"polyline.s{n}{{stroke:var(--s{n})}}circle.s{n}{{fill:var(--s{n})}}i.s{n}{{border-color:var(--s{n})}}"
    for n in range(COLOURS)
)
