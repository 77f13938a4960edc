"""A comparison as files: HTML for people, Markdown for a CI page, JSON and CSV for dashboards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from parity import judge, models, store, vocabulary
from parity.judge import Conclusion, Evidence
from parity.recording import Recording
from parity.reports import html, markdown, tabular
from parity.summary import Summary, summarise

HTML, MARKDOWN, JSON, CSV = "report.html", "report.md", "report.json", "findings.csv"


def summary_of(
    evidence: Evidence,
    conclusion: Conclusion,
    *,
    title: str,
    reproduce: Sequence[str],
    token_text: Callable[[int], str | None],
) -> Summary:
    """What there is to show of a comparison; dated by the younger of its two recordings."""
    return summarise(
        title=title,
        created_at=max(evidence.reference.created_at, evidence.candidate.created_at),
        decision=conclusion.decision,
        verdicts=conclusion.verdicts,
        diagnosis=conclusion.diagnosis,
        reference=evidence.reference,
        candidate=evidence.candidate,
        scores=evidence.recordings.get("candidate-scores"),
        noise=evidence.noise,
        recovery=judge.recovery(evidence),
        reproduce=reproduce,
        token_text=token_text,
    )


def write(summary: Summary, directory: Path) -> Path:
    """Write every form into the directory, in the place of older ones; the path of the HTML page.

    Raises:
        RecordingError: If the disk is full.
    """
    with store.disk_errors_named(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in {
            HTML: html.render(summary),
            MARKDOWN: markdown.render(summary),
            JSON: tabular.to_json(summary),
            CSV: tabular.to_csv(summary),
        }.items():
            store.write_whole(directory / name, text)
    return directory / HTML


def token_texts(*recordings: Recording, cache: Path) -> Callable[[int], str | None]:
    """How token ids read in the first of these recordings' models whose files are at hand; unknown without any."""
    for recording in recordings:
        if (found := models.cached(recording.spec.model, cache=cache)) is not None:
            return vocabulary.token_texts(found)
    return lambda _: None
