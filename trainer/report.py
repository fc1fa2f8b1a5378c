"""`report.html`: one self-contained page that says what a run measured."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

from pacenote.trainer import config as configs
from pacenote.trainer import findings, groups, metrics, plots
from pacenote.trainer.config import RunConfig
from pacenote.trainer.rundir import RunDir

STYLE = (Path(__file__).resolve().parent / "assets" / "report.css").read_text(encoding="utf-8")


def write_report(root: Path) -> Path:
    """Write `root/report.html` from the run folder's config, metrics and samples; returns its path.

    Raises:
        ValueError: `root` is not a run folder.
    """
    run, config = RunDir.open(root)
    rows = metrics.read(run.metrics)
    page = _page(run, config, rows)
    part = run.report.with_suffix(".part")
    part.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    os.replace(part, run.report)
    return run.report


def summary(root: Path) -> list[findings.Finding]:
    """What the run measured, in sentences.

    Raises:
        ValueError: `root` is not a run folder.
    """
    run, config = RunDir.open(root)
    return findings.findings(metrics.read(run.metrics), config.replay, exact=config.exact)


def _page(run: RunDir, config: RunConfig, rows: list[dict[str, Any]]) -> str:
    title = f"{config.recipe} · replay {config.replay}{' · exact' if config.exact else ''}"
    body = [
        f"<h1>pacenote: {html.escape(title)}</h1>",
        f'<p class="sub">{html.escape(_subtitle(run, config, rows))}</p>',
        _tiles(rows),
        "<h2>What was measured</h2>",
        _findings(rows, config),
    ]
    if rows:
        body += ["<h2>Over the run</h2>", _plots(run, rows), _groups(rows)]
    body += [_samples(run), "<h2>Configuration</h2>", f"<pre>{html.escape(configs.dump(config))}</pre>"]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _subtitle(run: RunDir, config: RunConfig, rows: list[dict[str, Any]]) -> str:
    facts = [run.root.name, f"{len(rows)} of {config.steps} steps", f"seed {config.seed}"]
    env = run.environment()
    facts += [f"{name} {value}" for name, value in env.items()]
    return " · ".join(facts)


def _tiles(rows: list[dict[str, Any]]) -> str:
    first, last, _ = findings.ends(rows, "reward")
    both = findings.compared(rows) or rows
    trained, native = findings.mean(both, "abs_delta_logp"), findings.mean(both, "abs_delta_logp_native")
    tiles = [
        (f"{first:.2f} → {last:.2f}", "reward, first and last steps"),
        (f"{trained:.4f}", "mean |Δlogp| as trained"),
        (f"{native:.4f}", "mean |Δlogp|, own routing"),
        (f"{findings.mean(rows, 'flipped'):.2%}", "token-layers routed differently"),
        (f"{findings.total(rows, 'rows_missing')} / {findings.total(rows, 'rows_invalid')}", "rows missing / invalid"),
        (f"{findings.mean(rows, 'tokens_per_second'):,.0f}", "tokens a second"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in tiles)
        + "</div>"
    )


def _findings(rows: list[dict[str, Any]], config: RunConfig) -> str:
    found = findings.findings(rows, config.replay, exact=config.exact)
    return (
        '<ul class="findings">' + "".join(f'<li class="{f.kind}">{html.escape(f.text)}</li>' for f in found) + "</ul>"
    )


def _plots(run: RunDir, rows: list[dict[str, Any]]) -> str:
    width = max((len(row.get("flipped_by_layer") or ()) for row in rows), default=0)
    layers = run.moe_layers() or list(range(width))
    drawn = [plots.reward(rows), plots.delta_logp(rows), plots.k3(rows), plots.flips(rows, layers[:width]),
             plots.by_group(rows, "turn", "abs_delta_logp", "Mismatch as trained, by turn: mean |Δlogp|"),
             plots.by_group(rows, "role", "flipped_tokens", "Tokens with any layer routed differently"),
             plots.lengths(rows), plots.seconds(rows)]  # fmt: skip
    return '<div class="plots">' + "".join(f"<figure>{svg}</figure>" for svg in drawn) + "</div>"


def _groups(rows: list[dict[str, Any]]) -> str:
    """The run's mismatch by groups of tokens, as a table."""
    found = groups.over_run(rows)
    if not found:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("tokens by", "", *groups.COLUMNS))
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in (g.kind, g.name, *g.cells())) for g in found)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<h2>Where the gap is</h2><table class="groups"><tr>{head}</tr>{body}</table>'


def _samples(run: RunDir) -> str:
    files = sorted(run.samples.glob("*.txt"))
    if not files:
        return ""
    shown = [files[0]] if len(files) == 1 else [files[0], files[-1]]
    texts = (f"<pre>{html.escape(file.read_text(encoding='utf-8'))}</pre>" for file in shown)
    return f'<h2>Samples: first and last written</h2><div class="samples">{"".join(texts)}</div>'
