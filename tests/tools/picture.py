"""A picture of two consoles, in one of which Ctrl+C is pressed: the same however fast all went."""

from collections import Counter
from pathlib import Path

SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 900 180" xml:space="preserve">
<title>A worker is stopped in the middle of a task, and another does it</title>
<style>
rect {{ fill: #161b22; stroke: #6e7681 }}
text {{ fill: #c9d1d9; white-space: pre }}
text {{ font: 15.2px Menlo, Consolas, "DejaVu Sans Mono", monospace }}
.title {{ fill: #8b949e }}
.task {{ fill: #f2cc60; font-weight: bold }}
.stopped {{ fill: #ff7b72; font-weight: bold }}
@media (prefers-reduced-motion: no-preference) {{ .line {{ animation: appear 1ms backwards }} }}
@keyframes appear {{ from {{ opacity: 0 }} }}
</style>
<rect x="0" width="444" height="178" rx="8"/>
<rect x="454" width="444" height="178" rx="8"/>
<text class="title" x="8" y="21">one worker</text>
<text class="title" x="462" y="21">another worker</text>
{lines}
</svg>
"""
LINE = '<text class="line" style="animation-delay: {delay}s" x="{x}" y="{y}">{text}</text>'


def draw(path, lines, left, task):
    """Write the picture of `lines`, (console, text) in their order; `left` is the left console.

    Until the task comes, the two stand side by side; from then on, each line is lower than those
    before it, and appears a second later.
    """
    rows = Counter()
    delay = 0
    drawn = []
    for console, text in lines:
        if delay or task in text:
            delay += 1
            rows[console] = max(rows.values())
        rows[console] += 1
        x = 8 if console == left else 462
        y = 24 * rows[console] + 23
        drawn.append(LINE.format(delay=delay, x=x, y=y, text=marked(text, task)))
    Path(path).write_text(SVG.format(lines="\n".join(drawn)))


def marked(text, task):
    """Return the text with the task and the Ctrl+C in their colours."""
    text = text.replace(task, f'<tspan class="task">{task}</tspan>')
    return text.replace("^C", '<tspan class="stopped">^C</tspan>')
