"""Intended behaviour of the verb and noun rules. Their measured accuracy is in the module's docstring."""

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
        ("Frobnicate the widgets.", "frobnicate", "widget"),  # a verb missing from the list
        # phrasal verbs, and particles that are not part of one
        ("Come up with a funny, clever name for a cat.", "come up with", "name"),
        ("Fill in the blank.", "fill in", "blank"),
        ("Write down the steps.", "write", "step"),
        # the end of the noun phrase
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
def test_a_question_has_no_verb(instruction):
    assert verb_noun(instruction) == VerbNoun(question=True)


@pytest.mark.parametrize("instruction", ["", "...", "Answer: yes", "The cat sat on the mat.", "写一首关于春天的诗。"])
def test_texts_without_a_request(instruction):
    assert verb_noun(instruction) == VerbNoun()


def test_the_docstring_example():
    instruction = "Given two cocktails, could you please come up with some short, funny names for them?"
    assert verb_noun(instruction) == VerbNoun("come up with", "name")


def test_only_the_start_of_a_long_text_is_read():
    """An instruction may contain a whole article, or a very long run of one character."""
    for text in ("Summarize the text: " + "word " * 100_000, "Count the signs " + "'" * 100_000):
        assert verb_noun(text).verb in ("summarize", "count")


def test_the_list_of_verbs_is_sorted_and_normalized():
    verbs = VERBS.read_text(encoding="utf-8").splitlines()[1:]
    assert verbs == sorted(set(verbs))
    assert all(verb == verb.lower().strip() for verb in verbs)
