"""The verb and the noun of an instruction: what the rules are meant to do. The module says how often they are right."""

import pytest

from minigpt.selfinstruct.report.verb_noun import VERBS, VerbNoun, verb_noun


@pytest.mark.parametrize(
    ("instruction", "verb", "noun"),
    [
        ("Write a short story about a dog.", "write", "story"),
        ("write some haikus", "write", "haiku"),
        ("Please list three large cities.", "list", "city"),
        ("Can you please give me a few ideas for dinner?", "give", "idea"),
        ("My bicycle was stolen. Could you draft a letter to the police?", "draft", "letter"),
        ("You are given two texts, and you need to compare their tone.", "compare", "tone"),
        ("Your task is to sort the words.", "sort", "word"),
        ("I would like you to invent a game with dice.", "invent", "game"),
        ("Given a recipe, output the ingredients.", "output", "ingredient"),
        ("In two sentences, summarize the plot of the play.", "summarize", "plot"),
        ("To make the verse rhyme, replace the last word.", "replace", "word"),
        ("Using the facts, answer the question.", "answer", "question"),
        ("Imagine you are a baker. Plan a menu for the week.", "plan", "menu"),
        ("What is wrong here? Correct the sentence.", "correct", "sentence"),
        ("Converting the sum to dollars.", "convert", "sum"),
        ("Try to explain the joke.", "explain", "joke"),
        ("Briefly describe the weather in Lima.", "describe", "weather"),
        ("Frobnicate the widgets.", "frobnicate", "widget"),  # a verb that is in no list
        # phrasal verbs, and particles that belong to none
        ("Come up with a funny, clever name for a cat.", "come up with", "name"),
        ("Fill in the blank.", "fill in", "blank"),
        ("Write down the steps.", "write", "step"),
        # where the noun phrase ends
        ("Rewrite the sentence using a simile.", "rewrite", "sentence"),
        ("Write a letter describing the house.", "write", "letter"),
        ("Write a speech praising a friend's courage.", "write", "speech"),
        ("Write a poem titled 'Rain'.", "write", "poem"),
        ("Compose a sad and beautiful song about home.", "compose", "song"),
        ("Name a king or a queen of France.", "name", "king"),
        ("Correct each of the sentences below.", "correct", "sentence"),
        ("Define the word 'entropy'.", "define", "word"),
        ("Explain the dog's behaviour.", "explain", "behaviour"),
        ("Describe in detail the life of a bee.", "describe", "life"),
        ("Give an example of a false friend.", "give", "example"),
        ("Write an essay on the history of glasses", "write", "essay"),
        ("Translate that sentence into German.", "translate", "sentence"),
        # plurals
        ("Compare the two hypotheses.", "compare", "hypothesis"),
        ("Rank these movies.", "rank", "movie"),
        ("Sort the boxes by size.", "sort", "box"),
        ("Describe the species.", "describe", "species"),
        # no noun
        ("Explain how a kettle works.", "explain", ""),
        ("Tell me whether this is true.", "tell", ""),
        ("Translate 'How are you?' into French.", "translate", ""),
        ("Rank the following:", "rank", ""),
        ("Reply to the email.", "reply", ""),
    ],
)
def test_a_request(instruction, verb, noun):
    assert verb_noun(instruction) == VerbNoun(verb, noun, question=False)


@pytest.mark.parametrize(
    "instruction",
    ["What is the capital of France?", "In your opinion, how would you explain the tides?", "Is a whale a fish?"],
)
def test_a_question_has_no_verb_of_its_own(instruction):
    assert verb_noun(instruction) == VerbNoun(question=True)


@pytest.mark.parametrize("instruction", ["", "...", "Answer: yes", "The cat sat on the mat.", "写一首关于春天的诗。"])
def test_what_asks_for_nothing_that_the_rules_know(instruction):
    assert verb_noun(instruction) == VerbNoun()


def test_the_examples_of_the_docstring():
    given = "Given two cocktails, could you please come up with some short, funny names for them?"
    assert verb_noun(given) == VerbNoun("come up with", "name")


def test_a_long_text_costs_no_more_than_its_beginning():
    """An instruction may hold a whole article, or one endless line of signs."""
    for text in ("Summarize the text: " + "word " * 100_000, "Count the signs " + "'" * 100_000):
        assert verb_noun(text).verb in ("summarize", "count")


def test_the_list_of_verbs_is_in_order():
    verbs = VERBS.read_text(encoding="utf-8").splitlines()[1:]
    assert verbs == sorted(set(verbs))
    assert all(verb == verb.lower().strip() for verb in verbs)
