"""How answers are scored: exact match, BLEU and ROUGE (by torchmetrics)."""

from __future__ import annotations

from collections.abc import Sequence

#: The score that a table shows for tasks of a metric.
MAIN = {"exact": "exact", "bleu": "bleu", "rouge": "rougeL"}
_ROUGE = ("rouge1", "rouge2", "rougeL")


def normalised(text: str) -> str:
    """As LoRAHub compares answers: without case, full stops and outer space."""
    return text.strip().lower().replace(".", "")


def is_exact(answer: str, right: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones."""
    return normalised(answer) in {normalised(one) for one in right}


def scores_of(answer: str, right: Sequence[str], metric: str) -> dict[str, float]:
    """The scores of one answer, from 0 to 1.

    Args:
        answer: what the model wrote.
        right: the answers that count as right; the first one is the usual.
        metric: "exact"; "bleu": BLEU-4 of sacreBLEU's 13a tokens, 0 where no four words in a row agree; or
            "rouge": F-scores of ROUGE-1, 2 and L.

    Returns:
        "exact", those of the metric, and the task's main one as "score".
    """
    found = {"exact": float(is_exact(answer, right))}
    if metric == "bleu":
        from torchmetrics.functional.text import sacre_bleu_score

        found["bleu"] = float(sacre_bleu_score([answer], [list(right)], tokenize="13a"))
    elif metric == "rouge":
        from torchmetrics.functional.text import rouge_score

        given = rouge_score([answer], [list(right)], rouge_keys=_ROUGE)
        found |= {name: float(given[f"{name}_fmeasure"]) for name in _ROUGE}
    return {**found, "score": found[MAIN[metric]]}
