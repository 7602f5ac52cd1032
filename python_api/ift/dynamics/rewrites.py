"""Answers made by rules: rewordings, other texts of the same format, and fluent sentences.

The paper on learning dynamics has ChatGPT rewrite an answer with its meaning kept (*semantic*) or
with its format kept (*format*). The rules here are a poor substitute that needs no model: probes
whose answers they made say so (`Probe.by_rule`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

# English phrases, and others of the same meaning in nearly every sentence.
SAME = {
    "do not": "don't", "does not": "doesn't", "did not": "didn't", "cannot": "can't",
    "is not": "isn't", "are not": "aren't", "was not": "wasn't", "will not": "won't",
    "don't": "do not", "doesn't": "does not", "didn't": "did not", "can't": "cannot",
    "isn't": "is not", "aren't": "are not", "wasn't": "was not", "won't": "will not",
    "it is": "it's", "that is": "that's", "you are": "you're", "they are": "they're",
    "we are": "we're", "i am": "i'm", "for example": "for instance",
    "for instance": "for example", "because": "since", "however": "even so",
    "therefore": "for that reason", "in order to": "so as to", "a lot of": "plenty of",
    "many": "a great number of", "several": "a number of", "big": "large", "large": "big",
    "small": "little", "begin": "start", "quickly": "fast", "buy": "purchase",
    "help": "assist", "need": "require", "show": "display", "get": "obtain",
    "give": "provide", "maybe": "perhaps", "perhaps": "maybe", "usually": "as a rule",
    "often": "frequently", "important": "of importance", "easy": "simple",
    "difficult": "hard",
}  # fmt: skip
PHRASES = re.compile(
    rf"\b({'|'.join(map(re.escape, sorted(SAME, key=len, reverse=True)))})\b", re.IGNORECASE
)
SENTENCE = re.compile(r"[^.!?\n]+[.!?]+")
CONTENT = re.compile(r"[^\W\d_]{4,}")  # words of four letters and more

# Fluent, human, and no answer to anything.
SENTENCES = (
    "The ferry was late again, so we walked along the harbour and counted the gulls.",
    "My grandmother kept every button that ever fell off a coat in a blue tin.",
    "After the rain the whole street smelled of warm stone and cut grass.",
    "He had promised to return the ladder in May, and now it was nearly winter.",
    "Nobody remembers who painted the door green, but it has suited the house ever since.",
    "The orchestra tuned for so long that the audience began to applaud by mistake.",
    "Two goats stood on the roof of the bus shelter and looked down at the traffic.",
    "She wrote the address on the back of her hand and lost it in the rain.",
    "The bakery on the corner opens before dawn and sells out by eight.",
    "We found an old map of the valley behind the wallpaper in the hall.",
    "Every summer the river shrinks until you can cross it without wetting your knees.",
    "The lighthouse keeper read the same novel each autumn and never told us the title.",
    "A bright orange kite has been caught in the poplar since the first of March.",
    "The train stopped between two stations and everyone began to talk to each other.",
    "His violin was worth more than the car that he drove it around in.",
    "They planted forty apple trees and gave each of them the name of an aunt.",
    "The museum lets you touch the meteorite, which is colder than it looks.",
    "On Thursdays the market moves to the square in front of the old mill.",
    "I still owe the postman an apology for what the dog did to his hat.",
    "The last tram of the night is always full of musicians and their cases.",
)


def semantic(text: str) -> Iterator[str]:
    """The meaning kept: English phrases replaced by others, else the sentences in another order.

    >>> next(semantic("It is easy. You do not need a key."))
    "It's simple. You don't require a key."
    >>> next(semantic("Red comes first. Blue follows."))
    'Blue follows. Red comes first.'
    """

    def other(match: re.Match[str]) -> str:
        found = SAME[match[0].lower()]
        return found[0].upper() + found[1:] if match[0][0].isupper() else found

    reworded = PHRASES.sub(other, text)
    if reworded != text:
        yield reworded
    sentences = SENTENCE.findall(text)
    if len(sentences) > 1 and "".join(sentences).strip() == text.strip():
        yield " ".join(s.strip() for s in (sentences[-1], *sentences[:-1]))


def formatted(text: str, pool: list[str], draw: random.Random) -> Iterator[str]:
    """The format kept: words of four letters and more replaced by others, capitals as they were.

    Args:
        text: the answer; its line breaks, punctuation, numbers and short words stay.
        pool: words to draw, as `content_words` gives them.
        draw: the generator.
    """

    def other(match: re.Match[str]) -> str:
        word = draw.choice(pool)
        return word.upper() if match[0].isupper() else (
            word.capitalize() if match[0][0].isupper() else word
        )  # fmt: skip

    for _ in range(8 if pool and CONTENT.search(text) else 0):
        yield CONTENT.sub(other, text)


def content_words(texts: list[str]) -> list[str]:
    """The words of four letters and more, in lower case, as often as they occur."""
    return [word.lower() for text in texts for word in CONTENT.findall(text)]
