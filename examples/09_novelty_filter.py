"""The novelty filter: the longest common subsequence as a table, ROUGE-L, and which instructions count as new.

Opens minigpt/selfinstruct/novelty.py. ROUGE-L: Lin 2004; the filter: Self-Instruct (Wang et al. 2022,
arXiv:2212.10560), which drops generated instructions that are too similar to earlier ones.

    python examples/09_novelty_filter.py
"""

from rouge_score.rouge_scorer import RougeScorer

from minigpt.selfinstruct import NoveltyFilter

OLD, NEW = "Write a short poem about a cat.", "Write a poem about my cat!"
old, new = (text.lower().strip(".!").split() for text in (OLD, NEW))

# A subsequence keeps the order of words and may skip some. Each cell is the length of the longest common subsequence of
# the words up to its column and the words up to its row: if the two words are equal, the cell above left plus one,
# otherwise the larger of the cells above and to the left.
table = [[0] * (len(old) + 1) for _ in range(len(new) + 1)]
print("1. The longest common subsequence; * marks equal words\n")
print(f"   {'':7}" + "".join(f"{word:>7}" for word in old))
for row, word in enumerate(new, start=1):
    for column, other in enumerate(old, start=1):
        if word == other:
            table[row][column] = table[row - 1][column - 1] + 1
        else:
            table[row][column] = max(table[row - 1][column], table[row][column - 1])
    cells = (f"{count}{'*' if word == other else ' '}" for count, other in zip(table[row][1:], old))
    print(f"   {word:8}" + "".join(f"{cell:>7}" for cell in cells).rstrip())
common = table[-1][-1]

precision, recall = common / len(new), common / len(old)
by_hand = 2 * precision * recall / (precision + recall)
print("\n2. ROUGE-L, the F-measure of its length")
print(f"   precision {common}/{len(new)} = {precision:.3f}   of the new words are in the old text, in order")
print(f"   recall    {common}/{len(old)} = {recall:.3f}   of the old words are in the new text, in order")
print(f"   F = 2 x precision x recall / (precision + recall) = {by_hand:.4f}")

pool = NoveltyFilter(threshold=0.7)
pool.add(OLD)
kept = [OLD]
print(f"\n3. The filter keeps a text whose F with every kept text is below {pool.threshold}")
print(f"   highest F  mean F  {'nearest':9}kept\n   {'':28}1     {OLD}")
SHUFFLED = "A cat: write about a short poem."  # the same words as OLD
for text in (
    NEW,
    SHUFFLED,
    "Write a haiku about the sea.",
    "Write a short haiku about the sea.",
    "Name three rivers in Asia.",
    "Name three rivers of Asia, please.",
):
    verdict = pool.check(text)
    nearest = kept.index(next(iter(verdict.neighbours))) + 1
    if verdict.accepted:
        pool.add(text)
        kept.append(text)
    place = str(len(kept)) if verdict.accepted else "no"
    print(f"   {verdict.score:9.3f}  {verdict.average:6.3f}  {nearest:7}  {place:6}{text}")

judge = RougeScorer(["rougeL"]).score(OLD, NEW)["rougeL"].fmeasure  # the package that papers use
fresh = NoveltyFilter()
fresh.add(OLD)
assert fresh.check(NEW).score == judge and abs(judge - by_hand) < 1e-12 and NEW not in kept
assert sorted(SHUFFLED.lower().replace(":", "").strip(".").split()) == sorted(old) and SHUFFLED in kept
print("\n=> One more word is too similar; the same words shuffled are new: order counts.")
