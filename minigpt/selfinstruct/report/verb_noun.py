"""The verb and the noun of an instruction, by rules: "Write a short story about a dog." -> write, story.

They are what Self-Instruct draws of its tasks (Wang et al. 2022, https://arxiv.org/abs/2212.10560, figure 3). The paper
takes the root verb and its direct object from a neural parser. Here stand a list of verbs (`assets/verbs.txt`) and the
habits of instructions: they begin with their verb, or with a polite or conditional clause before it, and the object is
the noun phrase that follows.

How good that is, by hand: of 100 instructions of Alpaca's data, which the rules had not been written on, 94 of 95 verbs
and 80 of 84 nouns were right, and two nouns were missed. These six mistakes in nouns were mended afterwards.

Limits: English only. The first request counts, not the second. The head is the syntactic one ("a list of recipes" is a
list), of "food and drink recipes" it is the first noun, and of two objects ("give students a test") the first. What
follows a gerund of the list ("a birthday planning sheet") is taken for another clause.
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

VERBS = Path(__file__).parents[2] / "assets" / "verbs.txt"
LONGEST = 80  # words of a sentence that are looked at

_QUOTE = '"'
_TOKEN = re.compile(
    r"\"[^\"\n]*\"|“[^”\n]*”|‘[^’\n]*’|`[^`\n]*`|(?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w))+'(?!\w)"  # quoted
    r"|[^\W\d_]+(?:['’-]\w+)*|\d[\w.,-]*(?<![.,-])|[.!?\n,;:()–—-]"
)


def _set(words: str) -> set[str]:
    return set(words.split())


# What may stand before the verb of a clause; a break or the beginning is enough for most verbs.
_BREAKS = set(",;:–—-")
_ASKED = re.compile(
    r"(?:\b(?:please|kindly|help (?:me|us)(?: to)?|let's|let us|try to|now|then|you (?:need|have|are) to"
    r"|you (?:should|must|will)|(?:like|want|need) you to|(?:task|job|goal|aim|role) is to)"
    r"|(?:^|[,;:–—-] )(?:can|could|would|will) you(?: please)?|^(?:first|next|finally|also|just|\w+ly))$"
)
_POLITE = re.compile(r"(?:\bplease|(?:^|[,;:–—-] )(?:can|could|would|will) you(?: please)?)$")
_WH = _set("what which who whom whose why how what's who's how's")

_DETERMINERS = _set(
    "a an the this these those my your our his her its their some any all each every both either no one two three "
    "four five six seven eight nine ten several many more most few another other such enough"
)
_PREPOSITIONS = _set(
    "of in on at by for with without from to into onto about above across after against along among around as "
    "before behind below beneath beside besides between beyond despite during except inside like near over per "
    "since than through throughout toward towards under unlike until upon via within according concerning "
    "regarding including"
)
_PRONOUNS = _set(
    "i you he she it we they me him us them itself himself themselves yourself someone something anyone anything "
    "everyone everything nothing there here"
)
_OTHERS = _set(
    "that if whether when where while because so but and or nor not then is are was were be been being am do does "
    "did has have had can could would will shall should may might must using based given written made found shown "
    "taken spoken yes suppose imagine assume considering"
)
_STOP = _PREPOSITIONS | _PRONOUNS | _OTHERS | _WH
_NOT_VERBS = _STOP | _DETERMINERS
_PARTICLES = {"up", "out", "down", "off", "back", "away", "over"}
# Before a noun; the last word of a phrase is never one of them.
_ADJECTIVES = _set(
    "following given below above new old good bad best better big small large short long brief quick simple easy "
    "hard difficult different similar same own main major minor key common rare random specific general "
    "particular certain appropriate proper correct incorrect right wrong true false active passive present next "
    "previous first second third last final whole full complete entire coherent fluent formal informal polite "
    "clear concise accurate exact unique possible potential real popular famous public private modern ancient "
    "young early late high low top strong weak healthy happy sad funny fun professional personal social natural "
    "human-readable detailed original various multiple single double largest smallest longest shortest oldest "
    "highest lowest fewer positive negative neutral english basic advanced important necessary sufficient "
    "relevant suitable available"
)
_ADJECTIVE = re.compile(r".{3,}(?:ful|ous|less|ible|ical|ish|ly|ed|ing|(?<!ect)ive)")
_GERUNDS = _set(
    "meaning spelling building meeting training marketing recording drawing painting warning greeting heading "
    "ending beginning opening closing rating ranking reading writing saying string thing king ring wing spring "
    "morning evening wedding clothing feeling finding setting listing posting mapping ordering timing ceiling "
    "wording"
)
_ED_NOUNS = {"bed", "deed", "feed", "need", "seed", "speed", "breed", "embed"}
_SAME = _set(
    "series species news physics mathematics gas bus lens canvas bias atlas alias bonus virus "
    "campus status focus corpus census consensus syllabus cactus octopus chorus genus thesaurus"
)
_SINGULAR = {
    **{"people": "person", "children": "child", "men": "man", "women": "woman", "feet": "foot", "mice": "mouse"},
    **{"movies": "movie", "cookies": "cookie", "calories": "calorie", "quizzes": "quiz", "leaves": "leaf"},
    **{"hypotheses": "hypothesis", "analyses": "analysis", "synopses": "synopsis", "theses": "thesis"},
    **{word: word for word in _SAME},
}


class VerbNoun(NamedTuple):
    """What an instruction asks for; empty where that was not found, `question` where it is a question."""

    verb: str = ""
    noun: str = ""
    question: bool = False


def verb_noun(instruction: str) -> VerbNoun:
    """The verb of the first request, in its base form, and the head of its object, in the singular.

    >>> verb_noun("Given two cocktails, could you please come up with some short, funny names for them?")
    VerbNoun(verb='come up with', noun='name', question=False)
    >>> verb_noun("What is the capital of France?")
    VerbNoun(verb='', noun='', question=True)
    """
    question = False
    for words in _sentences(instruction):
        found = _verb(words)
        if found:
            verb, end = found
            return VerbNoun(verb, _noun(words[end:]))
        question = question or _is_question(words)
    return VerbNoun(question=question)


@cache
def _forms() -> tuple[dict[str, str], dict[str, str]]:
    """The verbs of the list by themselves, and by their forms in -ing."""
    lines = VERBS.read_text(encoding="utf-8").splitlines()
    base = {line: line for line in lines if not line.startswith("#")}
    ing = {}
    for verb in base:
        word, _, rest = verb.partition(" ")
        stem = word[:-1] if word.endswith("e") and not word.endswith(("ee", "oe", "ye")) else word
        for form in (f"{stem}ing", f"{word}{word[-1]}ing"):  # making; putting (and no harm in "writting")
            ing[f"{form} {rest}".strip()] = verb
    return base, ing


def _sentences(text: str) -> list[list[str]]:
    """Lower-case words and signs; a quotation is one sign, and a question keeps its mark."""
    sentences: list[list[str]] = [[]]
    for token in _TOKEN.findall(text[: 40 * LONGEST]):
        if token in ".!?\n":
            if sentences[-1]:
                sentences[-1].extend(token * (token == "?"))
                sentences.append([])
        elif len(sentences[-1]) < LONGEST:
            quoted = len(token) > 1 and token[0] in "\"“‘`'"
            sentences[-1].append(_QUOTE if quoted else token.lower().replace("’", "'"))
    return [words for words in sentences if words]


def _is_question(words: list[str]) -> bool:
    return words[-1] == "?" or words[0] in _WH


def _verb(words: list[str]) -> tuple[str, int] | None:
    """The verb of a sentence's request and where what follows it begins, or None where it requests nothing."""
    base, ing = _forms()
    asks = _is_question(words)
    for start in range(len(words)):
        found = _match(words, start, base)
        if not found:
            continue
        before = " ".join(words[:start])
        follower = words[found[1]] if found[1] < len(words) else ""
        if start == 0:
            if follower == ":":  # "Answer: ..." is a heading
                continue
            return found
        if _POLITE.search(before) or (not asks and _ASKED.search(before)):
            return found
        if words[start - 1] in _BREAKS and not asks and follower not in ("", ",", "and", "or", "?", ":"):
            return found
    if asks:
        return None
    first = words[0]
    start = int(first == "try")
    if found := _match(words, start, ing):  # "Solving the equation and find the value."
        return found
    follows_a_verb = words[1:2] and words[1] in ("the", "a", "an", "this", "these", "each", "all", "your", "my")
    if follows_a_verb and first.isalpha() and first not in _NOT_VERBS and not first.endswith(("ly", "ing")):
        return first, 1  # a verb that is not in the list
    return None


def _match(words: list[str], start: int, forms: dict[str, str]) -> tuple[str, int] | None:
    for length in (3, 2, 1):
        form = " ".join(words[start : start + length])
        if form in forms:
            return forms[form], min(start + length, len(words))
    return None


def _noun(words: list[str]) -> str:
    """The head of the noun phrase that words begin with: the last noun before what cannot belong to it."""
    while words and words[0] in _PARTICLES | {"me", "us"}:
        words = words[1:]
    if words[:2] == ["in", "detail"]:
        words = words[2:]
    noun, before = "", ""
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if word in (",", "and", "or"):  # between adjectives the phrase goes on
            if not before or not _is_adjective(before) or following in _NOT_VERBS:
                break
            noun = ""
        elif (word == "of" and not noun and before in _DETERMINERS) or (
            word == "that" and index == 0
        ):  # "each of the words"
            pass
        elif (word in _STOP and (noun or word not in _ADJECTIVES)) or not (word == _QUOTE or word[0].isalnum()):
            break
        elif word in _DETERMINERS or word == _QUOTE or word[0].isdigit():
            if noun:
                break
        elif noun and _is_behind_a_noun(word, following):
            break
        elif word not in _ADJECTIVES and not word.endswith(("'s", "s'")) and len(word) > 1:
            noun = word
        before = word
    return _singular(noun)


def _is_adjective(word: str) -> bool:
    return word in _ADJECTIVES or _ADJECTIVE.fullmatch(word) is not None


def _is_behind_a_noun(word: str, following: str) -> bool:
    """Whether a word after a noun begins a clause about it: "titled", "describing", "ascendingly"."""
    if word.endswith("ed"):
        return word not in _ED_NOUNS
    if word.endswith("ing") and word not in _GERUNDS:
        return word in _forms()[1] or following in _NOT_VERBS or following.endswith("'s")
    return word.endswith("ly")


def _singular(noun: str) -> str:
    if noun in _SINGULAR:
        return _SINGULAR[noun]
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if noun.endswith(("sses", "xes", "ches", "shes")):
        return noun[:-2]
    if noun.endswith("s") and not noun.endswith(("ss", "is")) and len(noun) > 3:
        return noun[:-1]
    return noun
