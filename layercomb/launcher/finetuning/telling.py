"""What is told before and after a fine-tuning: what trains, and what the model says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from layercomb import trees
from layercomb.errors import UsageError, usage_errors
from layercomb.launcher import runs
from layercomb.launcher.experiment import Experiment
from layercomb.launcher.finetuning.plan import ABOUT, CHAT, HELD_OUT, INSTRUCTIONS, TEXT, Plan
from layercomb.launcher.pretrained import FOLDER, Pretrained
from layercomb.model import Model

_SAID = 'said.json'
_ANSWER = 64  # tokens
_BEGINNING = 32  # tokens of a text that are continued


@dataclasses.dataclass(frozen=True)
class Question:
    """What the model is asked before and after.

    Attributes:
      ids: tokens to continue.
      shown: the question, as a person reads it.
      wanted: what the data answers.
    """

    ids: list[int]
    shown: str
    wanted: str


def lengths(plan: Plan, documents: Any) -> str:
    """The report of lengths, see `data.length_report`; of preferences, how many there are.

    Raises:
      UsageError: if a row is wrong, or nothing can be learnt.
    """
    if plan.kind not in (CHAT, INSTRUCTIONS, TEXT, ABOUT):
        return f'{len(documents):,} pairs of answers'
    from layercomb import data

    with usage_errors():
        report = data.length_report(documents, plan.length, rehearsal_share=plan.rehearse)
        if not report.n_learnt:
            raise UsageError(
                f'nothing in the data is learnt, in rows of {plan.length} tokens: give a greater '
                '--length, or other data'
            )
    if not plan.rehearse:
        return str(report)
    return (
        f'{report}\nthe rest of each row, {plan.rehearse:.0%} where documents leave so much, is '
        "text of Python's manual, so that less is forgotten (--rehearse 0 leaves it out)"
    )


def what_trains(experiment: Experiment, model: Pretrained) -> str:
    """A line: how many of how many weights train, and their bytes.

    Narrow weights count as the wide ones that they stand for.
    """
    weights, _ = experiment.abstract(model.signature)
    trainable, _ = experiment.train_task.partition(weights)
    n, of = trees.count(trainable), model.wide_count(weights)
    size, whole = (trees.n_bytes(x) / 1e6 for x in (trainable, weights))
    return f'{n:,} of {of:,} weights train ({n / of:.2%}): {size:,.1f} MB of {whole:,.1f} MB'


def question_of(plan: Plan, documents: Any, tokenizer: Any) -> Question | None:
    """A question of the data: of a document that is held out, if one is.

    Args:
      plan: of the fine-tuning.
      documents: all of them.
      tokenizer: of the model.

    Returns:
      None if the data has no question that fits.
    """
    if plan.kind not in (CHAT, INSTRUCTIONS, TEXT, ABOUT):
        pair = documents.pairs[min(HELD_OUT, len(documents)) - 1]
        ids, weights = pair[0].ids, np.arange(len(pair[0].ids)) >= pair[0].start
    else:
        if plan.kind == ABOUT:
            documents = plan.documents(tokenizer, 'valid')
        ids, weights = documents[min(HELD_OUT, len(documents)) - 1]
    learnt = np.flatnonzero(weights[1:]) + 1
    if not learnt.size:
        return None
    start = int(learnt[0])
    if plan.kind == TEXT or start < 2:
        start = min(_BEGINNING, len(ids) // 2)
    if start < 1:
        return None
    prompt = [int(i) for i in ids[:start]]
    return Question(
        prompt, _last_turn(prompt, tokenizer), tokenizer.decode(ids[start : start + _ANSWER])
    )


def answer(model: Model, question: Question, tokenizer: Any) -> str:
    """What a model says to a question: the likeliest tokens, up to one that ends an answer."""
    from layercomb.supervised import decoding
    from layercomb.supervised.decoding import prompts

    most = prompts.max_len(model.layer)
    room = _ANSWER if most is None else min(_ANSWER, most - len(question.ids))
    if room < 1:
        return ''
    made = decoding.generate(
        model, [question.ids], room, temperature=0, eos_id=int(tokenizer.eos_id)
    )[0]
    ends = np.flatnonzero(np.isin(made, tokenizer.stop_ids))
    return str(tokenizer.decode(made[: ends[0]] if ends.size else made))


def before(model: Pretrained, question: Question | None, run: Path) -> str | None:
    """What the model says before training; a run that goes on has kept it.

    Args:
      model: that the run begins from, with its weights unless the run goes on.
      question: None for none.
      run: the run's directory.
    """
    if question is None:
        return None
    if model.weights is not None:
        return answer(model.finished(model.weights, {}), question, model.tokenizer)
    try:
        return str(json.loads(runs.read_text(run / FOLDER / _SAID))['before'])
    except (UsageError, ValueError, LookupError, TypeError):
        return None


def remember(said: str | None, run: Path) -> None:
    """Keeps in a run what its model said before training."""
    if said is not None:
        runs.write_text(run / FOLDER / _SAID, json.dumps({'before': said}) + '\n')


def after(
    plan: Plan,
    model: Pretrained,
    weights: Any,
    state: Any,
    question: Question | None,
    said: str | None,
) -> None:
    """Prints what the model said and says now, and what can be done with it.

    Args:
      plan: of the fine-tuning.
      model: that training began from.
      weights, state: after training.
      question: that it is asked; None for none.
      said: its answer before training; None if that is not known.
    """
    if question is not None:
        now = answer(model.finished(weights, state), question, model.tokenizer)
        print()
        rows = {'asked': question.shown, 'before': said, 'now': now, 'the data': question.wanted}
        for name, text in rows.items():
            if text is not None:
                print(f'{name + ":":<10}{" ".join(text.split())}')
    talk = 'generate' if model.tokenizer.chat is None else 'chat'
    how = " --prompt '…'" if talk == 'generate' else ''
    print(f'\nlayercomb {talk} {plan.directory}{how}')
    print(f'layercomb serve {plan.directory}')
    print(
        f'layercomb convert {plan.directory} OUT       # for transformers; OUT.gguf for llama.cpp'
    )


def _last_turn(prompt: list[int], tokenizer: Any) -> str:
    """The text before which an answer begins: of a conversation, what the user said last."""
    ends = [i for i, token in enumerate(prompt) if token in tokenizer.stop_ids]
    if not ends or tokenizer.chat is None:
        return str(tokenizer.decode(prompt))
    start = ends[-2] + 1 if len(ends) > 1 else 0
    return str(tokenizer.decode(prompt[start : ends[-1]])).strip().removeprefix('user').strip()
