"""How both pages look, light, dark, on paper and on a phone; and templates that escape what they are given.

A page is one file without scripts. Its own policy forbids it to load or run anything, so that text from a checkpoint
cannot, whatever it holds.
"""

from __future__ import annotations

from jinja2 import Environment, StrictUndefined, Template, select_autoescape

LIGHT = """--ink: #1c2430; --soft: #566171; --line: #dde2e8; --paper: #ffffff; --panel: #f5f7f9; --good: #0a6e33;
 --bad: #b3142a; --c0: #1f6fb4; --c1: #b8500c; --c2: #1a7f4b; --c3: #a3327f; --c4: #6a5acd; --c5: #7a6a00;"""
DARK = """--ink: #e4e8ee; --soft: #a3aebc; --line: #3a4350; --paper: #14181e; --panel: #1d232b; --good: #55cf87;
 --bad: #ff7d8b; --c0: #6cb4f0; --c1: #f2a065; --c2: #63d297; --c3: #ee8fce; --c4: #b3a7ff; --c5: #d8c64a;"""

STYLE = f"""
 :root {{ color-scheme: light dark; {LIGHT} }}
 @media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
"""
STYLE += """ body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
 color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
 h1 { margin: 0; font-size: 1.7rem; line-height: 1.2 } h2 { margin: 2.5rem 0 .5rem; font-size: 1.3rem }
 h3 { margin: 1.8rem 0 .3rem; font-size: 1.05rem } p { margin: .5rem 0 }
 .sub, .reason { color: var(--soft); font-size: .875rem } code { font-size: .875em }
 .verdict { font-size: 1.15rem; border-left: .3rem solid; padding: .6rem 1rem; background: var(--panel);
 margin: 1rem 0 } .verdict span { color: var(--ink) }
 .PASS { color: var(--good) } .FAIL { color: var(--bad) } .OPEN, .RECORDED { color: var(--soft) }
 td .PASS, td .FAIL, h3 .PASS, h3 .FAIL { font-weight: 600 }
 .wide { overflow-x: auto; margin: .5rem 0 } table { border-collapse: collapse; width: 100% }
 caption { text-align: left; font-weight: 600; padding: .6rem .6rem .2rem 0 }
 td, th { padding: .4rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
 th:first-child { padding-left: 0 } tbody th { font-weight: 400 } thead th { font-size: .875rem }
 .facts th { font-weight: 600; width: 9rem } .n { text-align: right; font-variant-numeric: tabular-nums }
 td.n, td.g { white-space: nowrap } .compared td.n { white-space: normal }
 .compared { table-layout: fixed; min-width: 34rem }
 .bar { display: block; height: .7rem; min-width: 1px; background: var(--c0) }
 figure { margin: 1.5rem 0 } figcaption { color: var(--soft); font-size: .875rem }
 .plot { overflow-x: auto } svg { display: block; width: 100%; min-width: 38rem; height: auto }
 svg text { font-family: system-ui, sans-serif !important }
 blockquote { margin: .3rem 0 .8rem; padding: .5rem 1rem; background: var(--panel); white-space: pre-wrap }
 @media (max-width: 40rem) { td, th { padding: .35rem .4rem } .facts th { width: 6rem } }
 @media print { body { max-width: none; margin: 0; font-size: 11px } svg { min-width: 0 } .wide, .plot {
 overflow: visible } tr, figure, blockquote { break-inside: avoid } h2, h3, caption { break-after: avoid }
 .bar { print-color-adjust: exact } }
"""

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{{ style | safe }}</style></head><body>
"""
PLOT = """{% macro plot(drawing, level) %}<figure><h{{ level }}>{{ drawing.title }}</h{{ level }}>
<div class="plot" tabindex="0">{{ drawing.svg | safe }}</div>
<figcaption>{{ drawing.caption }}</figcaption></figure>
{% endmacro %}"""
"""For a plot of `export.report.plots`: the heading, the drawing, what it shows in words."""


def template(body: str) -> Template:
    """A page with the macro `plot`, that escapes what it is given and refuses unknown names; it needs a `title`."""
    environment = Environment(undefined=StrictUndefined, autoescape=select_autoescape(default=True))
    return environment.from_string(f"{PLOT}{HEAD}{body}</body></html>\n", globals={"style": STYLE})
