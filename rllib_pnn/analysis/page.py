"""The report's HTML, a Jinja2 template. report.py renders it with autoescape; it fetches nothing from anywhere."""

PAGE = """\
{% macro picture(figure) %}
<figure><img alt="{{ figure.alt }}" width="{{ figure.width }}" src="{{ figure.source }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endmacro %}
{% macro listed(notes) %}
{% if notes %}
<ul class="quiet">
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light; }
  body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #222; background: #fff;
         max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
  nav { margin-bottom: 1rem; }
  h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
  h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 2px solid #222; }
  h3 { font-size: 1.02rem; margin: 1.8rem 0 .4rem; }
  p { max-width: 52rem; }
  nav a { margin-right: 1.1rem; }
  a { color: #00599c; }
  .quiet { color: #666; font-size: .88rem; }
  .wide { overflow-x: auto; }
  figure { margin: .8rem 0 1.4rem; }
  figure img { max-width: 100%; height: auto; }
  figcaption { color: #666; font-size: .88rem; max-width: 52rem; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
  th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
  th { font-weight: 600; border-bottom: 2px solid #888; white-space: nowrap; }
  th:first-child, td:first-child, .text { text-align: left; }
  td .interval { display: block; color: #666; font-size: .82rem; white-space: nowrap; }
  td.path { overflow-wrap: anywhere; min-width: 19rem; }
  .paper { background: #f6f6f6; }
  .warning { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .5rem .9rem; }
  .warning li { word-break: break-word; }
  details { margin: .6rem 0; }
  summary { cursor: pointer; }
  @media print { body { max-width: none; } h2 { break-before: auto; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="quiet">{{ num_runs }} run{{ '' if num_runs == 1 else 's' }}, {{ num_curves }} learning
curve{{ '' if num_curves == 1 else 's' }}. Written {{ written }} with rllib_pnn {{ version }}.</p>
<nav>
{%- for suite in suites %}<a href="#{{ suite.anchor }}">{{ suite.name }}</a>{% endfor -%}
{%- if chains %}<a href="#chains">Task by task</a>{% endif -%}
{%- if analyses %}<a href="#sensitivity">Sensitivity</a>{% endif -%}
<a href="#runs">Runs</a></nav>

{% if problems %}
<div class="warning"><b>Not read:</b><ul>
{% for problem in problems %}<li>{{ problem }}</li>{% endfor %}
</ul></div>
{% endif %}

{% for suite in suites %}
<h2 id="{{ suite.anchor }}">{{ suite.name }}: transfer</h2>
{% if suite.rows %}
<p>A transfer score is the area under a learning curve <b>above the floor</b>, in percent of the area of
<i>scratch</i>, one column trained from nothing. The floor is
{% for floor in suite.floors %}
{{ floor.value }}, {{ floor.why }}, for {{ floor.targets }}{{ '; ' if not loop.last else '.' }}
{% endfor %}
{% if suite.top %}
Scores are those of the best {{ suite.top }} seeds of each cell, of scratch's too; the IQM and the seeds in the table of
all cells are every seed, measured by all seeds of scratch.
{% else %}
Every seed counts.
{% endif %}
Brackets: {{ suite.confidence }} bootstrap intervals over seeds, drawn within each cell.
{% if suite.single %}
Without brackets: one seed, or all seeds alike.
{% endif %}
</p>
<div class="wide"><table>
<tr><th>method</th><th>mean %</th><th>median %</th><th>IQM %</th><th>cells</th><th>runs</th>
{% if suite.has_paper %}
<th class="paper">paper, mean %</th><th class="paper">paper, median %</th>
{% endif %}
</tr>
{% for row in suite.rows %}
<tr><td>{{ row.label }}</td>
{% for cell in row.statistics %}<td>{{ cell.value }}<span class="interval">{{ cell.interval }}</span></td>{% endfor %}
<td>{{ row.cells }}</td><td>{{ row.runs }}</td>
{% if suite.has_paper %}
<td class="paper">{{ row.paper_mean }}</td><td class="paper">{{ row.paper_median }}</td>
{% endif %}
</tr>
{% endfor %}
</table></div>
<p class="quiet">Mean and median are over source and target pairs, as in the paper ({{ paper }}); IQM, the mean of the
middle half, is over all runs.
{% if suite.has_paper %}
The paper's figures come from the best 3 of 25 jobs with random hyper-parameters.
{% endif %}
</p>
{% endif %}
{% for figure in suite.figures %}
{{ picture(figure) }}
{% endfor %}
{% if suite.rows %}
<details><summary>All cells with all seeds</summary><div class="wide"><table>
<tr><th>method</th><th class="text">source</th><th class="text">target</th><th>score %</th><th>mean return</th>
<th class="text">every seed's score %</th></tr>
{% for cell in suite.cells %}
<tr><td>{{ cell.method }}</td><td class="text">{{ cell.source }}</td>
<td class="text">{{ cell.target }}</td>
<td>{{ cell.score.value }}<span class="interval">{{ cell.score.interval }}</span></td><td>{{ cell.mean_return }}</td>
<td class="text">{{ cell.seeds }}</td></tr>
{% endfor %}
</table></div></details>
{% endif %}
{% if suite.notes %}
<div class="warning"><ul>{% for note in suite.notes %}<li>{{ note }}</li>{% endfor %}</ul></div>
{% endif %}
{% endfor %}

{% if chains %}
<h2 id="chains">Task by task</h2>
<p>Forgetting is the return per episode when a column was frozen, less the return when the same column was played
again after the last task; a frozen column's is 0. Forward transfer is (area &minus; area of scratch) / (1 &minus; area
of scratch), with returns scaled to 0 at the game's floor and 1 at its ceiling (Wolczyk et al. 2021): 0 is none, 1 the
most possible.</p>
{% for chain in chains %}
<h3>{{ chain.name }}</h3>
{{ picture(chain.figure) }}
<div class="wide"><table>
<tr><th>task</th><th>steps</th><th>last return</th><th>when frozen</th><th>at the end</th><th>forgetting</th>
<th>forward transfer</th></tr>
{% for row in chain.rows %}
<tr><td>{{ row.task }}</td><td>{{ row.steps }}</td><td>{{ row.last }}</td><td>{{ row.frozen }}</td>
<td>{{ row.later }}</td><td>{{ row.forgetting }}</td><td>{{ row.forward }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
{% endif %}

{% if analyses %}
<h2 id="sensitivity">Where the knowledge sits</h2>
<p>Each row of boxes is a layer; its shares sum to 1 over the columns. A dark box in an earlier column means that the
policy relies on features learned there. AFS is the Fisher information of the policy about a layer's normalised
activations, APS the noise precision at which the score has lost half of what is above the floor (Rusu et al. 2016,
section 3).</p>
{% for analysis in analyses %}
<h3>{{ analysis.name }}</h3>
{% for figure in analysis.figures %}
{{ picture(figure) }}
{% endfor %}
{{ listed(analysis.notes) }}
{% endfor %}
{% endif %}

<h2 id="runs">Runs</h2>
<details{{ ' open' if num_runs <= 20 }}>
<summary>{{ num_curves }} learning curve{{ '' if num_curves == 1 else 's' }}</summary>
<div class="wide"><table>
<tr><th>run</th><th class="text">task</th><th class="text">method</th><th class="text">source</th>
<th class="text">algorithm</th><th>seed</th>{% if searched %}<th class="text">drawn</th>{% endif %}
<th>steps</th><th>last return</th><th class="text">state</th></tr>
{% for row in run_rows %}
<tr><td class="path">{{ row.run }}</td><td class="text">{{ row.task }}</td><td class="text">{{ row.method }}</td>
<td class="text">{{ row.source }}</td><td class="text">{{ row.algorithm }}</td><td>{{ row.seed }}</td>
{% if searched %}<td class="text">{{ row.searched }}</td>{% endif %}
<td>{{ row.steps }}</td><td>{{ row.last }}</td><td class="text">{{ row.state }}</td></tr>
{% endfor %}
</table></div></details>
{% if smoothed %}
<p class="quiet">{{ smoothed }} of these curves come from runs that logged a running average only (RLlib's window over
the last episodes) instead of each iteration's own; they lag behind by up to that window.</p>
{% endif %}
{{ listed(notes) }}
<p class="quiet">Formulas and what is read from which file: docs/analysis.md.</p>
</body>
</html>
"""
