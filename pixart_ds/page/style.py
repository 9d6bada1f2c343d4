"""How pages look, in light, in dark and on paper, and the script that changes between light and dark."""

from __future__ import annotations

_DARK = """
  color-scheme: dark; --page: #0d0d0d; --card: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --faint: #92908a; --grid: #31312f;
  --track: #262624; --blue: #3987e5; --aqua: #199e70; --yellow: #c98500; --green: #2f9e2f; --violet: #9085e9; --red: #e66767;
  --grey: #77756e; --pale: #4b4a46; --rival: #65635d; --bad: #e05252; --orange: #d95926; --box: #3a2413;
"""
STYLE = (
    """
:root { color-scheme: light; --page: #f4f4f1; --card: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --faint: #777570; --grid: #e3e2dc;
  --track: #efeeea; --blue: #2a78d6; --aqua: #1baf7a; --yellow: #eda100; --green: #008300; --violet: #4a3aa7; --red: #e34948;
  --grey: #8f8d86; --pale: #c9c8c1; --rival: #b3b1a9; --bad: #d03b3b; --orange: #eb6834; --box: #fdeedd; }
@media screen and (prefers-color-scheme: dark) { :root:not([data-theme=light]) {"""
    + _DARK
    + """} }
@media screen { :root[data-theme=dark] {"""
    + _DARK
    + """} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
header p { margin: 2px 0; color: var(--soft); overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 18px 0 8px; overflow-wrap: anywhere; }
a { color: var(--blue); }
#theme { float: right; margin: 0 0 8px 12px; padding: 4px 12px; border: 1px solid var(--grid); border-radius: 14px; cursor: pointer;
  background: var(--card); color: var(--soft); font: inherit; font-size: 13px; }
section > :last-child { margin-bottom: 0; }
section { margin-top: 18px; padding: 18px; border: 1px solid var(--grid); border-radius: 10px; background: var(--card); }
#tiles { padding: 0; border: 0; background: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 10px; }
.tile { padding: 12px 14px; border: 1px solid var(--grid); border-radius: 10px; background: var(--card); }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.tile b { display: block; font-size: 25px; font-weight: 600; line-height: 1.25; overflow-wrap: anywhere; }
.tile .below { font-size: 12px; color: var(--faint); }
figure { margin: 0 0 18px; break-inside: avoid; min-width: 0; }
figcaption, summary { margin-bottom: 8px; font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
summary { cursor: pointer; }
details { margin: 0 0 18px; }
.note { font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(290px, 100%), 1fr)); gap: 4px 26px; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
ul { margin: 0; padding-left: 20px; overflow-wrap: anywhere; }
.legend, .keys { padding: 0; list-style: none; color: var(--soft); font-size: 13px; }
.legend { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr)); gap: 8px 20px; }
.legend b { color: var(--ink); }
.keys { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 12px; }
.key { display: inline-block; width: 11px; height: 11px; margin-right: 7px; border-radius: 3px; background: currentColor; }
.box { padding: 10px 14px 10px 32px; border: 1px solid var(--orange); border-radius: 8px; background: var(--box); }
.over { color: var(--bad); font-weight: 600; }
svg { display: block; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; paint-order: stroke; stroke: var(--card);
  stroke-width: 3px; stroke-linejoin: round; }
svg .name { font-size: 13px; font-weight: 600; fill: var(--ink); }
svg .tick { font-size: 11px; fill: var(--faint); }
.plot { width: 100%; }
.standing { padding-left: 44px; }
.grid { stroke: var(--grid); stroke-width: 1; }
.track { fill: var(--track); color: var(--track); }
.seam { stroke: var(--card); stroke-width: 1px; }
.mark { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 2; }
.stem { stroke: currentColor; stroke-width: 2; opacity: .55; }
.dot { stroke: var(--card); stroke-width: 1.5; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.line.raw { stroke-width: 1; }
rect, circle { fill: currentColor; }
.blue { color: var(--blue); }
.grey { color: var(--grey); }
.pale { color: var(--pale); }
.good { color: var(--green); }
.warning { color: var(--yellow); }
.bad { color: var(--bad); }
.forecast { color: color-mix(in srgb, var(--blue) 45%, var(--card)); }
.wide { overflow-x: auto; }
.wide :is(th, td):first-child { position: sticky; left: 0; background: var(--card); }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap;
  vertical-align: bottom; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.sum tr:last-child { font-weight: 600; }
th { white-space: normal; color: var(--soft); font-weight: 600; }
"""
    + ", ".join(f".left{count} :is(th, td):nth-child(-n+{count})" for count in range(1, 9))
    + """ { text-align: left; }
@media (max-width: 1000px) { .desk { display: none; } }
@media (max-width: 560px) { main { padding: 12px 10px 32px; } section { padding: 14px 12px; } h1 { font-size: 22px; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .tile b { font-size: 21px; } th { white-space: nowrap; } }
@media print { h2, h3, figcaption, summary { break-after: avoid; } tr, .columns { break-inside: avoid; }
  .columns { grid-template-columns: repeat(3, 1fr); gap: 4px 14px; }
  body { background: none; font-size: 11px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  #theme { display: none; } main { max-width: none; padding: 0; } section { border: 0; padding: 0; }
  .wide { overflow: visible; } table { font-size: 8px; } th, td { padding: 3px 6px 3px 0; white-space: normal; }
  .tiles { grid-template-columns: repeat(5, 1fr); } .tile b { font-size: 18px; } }
"""
)
"""CSS of every page."""
SCRIPT = """
(function () {
  var root = document.documentElement, button = document.getElementById("theme");
  var system = matchMedia("(prefers-color-scheme: dark)");
  function dark() { return root.dataset.theme ? root.dataset.theme === "dark" : system.matches; }
  function show() { button.textContent = dark() ? "Light" : "Dark"; }
  function set(theme) { root.dataset.theme = theme; show(); }
  function follow() { var asked = location.hash.slice(1); if (asked === "dark" || asked === "light") set(asked); }
  button.addEventListener("click", function () { set(dark() ? "light" : "dark"); });
  system.addEventListener("change", show);
  window.addEventListener("hashchange", follow);
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not([open])").forEach(function (each) { each.open = true; each.dataset.folded = "yes"; });
  });
  window.addEventListener("afterprint", function () {
    document.querySelectorAll("details[data-folded]").forEach(function (each) { each.open = false; delete each.dataset.folded; });
  });
  button.hidden = false;
  show();
  follow();
})();
"""
"""The only script of a page: the button for light and dark, `#dark` in the address, and folded tables opened for printing."""
