"""How the page looks: nothing is loaded from elsewhere, columns stack on a phone."""

from __future__ import annotations

from html import escape

from shellv_core.serving.page.asking import Answer
from shellv_core.serving.page.offline import gr
from shellv_core.serving.page.transcripts import Transcript

SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Menlo", "Consolas", "monospace"]
CSS = """
.gradio-container {width: 100% !important; max-width: 1480px !important; margin: 0 auto !important;}
#title {padding: 4px 2px 0;}
#title h1 {margin: 0; font-size: 1.35rem; letter-spacing: -0.01em;}
.note, .note p {color: var(--body-text-color-subdued); font-size: 0.85rem; margin: 0;}
.figures {min-height: 1.5rem; font-size: 0.82rem; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums;}
.figures .row {display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: center;}
.figures b {font-weight: 600; color: var(--body-text-color);}
.figures .failed {color: var(--error-text-color); font-weight: 500;}
.figures meter {width: 56px; height: 10px; vertical-align: middle;}
.shared {border-left: 3px solid var(--color-accent); padding: 2px 12px;}
.shared p {white-space: pre-wrap; margin: 2px 0 10px;}
button.verdict {min-width: 96px !important;}
@media (max-width: 640px) {
  .gradio-container {padding: 6px !important;}
  .talk {height: 280px !important;}
  .actions button {flex: 1 1 30% !important; min-width: 84px !important;}
}
"""


def theme() -> gr.Theme:
    """Gradio's soft theme in this project's colors."""
    return gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=SYSTEM_FONTS, font_mono=MONO_FONTS
    )


def figures(answer: Answer, context_length: int = 0) -> str:
    """HTML of what is known of an answer: time to the first token, pace, tokens, and how full the context is."""
    parts = []
    if answer.first_seconds:
        parts.append(f"TTFT <b>{answer.first_seconds:.2f} s</b>")
    if answer.tokens:
        parts += [f"<b>{answer.rate:.0f}</b> tok/s"] if answer.rate else []
        parts.append(f"<b>{answer.tokens}</b> tok")
        used = answer.tokens + answer.prompt_tokens
        if context_length:
            bar = f"<meter min=0 max={context_length} value={used} aria-label=context></meter>"
            parts.append(f"{bar} {used} / {context_length}")
    if answer.note:
        kind = "failed" if answer.failed else "waiting"
        parts.append(f"<span class={kind} role=status>{escape(answer.note)}</span>")
    return f"<div class=row>{''.join(f'<span>{part}</span>' for part in parts)}</div>"


def shared(transcript: Transcript) -> str:
    """HTML of a conversation that someone has shared."""
    talks = []
    for talk in transcript.talks:
        turns = "".join(f"<b>{escape(turn['role'])}</b><p>{escape(turn['content'])}</p>" for turn in talk.turns)
        talks.append(f"<h4>{escape(talk.model)}</h4>{turns}")
    return f"<div class=shared>{''.join(talks)}</div>"
