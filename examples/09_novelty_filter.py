"""When is an instruction new? The longest common subsequence as a table, ROUGE-L, and the filter's verdicts.

Opens minigpt/selfinstruct/novelty.py. ROUGE-L: Lin 2004; the filter: Self-Instruct (Wang et al. 2022,
arXiv:2212.10560), where a model writes its own instruction data and must not write the same thing twice.

    python examples/09_novelty_filter.py
"""

from rouge_score.rouge_scorer import RougeScorer

from minigpt.selfinstruct import NoveltyFilter

OLD, NEW = "Write a short poem about a cat.", "Write a poem about my cat!"
old, new = (text.lower().strip(".!").split() for text in (OLD, NEW))

# A subsequence keeps the order and may leave words out: so much of one sentence stands in the other. Each cell holds
# the longest one of the words above it and those to its left: where both are the same word, one more than the cell
# diagonally before; elsewhere the better of leaving out the one or the other.
table = [[0] * (len(old) + 1) for _ in range(len(new) + 1)]
print("1. The longest common subsequence; * where the words are the same\n")
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
print("\n2. ROUGE-L, which is the F-measure of that")
print(f"   precision {common}/{len(new)} = {precision:.3f}   of the new words stand in the old text, in order")
print(f"   recall    {common}/{len(old)} = {recall:.3f}   of the old words stand in the new one")
print(f"   F = 2 x precision x recall / (precision + recall) = {by_hand:.4f}")

pool = NoveltyFilter(threshold=0.7)
pool.add(OLD)
kept = [OLD]
print(f"\n3. The filter: what stays below {pool.threshold} with all that was kept is kept too")
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

judge = RougeScorer(["rougeL"]).score(OLD, NEW)["rougeL"].fmeasure  # the package that papers count with
fresh = NoveltyFilter()
fresh.add(OLD)
assert fresh.check(NEW).score == judge and abs(judge - by_hand) < 1e-12 and NEW not in kept
assert sorted(SHUFFLED.lower().replace(":", "").strip(".").split()) == sorted(old) and SHUFFLED in kept
print("\n=> One word more makes nothing new; the same words shuffled do: order counts.")
