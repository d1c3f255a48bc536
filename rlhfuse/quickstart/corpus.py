"""Prompts, demonstrations and preference pairs of the advice desk, generated from a seed.

People ask how to do something; the desk answers with a countdown of advice that may be kind and
to the point, off the topic, or rude. A demonstration mixes the three; preferences are for kind
and to the point. The opening number decides the length and is drawn from a heavy tail; it says
nothing about quality, so preferences do not either.
"""

import random
from dataclasses import dataclass
from enum import IntEnum

from rlhfuse.quickstart import words
from rlhfuse.quickstart.words import Topic

DATA_SOURCE = "advice_desk"
Moods = tuple[float, float, float]  # chances of (rude, beside the point, kind)


class Mood(IntEnum):
    """What a line of an answer is worth."""

    RUDE = -1
    BESIDE = 0
    KIND = 1


@dataclass(frozen=True)
class Question:
    """One prompt: who asks for what, in which words."""

    topic: Topic
    name: str
    text: str


@dataclass(frozen=True)
class Answer:
    """`moods` holds one mood per line of `text`."""

    text: str
    moods: tuple[Mood, ...]

    @property
    def quality(self) -> float:
        """Mean worth of a line, in [-1, 1]; independent of the number of lines."""
        return sum(self.moods) / len(self.moods)


@dataclass(frozen=True)
class PreferencePair:
    question: Question
    chosen: Answer
    rejected: Answer


def all_questions() -> list[Question]:
    """Every prompt there is, in a fixed order."""
    return [
        Question(topic, name, wording.format(name=name, goal=topic.goal))
        for topic in words.TOPICS
        for name in words.NAMES
        for wording in words.QUESTIONS
    ]


def split_questions(rng: random.Random, num_held_out: int) -> tuple[list[Question], list[Question]]:
    """(training, held out): shuffled, without a prompt in common."""
    questions = all_questions()
    rng.shuffle(questions)
    return questions[num_held_out:], questions[:num_held_out]


def draw_length(rng: random.Random) -> int:
    """Numbered lines of one answer: mostly 2 to 4, one in sixteen 22 to 30."""
    kind = rng.random()
    if kind < 0.86:
        return rng.choice((2, 2, 2, 3, 3, 4))
    if kind < 0.94:
        return rng.randint(6, 12)
    return rng.randint(22, 30)


def draw_moods(rng: random.Random, weights: tuple[float, float, float], evenness: float) -> Moods:
    """Chances for the lines of one answer: Dirichlet around `weights`; the larger
    `evenness`, the closer to them."""
    draws = [rng.gammavariate(weight * evenness, 1.0) for weight in weights]
    total = sum(draws)
    return (draws[0] / total, draws[1] / total, draws[2] / total)


def write_answer(rng: random.Random, question: Question, num_steps: int, chances: Moods) -> Answer:
    """A countdown of `num_steps` lines; each line's mood is drawn on its own from `chances`."""

    def mood() -> Mood:
        return rng.choices((Mood.RUDE, Mood.BESIDE, Mood.KIND), chances)[0]

    moods = [mood()]
    lines = [f"{_opener(rng, moods[0])} My top {num_steps}:"]
    for number in range(num_steps, 0, -1):
        moods.append(mood())
        lines.append(f"{number}. {_step(rng, question, moods[-1])}")
    closing = mood()
    if closing is not Mood.BESIDE:
        moods.append(closing)
        closers = words.KIND_CLOSERS if closing is Mood.KIND else words.RUDE_CLOSERS
        lines.append(rng.choice(closers))
    return Answer("\n".join(lines), tuple(moods))


def _opener(rng: random.Random, mood: Mood) -> str:
    openers = {
        Mood.KIND: words.KIND_OPENERS,
        Mood.BESIDE: words.PLAIN_OPENERS,
        Mood.RUDE: words.RUDE_OPENERS,
    }
    return rng.choice(openers[mood])


def _step(rng: random.Random, question: Question, mood: Mood) -> str:
    own = question.topic
    if mood is Mood.RUDE:
        return rng.choice(words.RUDE_STEPS).format(step=rng.choice(own.steps))
    topic = own
    while mood is Mood.BESIDE and topic is own:
        topic = rng.choice(words.TOPICS)
    step = rng.choice(topic.steps)
    tail = f" {rng.choice(words.KIND_TAILS)}" if rng.random() < 0.15 else ""
    return f"{step[0].upper()}{step[1:]} {rng.choice(words.MANNERS)}{tail}."


def demonstration(rng: random.Random, question: Question) -> Answer:
    """What the policy is warmed up on: mixed company, a little more rude than kind."""
    chances = draw_moods(rng, (0.40, 0.25, 0.35), evenness=4.0)
    return write_answer(rng, question, draw_length(rng), chances)


def preference_pair(rng: random.Random, question: Question, margin: float = 0.3) -> PreferencePair:
    """Two answers whose quality differs by `margin` or more. Half of the pairs have the same
    number of steps; in the others lengths are drawn apart, so that neither length nor a sum over
    lines explains the preference."""
    while True:
        length = draw_length(rng)
        other = length if rng.random() < 0.5 else draw_length(rng)
        first, second = (
            write_answer(rng, question, n, draw_moods(rng, (1.0, 1.0, 1.0), evenness=0.8))
            for n in (length, other)
        )
        if first.quality - second.quality >= margin:
            return PreferencePair(question, first, second)
