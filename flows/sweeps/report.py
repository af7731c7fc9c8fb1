"""`report.html` of a sweep: one self-contained file with what was searched, the best settings, trials and plots."""

from collections.abc import Sequence
from pathlib import Path

from conf.sweep import SweepRequest, show_number
from flows.runs.records import to_overrides
from flows.sweeps.outcome import (
    SeedRow,
    SweepOutcome,
    TrialResult,
    describe_shared,
    estimate_metrics,
    make_dashboard_command,
)
from flows.sweeps.plots import Plot
from tasks.redaction import clean_text, redact, shorten
from tasks.stage.files import write_atomic

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Sweep {{ outcome.study }}</title>
<style>
:root { --paper:#fbf9f5; --card:#fff; --ink:#2b2638; --soft:#746d84; --line:#e6e0d8 }
@media (prefers-color-scheme: dark) { :root { --paper:#191720; --card:#232029; --ink:#efecf5; --soft:#a59db5;
--line:#383341 } }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.5 ui-sans-serif,system-ui,sans-serif }
main { max-width:1080px; margin:0 auto; padding:40px 20px 80px } h1 { margin:0 0 6px } h2 { margin:44px 0 6px }
.soft { color:var(--soft) } .scroll { overflow-x:auto } .bad { color:#c0492f }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td { text-align:left; padding:6px 10px; border-bottom:1px solid var(--line); vertical-align:top }
th { color:var(--soft); font-size:.82rem } tr.best td { font-weight:700 }
pre { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px; white-space:pre-wrap;
overflow-wrap:anywhere } figure { margin:14px 0; background:#fff; border-radius:10px; overflow-x:auto }
svg { max-width:100%; height:auto }
</style>
</head>
<body><main>
<h1>Sweep {{ outcome.study }}</h1>
<p class="soft">{{ outcome.trials|length }} trials of {{ outcome.objectives|join(' and ') }}; ended by:
{{ outcome.ended_by or 'an error' }}.</p>
{% if space %}<h2>What was searched</h2>
<div class="scroll"><table>
<tr><th>setting</th><th>values</th></tr>
{% for name, values in space %}<tr><td><code>{{ name }}</code></td><td>{{ values }}</td></tr>
{% endfor %}</table></div>
{% endif %}
<p>{% for name, value in options %}{{ name }} <b>{{ value }}</b>{{ ', ' if not loop.last }}{% endfor %}. Every trial
shares:</p>
<pre>{{ base }}</pre>
<h2>{{ 'Seeds' if not space else 'Pareto front' if outcome.objectives|length > 1 else 'Best settings' }}</h2>
{% for trial in outcome.best %}<p>Trial {{ trial.trial }}: {{ describe(trial) }}</p>
{% if space %}<pre>{{ outcome.commands[loop.index0] }}</pre>
{% endif %}{% if trial.seeds|length > 1 %}<div class="scroll"><table>
<tr><th>metric</th><th>mean</th><th>95 % interval over seeds</th>
{% for seed in trial.seeds %}<th>seed {{ seed }}</th>{% endfor %}</tr>
{% for row in estimate_metrics(trial) %}<tr><td>{{ row.name }}</td><td>{{ '%.4f'|format(row.mean) }}</td>
<td>{{ show_interval(row) }}</td>{% for value in row['values'] %}<td>{{ '%.4f'|format(value) }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endif %}{% else %}<p class="bad">No trial is complete.</p>
{% endfor %}
{% if plots %}<h2>Plots</h2>
{% endif %}{% for plot in plots %}<h3>{{ plot.title }}</h3>
{% if plot.svg %}<figure>{{ plot.svg|safe }}</figure>{% else %}<p class="soft">{{ plot.reason }}</p>{% endif %}
{% endfor %}
<h2>Trials</h2>
<div class="scroll"><table>
<tr><th>trial</th><th>status</th><th>{{ outcome.objectives|join('; ') }}</th>{% for name, _ in space %}<th>{{ name }}
</th>{% endfor %}<th>cached stages</th><th>USD</th><th>runs</th></tr>
{% for trial in outcome.trials %}<tr{% if trial.trial in best %} class="best"{% endif %}><td>{{ trial.trial }}</td>
<td>{{ trial.status }}{% if trial.error %}<br><span class="bad">{{ trial.error }}</span>{% endif %}</td>
<td>{{ describe(trial) }}</td>{% for name, _ in space %}<td>{{ trial.settings.get(name, '') }}</td>{% endfor %}
<td>{{ count_cached(trial) }}</td><td>{{ 'unknown' if trial.cost_usd is none else '%.5f'|format(trial.cost_usd) }}</td>
<td>{% for run in trial.run_ids %}<a href="../../{{ run }}/report.html">{{ run }}</a> {% endfor %}</td></tr>
{% endfor %}</table></div>
<p>{{ outcome.num_new_trials }} new trials; {{ shared }}.</p>
<h2>The study</h2>
<p>In the folder <code>sweeps</code> of the output folder:</p>
<pre>{{ dashboard }}</pre>
</main></body></html>
"""
NUM_STAGES = 6


def write_report(outcome: SweepOutcome, request: SweepRequest, plots: Sequence[Plot]) -> None:
    """Write the report. Values are escaped and redacted: they come from requests and servers."""
    from jinja2 import Environment

    template = Environment(autoescape=True, finalize=show).from_string(TEMPLATE)
    html = template.render(
        outcome=outcome,
        space=describe_space(request),
        options=describe_options(request),
        base=" ".join(["likeness run", *to_overrides(request.base)]),
        best=[trial.trial for trial in outcome.best],
        shared=describe_shared(outcome),
        dashboard=make_dashboard_command(Path(outcome.journal).name),
        plots=plots,
        describe=describe_values,
        count_cached=count_cached,
        estimate_metrics=estimate_metrics,
        show_interval=show_interval,
    )
    path = Path(outcome.report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, html.encode())


def show(value: object) -> object:
    """Return a value without secrets and control characters; markup stays as it is."""
    from markupsafe import Markup

    return clean_text(redact(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def describe_space(request: SweepRequest) -> list[tuple[str, str]]:
    """Return what was searched, by setting."""
    rows = [(name, shorten(", ".join(map(str, values)))) for name, values in request.space.items()]
    return rows + [(name, str(searched)) for name, searched in request.ranges.items()]


def describe_options(request: SweepRequest) -> list[tuple[str, str]]:
    """Return how it was searched."""
    if not request.is_search:
        return [("seeds", str(request.num_seeds))]
    sampler = ("grid" if request.is_grid else "tpe") if request.sampler == "auto" else request.sampler
    rows = [("sampler", sampler), ("trials", str(request.max_trials)), ("seeds", str(request.num_seeds))]
    rows += [("hours", show_number(request.max_hours))] * (request.max_hours is not None)
    rows += [("USD", show_number(request.max_usd))] * (request.max_usd is not None)
    return rows + [("pruner", request.pruner)] * (request.pruner != "none")


def describe_values(trial: TrialResult) -> str:
    """Return a trial's values with their intervals."""
    parts = []
    for index, value in enumerate(trial.values):
        interval = f" [{trial.intervals[index][0]:.4f}, {trial.intervals[index][1]:.4f}]" if trial.intervals else ""
        parts.append(f"{value:.4f}{interval}")
    return "; ".join(parts)


def show_interval(row: SeedRow) -> str:
    """Return the interval of a mean over seeds."""
    return "none: all values are equal" if row.interval is None else f"[{row.interval[0]:.4f}, {row.interval[1]:.4f}]"


def count_cached(trial: TrialResult) -> str:
    """Return how many of the stages of a trial's runs were cached."""
    num_runs = len(trial.run_ids)
    return f"{sum(trial.cached_stages.values())} of {NUM_STAGES * num_runs}" if num_runs else ""
